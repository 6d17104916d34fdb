"""RULER-style tasks, built from a seed for a model's own tokenizer.

After arXiv 2404.06654, without its downloads: the haystack is public-domain prose, questions about documents are
templated. Every item is a context, which is read and compressed first, and questions that come afterwards, each with
the beginning of its answer.
"""

from __future__ import annotations

import itertools
import random
import re
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from kvcompose_local.errors import InvalidInput
from kvcompose_local.evaluation.kinds import KINDS

ADJECTIVES = (
    "silver quiet amber hollow brisk velvet rusty lunar crimson gentle frozen sandy nimble dusty golden pale sturdy "
    "curious mellow stormy bitter humble vivid ancient"
).split()
NOUNS = (
    "otter lantern harbour falcon meadow anvil compass willow beacon thistle copper marble raven glacier orchard "
    "saddle tunnel violin walnut canyon magnet pebble kettle parrot"
).split()
NOISE = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)
SYLLABLES = "ba ce di fo gu ha ji ko lu me na pi ro su ta ve wo xi yu zo".split()


@dataclass(frozen=True)
class Question:
    """A question about the context, the beginning of its answer, and what the answer must contain."""

    text: str
    prefix: str
    references: tuple[str, ...]
    max_tokens: int

    def score(self, answer: str) -> float:
        """The share of the references that the answer names, whatever their case."""
        return sum(r.lower() in answer.lower() for r in self.references) / len(self.references)


@dataclass(frozen=True)
class Item:
    """One context and its questions."""

    task: str
    seed: int
    context: str
    questions: tuple[Question, ...]


@cache
def prose() -> tuple[str, ...]:
    """The sentences of the haystack."""
    text = (Path(__file__).parent / "prose.txt").read_text(encoding="utf-8")
    return tuple(s for s in re.split(r"(?<=[.!?])\s+", text) if 30 < len(s) < 400)


class _Writer:
    """Draws the parts of an item, and fills a haystack up to a number of tokens."""

    def __init__(self, seed: str, count_tokens: Callable[[str], int], n_tokens: int) -> None:
        self.random = random.Random(seed)
        self.count = count_tokens
        self.n_tokens = n_tokens

    def keys(self, n: int) -> list[str]:
        pairs = [f"{a}-{b}" for a in ADJECTIVES for b in NOUNS]
        more = [f"{pair}-{i}" for i in range(2, -(-n // len(pairs)) + 1) for pair in pairs]  # for very long texts
        return self.random.sample(pairs + more, n)

    def number(self) -> str:
        return str(self.random.randrange(10**6, 10**7))

    def uuid(self) -> str:
        return str(uuid.UUID(int=self.random.getrandbits(128), version=4))

    def prose(self) -> Callable[[int], str]:
        """The i-th sentence from a random place of the book on, which begins again at its end."""
        sentences = prose()
        start = self.random.randrange(len(sentences))
        return lambda i: sentences[(start + i) % len(sentences)]

    def fill(self, hay: Callable[[int], str], needles: Sequence[str], sep: str = " ") -> str:
        """Needles spread over sentences ``hay(0)``, ``hay(1)``, … until the number of tokens is reached."""
        left = self.n_tokens - sum(self.count(needle) for needle in needles)
        sentences: list[str] = []
        while left > 0:
            sentences.append(hay(len(sentences)))
            left -= self.count(sentences[-1] + sep)
        # One needle in each part of equal length, at a random place inside it.
        places = [int((i + self.random.random()) * len(sentences) / len(needles)) for i in range(len(needles))]
        for place, needle in sorted(zip(places, needles, strict=True), reverse=True):
            sentences.insert(place, needle)
        return sep.join(sentences)


def _needle(key: str, value: str, kind: str = "number") -> str:
    return f"One of the special magic {kind}s for {key} is: {value}."


def _ask_needle(keys: Sequence[str], values: Sequence[str], kind: str, max_tokens: int) -> Question:
    plural = len(values) > 1
    names = ", ".join(keys)
    what = f"What are all the special magic {kind}s" if plural else f"What is the special magic {kind}"
    begin = f"The special magic {kind}s for {names} are" if plural else f"The special magic {kind} for {names} is"
    return Question(f"{what} for {names} mentioned in the text?", begin, tuple(values), max_tokens)


def _memorise(kind: str) -> str:
    return (
        f"Some special magic {kind}s are hidden within the following text. Make sure to memorize them. I will quiz "
        f"you about the {kind}s afterwards.\n"
    )


def _niah(hay: str, n_keys: int, n_values: int, n_asked: int, kind: str) -> Callable[[_Writer], Item]:
    """A needle task; several questions about one text where the original has one, each about another key."""

    def make(w: _Writer) -> Item:
        draw = w.uuid if kind == "uuid" else w.number
        n_needles = n_keys
        if hay == "needles":  # as many as fit
            name = w.uuid() if kind == "uuid" else "silver-otter"
            n_needles = max(8, w.n_tokens // w.count(_needle(name, draw(), kind) + " "))
        names = [w.uuid() for _ in range(n_needles)] if (hay, kind) == ("needles", "uuid") else w.keys(n_needles)
        facts = {name: [draw() for _ in range(n_values)] for name in names}
        needles = [_needle(name, value, kind) for name, values in facts.items() for value in values]
        w.random.shuffle(needles)
        if hay == "needles":
            context = "\n".join(needles)
        elif hay == "noise":
            context = w.fill(lambda i: NOISE[i % len(NOISE)], needles)
        else:
            context = w.fill(w.prose(), needles)
        asked = w.random.sample(names, n_asked)
        values = [value for name in asked for value in facts[name]]
        length = (26 if kind == "uuid" else 10) * len(values) + 14
        return Item("", 0, _memorise(kind) + context, (_ask_needle(asked, values, kind, length),))

    return make


def _variables(w: _Writer) -> Item:
    """Chains of assignments in noise: which variables hold a value?"""
    names = ["".join(w.random.choices("ABCDEFGHJKLMNPQRSTUVWXYZ", k=5)) for _ in range(5)]
    value = w.random.randrange(10000, 100000)
    chain = [f"VAR {names[0]} = {value}."] + [f"VAR {new} = VAR {old}." for old, new in itertools.pairwise(names)]
    text = w.fill(lambda i: NOISE[i % len(NOISE)], chain)
    question = Question(
        f"Which variables are assigned the value {value}, directly or through other variables? Name all five.",
        f"The five variables that hold the value {value} are:",
        tuple(names),
        40,
    )
    return Item(
        "", 0, "Memorize and track the chain of variable assignments in the following text.\n" + text, (question,)
    )


@cache
def _vocabulary() -> tuple[str, ...]:
    words = {word.lower() for sentence in prose() for word in re.findall(r"\b[a-z]{4,9}\b", sentence)}
    return tuple(sorted(words))


def _common_words(w: _Writer) -> Item:
    """A numbered list of words: which ten occur most?"""
    often, seldom = (30, 3) if w.n_tokens >= 4096 else (6, 1)
    words = w.random.sample(_vocabulary(), len(_vocabulary()))
    common, others = words[:10], iter(words[10:])
    listed = common * often
    size = w.count("\n".join(f"{i + 100}. {word}" for i, word in enumerate(listed)))
    while size < w.n_tokens:
        word = next(others)
        listed += [word] * seldom
        size += seldom * w.count(f"\n250. {word}")
    w.random.shuffle(listed)
    text = "\n".join(f"{i}. {word}" for i, word in enumerate(listed, 1))
    question = Question(
        "What are the 10 most common words in the list?",
        "The 10 words that appear most often in the list are:",
        tuple(common),
        60,
    )
    return Item(
        "", 0, "Below is a numbered list of words. Some words appear more often than others.\n" + text, (question,)
    )


def _frequent_words(w: _Writer) -> Item:
    """Made-up words, Zipf-distributed: which three are the most frequent after the first?"""
    words = ["".join(w.random.choices(SYLLABLES, k=3)) for _ in range(200)]
    words = list(dict.fromkeys(words))
    weights = [rank**-2.0 for rank in range(1, len(words) + 1)]
    coded: list[str] = []
    size = 0
    while size < w.n_tokens:
        coded += w.random.choices(words, weights, k=20)
        size += w.count(" ".join(coded[-20:]) + " ")
    ranked = sorted(set(coded), key=lambda word: (-coded.count(word), words.index(word)))
    question = Question(
        f"Not counting {ranked[0]}, what are the three most frequent words in the coded text?",
        f"Not counting {ranked[0]}, the three most frequent words are:",
        tuple(ranked[1:4]),
        30,
    )
    return Item(
        "",
        0,
        "Read the following coded text and keep track of how often each word appears.\n" + " ".join(coded),
        (question,),
    )


PLACES = "Lisbon Oslo Vienna Prague Dublin Athens Warsaw Helsinki Madrid Budapest Zagreb Riga".split()
TRADES = "painter baker surgeon pilot carpenter lawyer violinist chemist tailor farmer sailor teacher".split()
FIRST = "Clara Edwin Nora Felix Ruth Oscar Ida Hugo Vera Bruno Alma Leo".split()
LAST = "Hartmann Okafor Lindqvist Moreau Castell Whitby Novak Ferrer Tanaka Brandt Osei Kowalski".split()


def _documents(w: _Writer) -> Item:
    """Short documents about people in prose: a question about one of them."""
    people = w.random.sample([f"{a} {b}" for a in FIRST for b in LAST], 8)
    sentences = w.prose()
    documents, facts = [], {}
    for i, person in enumerate(people):
        place, trade = w.random.choice(PLACES), w.random.choice(TRADES)
        facts[person] = place
        documents.append(f"{person} worked as a {trade} and was born in {place}.")
        documents[-1] = f"\nDocument {i + 1}: {documents[-1]}"
    text = w.fill(sentences, documents)
    person = w.random.choice(people)
    question = Question(f"In which city was {person} born?", f"{person} was born in", (facts[person],), 8)
    return Item("", 0, "Read the following documents; you will be asked about them.\n" + text, (question,))


def _many_needles(w: _Writer) -> Item:
    """Eight needles in prose, and a question about each: the texts that the method was developed on."""
    facts = {key: w.number() for key in w.keys(8)}
    sentences = w.prose()
    text = w.fill(sentences, [f"The special magic number for {k} is: {v}." for k, v in facts.items()])
    questions = tuple(
        Question(f"What is the special magic number for {k}?", f"The special magic number for {k} is:", (v,), 12)
        for k, v in facts.items()
    )
    return Item("", 0, text, questions)


ABOUT_ME = {
    "name of my cat": "Biscuit Pepper Shadow Ginger Pickles Smokey".split(),
    "street I live in": "Elm Street,Harbour Road,Mill Lane,Castle Avenue,Orchard Way,Station Road".split(","),
    "instrument I play": "cello clarinet trombone mandolin accordion oboe".split(),
    "city my sister lives in": PLACES,
    "food I cannot eat": "peanuts shellfish celery mustard strawberries mushrooms".split(),
    "colour of my bicycle": "orange purple turquoise yellow crimson silver".split(),
    "trade of my father": TRADES,
    "day of my next appointment": "Monday Tuesday Wednesday Thursday Friday Saturday".split(),
}


def _recall(w: _Writer) -> Item:
    """A conversation in which facts are told in its first half, and asked after all the talk of the second."""
    facts = {what: w.random.choice(values) for what, values in ABOUT_ME.items()}
    told = [
        f"User: By the way, the {what} is {value}.\nAssistant: I will remember that." for what, value in facts.items()
    ]
    sentences = w.prose()

    def talk(i: int) -> str:
        return f"User: {sentences(2 * i)}\nAssistant: {sentences(2 * i + 1)}"

    w.n_tokens, whole = w.n_tokens // 2, w.n_tokens
    first = w.fill(talk, told, "\n")
    w.n_tokens = whole - w.count(first)
    n_said = first.count("User:")
    second = w.fill(lambda i: talk(n_said + i), [], "\n")
    questions = tuple(
        Question(f"What did I say is the {what}?", f"You said that the {what} is", (value,), 8)
        for what, value in facts.items()
    )
    return Item("", 0, f"This is our conversation so far.\n{first}\n{second}", questions)


def _of_kind(kind: str) -> Callable[[_Writer], Item]:
    """A text of :mod:`kinds`, and some questions about it."""

    def make(w: _Writer) -> Item:
        text, asked = KINDS[kind](w.random, w.n_tokens, w.count)
        return Item("", 0, text, tuple(Question(a.question, a.prefix, (a.reference,), a.max_tokens) for a in asked))

    return make


TASKS: dict[str, Callable[[_Writer], Item]] = {
    "niah_single_1": _niah("noise", 1, 1, 1, "number"),
    "niah_single_2": _niah("prose", 1, 1, 1, "number"),
    "niah_single_3": _niah("prose", 1, 1, 1, "uuid"),
    "niah_multikey_1": _niah("prose", 4, 1, 1, "number"),
    "niah_multikey_2": _niah("needles", 0, 1, 1, "number"),
    "niah_multikey_3": _niah("needles", 0, 1, 1, "uuid"),
    "niah_multivalue": _niah("prose", 1, 4, 1, "number"),
    "niah_multiquery": _niah("prose", 4, 1, 4, "number"),
    "vt": _variables,
    "cwe": _common_words,
    "fwe": _frequent_words,
    "qa": _documents,
    "needles_8": _many_needles,
    "recall": _recall,
    **{kind: _of_kind(kind) for kind in KINDS},
}


def make_item(task: str, seed: int, n_tokens: int, count_tokens: Callable[[str], int]) -> Item:
    """The item of a task, seed and length; the same for every method and budget.

    n_tokens: about how long the context is, as ``count_tokens`` counts. Raises InvalidInput for an unknown task or
    fewer than 256 tokens.
    """
    if task not in TASKS:
        raise InvalidInput(f"there is no task {task}: {', '.join(TASKS)}")
    if n_tokens < 256:
        raise InvalidInput(f"a context needs at least 256 tokens, not {n_tokens}")
    made = TASKS[task](_Writer(f"{task}/{seed}", count_tokens, n_tokens))
    return Item(task, seed, made.context, made.questions)
