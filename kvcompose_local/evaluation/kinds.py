"""Texts of the kinds that people ask chats about: source, records, logs, tables, dialogue, languages, lists, steps.

Each function draws a text of about as many tokens as are wanted, and questions about it: (question, how its answer
begins, what must be in it). Everything is generated, except source, which comes from Python's own library.
"""

from __future__ import annotations

import ast
import itertools
import json
import random
import string
import sysconfig
import uuid
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

#: Counts the tokens of a text.
Count = Callable[[str], int]


class Asked(NamedTuple):
    """A question, the beginning of its answer, what the answer must contain, and its most tokens."""

    question: str
    prefix: str
    reference: str
    max_tokens: int = 16


Made = tuple[str, list[Asked]]
_N_ASKED = 4
#: Characters of source that are taken or left together, so that a text gets about the length that is wanted.
_LONGEST_BLOCK = 2500
_FIRST = "Clara Edwin Nora Felix Ruth Oscar Ida Hugo Vera Bruno Alma Leo Petra Anton Greta Milan".split()
_LAST = "Hartmann Okafor Lindqvist Moreau Castell Whitby Novak Ferrer Tanaka Brandt Osei Kowalski".split()
_CITIES = "Lisbon Oslo Vienna Prague Dublin Athens Warsaw Helsinki Madrid Budapest Zagreb Riga".split()
_GOODS = "lamp,kettle,backpack,drill,blanket,speaker,monitor,saddle,tripod,jacket,printer,helmet".split(",")
_COLOURS = "red blue green black white orange purple silver yellow brown".split()


def _until(n_tokens: int, count: Count, parts: Iterator[str], joint: str = "\n") -> list[str]:
    """As many parts as make about ``n_tokens``."""
    found: list[str] = []
    left = n_tokens
    for part in parts:
        found.append(part)
        left -= count(part + joint)
        if left <= 0:
            break
    return found


def _names(rng: random.Random, *parts: Sequence[str], joint: str = " ") -> Iterator[str]:
    """Names of a word of each part, all different, without an end."""
    names = [joint.join(words) for words in itertools.product(*parts)]
    for number in itertools.count(1):
        rng.shuffle(names)
        yield from (name if number == 1 else f"{name} {number}" for name in names)


def _asked(rng: random.Random, questions: Sequence[Asked]) -> list[Asked]:
    return rng.sample(questions, min(_N_ASKED, len(questions)))


@cache
def _sources() -> tuple[Path, ...]:
    """Modules of the standard library that are long enough to be asked about."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    return tuple(path for path in sorted(folder.glob("[a-z]*.py")) if 20_000 < path.stat().st_size < 120_000)


def _defaults(source: str) -> list[Asked]:
    """The numbers and strings that parameters of a source's functions default to, where a name says which it is."""
    found: dict[tuple[str, str], str] = {}
    twice = set()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef):
            continue
        arguments = [*node.args.posonlyargs, *node.args.args]
        named = arguments[len(arguments) - len(node.args.defaults) :]
        for argument, default in zip(named, node.args.defaults, strict=True):
            if isinstance(default, ast.Constant) and type(default.value) in (int, str, float):
                key, text = (node.name, argument.arg), str(default.value)
                if key in found or not (2 <= len(text) <= 20 and text.isprintable() and text.strip()):
                    twice.add(key)
                found[key] = text
    return [
        Asked(
            f"What is the default of the parameter `{argument}` of the function `{name}`?",
            f"The default of `{argument}` in `{name}` is",
            value,
        )
        for (name, argument), value in found.items()
        if (name, argument) not in twice
    ]


def source(rng: random.Random, n_tokens: int, count: Count) -> Made:
    """Functions of one module after another: defaults of their parameters."""
    paths = list(_sources())
    rng.shuffle(paths)
    text = ""
    for path in paths:
        code = path.read_text(encoding="utf-8", errors="replace")
        blocks = [ast.get_source_segment(code, node) or "" for node in ast.parse(code).body]
        blocks = [block for block in blocks if 0 < len(block) < _LONGEST_BLOCK]
        tell = [i for i, block in enumerate(blocks) if _defaults(block)]
        if not tell:
            continue
        start = max(rng.choice(tell) - rng.randrange(3), 0)
        kept = _until(n_tokens - count(text), count, iter(blocks[start:]), "\n\n")
        text = "\n\n".join([text, f"# {path.name}", *kept]).strip()
        if count(text) >= n_tokens:
            break
    return "Read this source.\n" + text, _asked(rng, _defaults(text))


def _person(rng: random.Random) -> str:
    return f"{rng.choice(_FIRST)} {rng.choice(_LAST)}"


def records(rng: random.Random, n_tokens: int, count: Count) -> Made:
    """JSON: fields of orders."""
    asked = []

    def orders() -> Iterator[str]:
        while True:
            order = {
                "id": f"{rng.choice('ABCDEFGH')}{rng.randrange(1000, 10000)}",
                "customer": _person(rng),
                "item": {"name": rng.choice(_GOODS), "colour": rng.choice(_COLOURS), "quantity": rng.randrange(1, 90)},
                "city": rng.choice(_CITIES),
                "total": f"{rng.randrange(10, 990)}.{rng.randrange(10, 100)}",
            }
            key, total, customer = (str(order[name]) for name in ("id", "total", "customer"))
            asked.append(Asked(f"What is the total of order {key}?", f"The total of order {key} is", total))
            asked.append(Asked(f"Who is the customer of order {key}?", f"The customer of {key} is", customer))
            yield json.dumps(order, indent=rng.choice([None, 1]))

    text = _until(n_tokens, count, orders(), ",\n")
    return "[" + ",\n".join(text) + "]", _asked(rng, asked)


def logs(rng: random.Random, n_tokens: int, count: Count) -> Made:
    """Lines of a server's log: codes of failures."""
    asked = []
    services = "auth billing search mailer gateway indexer scheduler uploader".split()

    def lines() -> Iterator[str]:
        second = rng.randrange(80_000)
        while True:
            second += rng.randrange(1, 9)
            time = f"{second // 3600:02}:{second // 60 % 60:02}:{second % 60:02}"
            service, request = rng.choice(services), f"req-{rng.randrange(16**6):06x}"
            if rng.random() < 0.2:
                code = f"E{rng.randrange(1000, 10000)}"
                asked.append(
                    Asked(f"With which error code did request {request} fail?", f"{request} failed with code", code)
                )
                yield f"{time} ERROR {service} {request} failed with code {code} after {rng.randrange(9, 5000)} ms"
            else:
                size = rng.randrange(100, 9999)
                yield f"{time} INFO  {service} {request} served {size} bytes to 10.0.{rng.randrange(99)}.7"

    return "\n".join(_until(n_tokens, count, lines())), _asked(rng, asked)


def table(rng: random.Random, n_tokens: int, count: Count) -> Made:
    """A table: cells by row and column."""
    asked = []
    columns = rng.sample("population founded altitude bridges schools parks libraries museums".split(), 4)
    names = _names(
        rng,
        "Nor Wes Eas Sud Hol Mar Kel Bir Ash Dun Lin Tor".split(),
        "field ford ham bury wick dale mouth haven ton stead".split(),
        joint="",
    )

    def rows() -> Iterator[str]:
        yield "| town | " + " | ".join(columns) + " |\n" + "|---" * (1 + len(columns)) + "|"
        for name in names:
            cells = [str(rng.randrange(100, 100_000)) for _ in columns]
            column = rng.randrange(len(columns))
            asked.append(
                Asked(
                    f"What does the table give as {columns[column]} of {name}?",
                    f"The {columns[column]} of {name} is",
                    cells[column],
                )
            )
            yield f"| {name} | " + " | ".join(cells) + " |"

    return "\n".join(_until(n_tokens, count, rows())), _asked(rng, asked)


def dialogue(rng: random.Random, n_tokens: int, count: Count) -> Made:
    """Two people plan, and say a few things that can be asked about."""
    asked = []
    one, other = rng.sample(_FIRST, 2)
    talk = (
        "I had not thought of that before.",
        "Let us see what the others say.",
        "That would be fine with me.",
        "The weather could be better, though.",
        "Did you sleep well?",
        "I am still tired from yesterday.",
        "We should not forget the tickets.",
        "My sister says the same.",
        "It depends on the train.",
        "Could you say that again?",
        "I would rather wait a little.",
        "You always say that.",
    )
    things = "meeting dinner concert appointment lecture match interview rehearsal tour workshop".split()
    rng.shuffle(things)

    def turns() -> Iterator[str]:
        who = 0
        while True:
            speaker, who = (one, other)[who], 1 - who
            words = rng.sample(talk, rng.randrange(1, 4))
            if things and rng.random() < 0.25:
                thing, city, hour = things.pop(), rng.choice(_CITIES), f"{rng.randrange(7, 22)}:{rng.randrange(10, 60)}"
                words.insert(rng.randrange(len(words) + 1), f"The {thing} is in {city} at {hour}.")
                asked.append(Asked(f"At what time is the {thing}?", f"The {thing} is at", hour))
                asked.append(Asked(f"In which city is the {thing}?", f"The {thing} is in", city))
            yield f"{speaker}: {' '.join(words)}"

    return "\n".join(_until(n_tokens, count, turns())), _asked(rng, asked)


class _Language(NamedTuple):
    """Sentences about people, with what is asked of them; ``hay`` says nothing that is asked."""

    lead: str
    fact: str
    question: str
    prefix: str
    trades: Sequence[str]
    hay: Sequence[str]
    space: str = " "


_LANGUAGES = {
    "german": _Language(
        "Lies den folgenden Text.",
        "{name} arbeitet als {trade} und hat das Zimmer {number}.",
        "Welches Zimmer hat {name}?",
        "{name} hat das Zimmer",
        "Bäcker Lehrer Arzt Schreiner Gärtner Richter Maler Koch".split(),
        (
            "Am Morgen lag Nebel über den Feldern, und die Straßen waren leer.",
            "Niemand wusste, wann der Zug kommt.",
            "Der Garten hinter dem Haus war seit Jahren verwildert.",
            "Im Hof spielten Kinder mit einem alten Ball.",
            "Die Glocken läuteten, als der Regen endlich aufhörte.",
            "Auf dem Markt gab es Äpfel, Brot und Honig.",
            "Er schrieb einen langen Brief, den er nie abschickte.",
            "Das Licht in der Küche brannte die ganze Nacht.",
        ),
    ),
    "french": _Language(
        "Lisez le texte suivant.",
        "{name} travaille comme {trade} et occupe la chambre {number}.",
        "Quelle chambre occupe {name} ?",
        "{name} occupe la chambre",
        "boulanger professeur médecin menuisier jardinier juge peintre cuisinier".split(),
        (
            "Le matin, la brume couvrait les champs et les rues étaient vides.",
            "Personne ne savait quand le train viendrait.",
            "Le jardin derrière la maison était à l'abandon depuis des années.",
            "Dans la cour, des enfants jouaient au ballon.",
            "Les cloches sonnaient quand la pluie cessa enfin.",
            "Au marché, on vendait des pommes, du pain et du miel.",
            "Il écrivit une longue lettre qu'il n'envoya jamais.",
            "La lumière de la cuisine resta allumée toute la nuit.",
        ),
    ),
    "spanish": _Language(
        "Lee el siguiente texto.",
        "{name} trabaja como {trade} y tiene la habitación {number}.",
        "¿Qué habitación tiene {name}?",
        "{name} tiene la habitación",
        "panadero profesor médico carpintero jardinero juez pintor cocinero".split(),
        (
            "Por la mañana había niebla sobre los campos y las calles estaban vacías.",
            "Nadie sabía cuándo llegaría el tren.",
            "El jardín detrás de la casa llevaba años abandonado.",
            "En el patio, unos niños jugaban con una pelota vieja.",
            "Las campanas sonaron cuando por fin dejó de llover.",
            "En el mercado vendían manzanas, pan y miel.",
            "Escribió una carta muy larga que nunca envió.",
            "La luz de la cocina estuvo encendida toda la noche.",
        ),
    ),
    "chinese": _Language(
        "请阅读下面的文章。",
        "{name}是一名{trade},住在{number}号房间。",
        "{name}住在几号房间?",
        "{name}住在",
        "面包师 老师 医生 木匠 园丁 法官 画家 厨师".split(),
        (
            "清晨的田野上笼罩着薄雾,街道上空无一人。",
            "没有人知道火车什么时候到。",
            "房子后面的花园已经荒废多年了。",
            "院子里有几个孩子在玩一个旧皮球。",
            "雨终于停了,钟声也响了起来。",
            "市场上卖苹果、面包和蜂蜜。",
            "他写了一封很长的信,却从来没有寄出去。",
            "厨房里的灯亮了一整夜。",
        ),
        "",
    ),
}


def _in_language(language: _Language) -> Callable[[random.Random, int, Count], Made]:
    """Facts about people among other sentences."""

    def made(rng: random.Random, n_tokens: int, count: Count) -> Made:
        asked = []
        people = rng.sample([f"{a} {b}" for a in _FIRST for b in _LAST], 60)

        def sentences() -> Iterator[str]:
            while True:
                if people and rng.random() < 0.1:
                    name, number = people.pop(), str(rng.randrange(100, 1000))
                    asked.append(
                        Asked(language.question.format(name=name), language.prefix.format(name=name), number, 8)
                    )
                    yield language.fact.format(name=name, trade=rng.choice(language.trades), number=number)
                yield rng.choice(language.hay)

        text = _until(n_tokens, count, sentences(), language.space)
        return f"{language.lead}\n{language.space.join(text)}", _asked(rng, asked)

    return made


def listing(rng: random.Random, n_tokens: int, count: Count) -> Made:
    """A numbered list of things and where they are kept."""
    asked = []
    names = _names(rng, "small large old new spare".split(), _COLOURS, _GOODS)

    def lines() -> Iterator[str]:
        for number, name in enumerate(names, 1):
            place = f"{rng.choice(['shelf', 'drawer', 'box', 'cabinet'])} {rng.randrange(10, 1000)}"
            asked.append(Asked(f"Where is the {name} kept?", f"The {name} is kept in", place))
            yield f"{number}. {name}: {place}"

    return "Where things are kept:\n" + "\n".join(_until(n_tokens, count, lines())), _asked(rng, asked)


def instructions(rng: random.Random, n_tokens: int, count: Count) -> Made:
    """Steps of a procedure with settings."""
    asked = []
    parts = _names(
        rng,
        "upper lower inner outer left right front rear main spare".split(),
        "valve,pump,filter,sensor,belt,fan,gauge,nozzle".split(","),
    )
    checks = (
        "Wait until the lamp stops blinking.",
        "Wear gloves.",
        "Do not force it.",
        "Write the time into the log.",
        "If it is warm, let it cool down first.",
        "Ask a second person to watch the display.",
    )

    def steps() -> Iterator[str]:
        for number, part in enumerate(parts, 1):
            setting, unit = rng.randrange(12, 990), rng.choice(["bar", "degrees", "turns", "volts"])
            asked.append(Asked(f"To what is the {part} set?", f"The {part} is set to", f"{setting} {unit}"))
            then = " ".join(rng.sample(checks, rng.randrange(1, 3)))
            yield f"Step {number}: Set the {part} to {setting} {unit}. {then}"

    return "How to start the plant.\n" + "\n".join(_until(n_tokens, count, steps())), _asked(rng, asked)


def keys(rng: random.Random, n_tokens: int, count: Count) -> Made:
    """Long random names, of which each character counts: checksums of files, identifiers, tokens."""
    asked: list[Asked] = []
    stems = _names(rng, "backup report image index table photo model draft".split(), _GOODS, joint="-")
    endings = "tar.gz,csv,png,json,pdf,iso".split(",")

    def lines() -> Iterator[str]:
        for stem in stems:
            name = f"{stem.replace(' ', '-')}.{rng.choice(endings)}"
            draws = (
                lambda: f"{rng.getrandbits(128):032x}",
                lambda: str(uuid.UUID(int=rng.getrandbits(128), version=4)),
                lambda: "".join(rng.choices(string.ascii_letters + string.digits, k=rng.randrange(16, 28))),
            )
            key = draws[style]()
            asked.append(Asked(f"What is the {what} of {name}?", f"The {what} of {name} is", key, 40))
            yield f"{key}  {name}" if rng.random() < 0.3 else f"{name}: {key}"

    style = rng.randrange(3)
    what = ("checksum", "identifier", "access token")[style]
    return f"This is the {what} of each file.\n" + "\n".join(_until(n_tokens, count, lines())), _asked(rng, asked)


KINDS: dict[str, Callable[[random.Random, int, Count], Made]] = {
    "source": source,
    "records": records,
    "logs": logs,
    "table": table,
    "dialogue": dialogue,
    **{name: _in_language(language) for name, language in _LANGUAGES.items()},
    "listing": listing,
    "instructions": instructions,
    "keys": keys,
}
