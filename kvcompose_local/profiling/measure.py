"""Measures a model's profile: what questions about many kinds of text look at, and the scorer that is fitted to it."""

from __future__ import annotations

import hashlib
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from kvcompose_local.composing.fitting import POWER, fit
from kvcompose_local.engines.patched import PatchedEngine
from kvcompose_local.evaluation.tasks import Item, make_item
from kvcompose_local.install.files import own_folder
from kvcompose_local.install.model_files import size_of
from kvcompose_local.profiles import Profile, user_path
from kvcompose_local.profiling.observing import (
    N_ANSWERED,
    N_ASKED,
    TYPICAL_ANSWER,
    Chatter,
    observe,
    observed,
)
from kvcompose_local.profiling.weighing import Losses, layer_weights, losses

#: Different kinds of text, the best known first.
PROFILED_TASKS = (
    *("needles_8", "source", "qa", "records", "recall", "logs", "vt", "table", "niah_multikey_3", "dialogue"),
    *("niah_multivalue", "german", "niah_single_3", "french", "niah_multiquery", "spanish", "chinese", "listing"),
    *("instructions", "keys"),
)
#: Texts have these shares of the wanted length: the cost of age cannot be learnt from texts of one length.
LENGTHS = (1.0, 0.25, 1.0, 0.5)
#: Seeds of the evaluation start at 0: a profile must not have seen its texts.
FIRST_SEED = 1_000_000
#: The kind of a user's own texts.
OWN = "own"
#: The number of texts that cache types are compared on: each type reads them again.
_N_COMPARED, _N_TYPES = 8, 2
#: Fewest tokens of a text.
_SHORTEST = 256
#: The number of texts by which layers are weighed, which are read again: one of each kind, if nobody chose others.
N_WEIGHED = len(PROFILED_TASKS)
#: Tokens of the short read that tells how long all will take, read at once, one by one, and watched.
_TIMED_READ, _TIMED_DECODE, _TIMED_WATCH = 512, 4, 24

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Measurement:
    """A plan of a measurement: the items to ask about, and for each a file for its observations."""

    model: str
    model_sha256: str
    model_bytes: int
    items: tuple[Item, ...]
    files: tuple[Path, ...]

    @property
    def n_done(self) -> int:
        """Texts that an earlier call has measured."""
        return sum(file.exists() for file in self.files)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of the texts, each once."""
        return tuple(dict.fromkeys(item.task for item in self.items))


def plan(
    engine: PatchedEngine,
    model_sha256: str,
    *,
    n_texts: int = 2 * len(PROFILED_TASKS),
    n_tokens: int = 2048,
    tasks: Sequence[str] = PROFILED_TASKS,
    own_texts: Sequence[str] = (),
) -> Measurement:
    """A measurement on ``n_texts`` texts of up to about ``n_tokens`` tokens, ``own_texts`` cut into such first.

    Files stand in the cache folder until all is done, so that another call goes on from them.
    """

    def count(text: str) -> int:
        return len(engine.model.tokenize(text))

    items = [*_own_items(own_texts, n_tokens, count)][:n_texts]
    for number in range(n_texts - len(items)):
        length = max(int(n_tokens * LENGTHS[number % len(LENGTHS)]), _SHORTEST)
        items.append(make_item(tasks[number % len(tasks)], FIRST_SEED + number, length, count))
    folder = user_path(model_sha256).with_suffix(".observed")
    files = [folder / f"{item.task}-{_digest(item.context)}.safetensors" for item in items]
    path = engine.model.path
    return Measurement(engine.model.name, model_sha256, size_of(path), tuple(items), tuple(files))


def seconds_left(engine: PatchedEngine, measurement: Measurement) -> float:
    """About how long :func:`watch` and :func:`lost` will take, told by a short read in the engine's empty cache."""
    texts = [engine.model.tokenize(item.context) for item in measurement.items]
    tokens = max(texts, key=len)[:_TIMED_READ]
    engine.clear()
    engine.decode(tokens[:_TIMED_WATCH])  # memory is mapped, threads start
    engine.clear()

    def watched() -> float:
        started = time.perf_counter()
        with engine.watching(lambda _layer, _weights: None):
            engine.decode(tokens[:_TIMED_WATCH])
        return time.perf_counter() - started

    near = watched()
    engine.clear()
    started = time.perf_counter()
    engine.decode(tokens)
    read = time.perf_counter()
    for token in tokens[:_TIMED_DECODE]:
        engine.decode([token])
        engine.logits()
    decoded = time.perf_counter()
    far = watched()
    engine.clear()
    a_token, an_answer = (read - started) / len(tokens), TYPICAL_ANSWER * (decoded - read) / _TIMED_DECODE

    def of_watching(n: int) -> float:
        a_look = near + (far - near) * n / len(tokens)  # the more cells, the longer
        return n * a_token + N_ANSWERED * an_answer + N_ASKED * 2 * a_look  # a question and its answer

    def of_weighing(n: int) -> float:
        return (n + len(engine.shape.layers) * 3 * TYPICAL_ANSWER) * a_token  # a question is longer than its answer

    lengths = [len(text) for text in texts]
    missing = [n for n, file in zip(lengths, measurement.files, strict=True) if not file.exists()]
    compared = [_N_TYPES * n * a_token for n in missing[: max(_N_COMPARED - measurement.n_done, 0)]]
    return sum(map(of_watching, missing)) + sum(compared) + sum(map(of_weighing, lengths[:N_WEIGHED]))


def watch(
    engine: PatchedEngine,
    measurement: Measurement,
    *,
    beside: Mapping[str, PatchedEngine] | None = None,
    progress: Progress = lambda _done, _total, _what: None,
) -> None:
    """Observe the items of a measurement that are missing.

    engine: uncompressed F16 and empty, with room for a text and its questions; beside: the same of other cache types,
    by their names, which are compared with it; progress gets (done, in all, of what).
    """
    own_folder(measurement.files[0].parent)
    total = len(measurement.files)
    for number, (item, file) in enumerate(zip(measurement.items, measurement.files, strict=True)):
        if not file.exists():
            progress(number, total, "texts")
            part = file.with_suffix(".part")
            observe(Chatter(engine, (beside or {}) if number < _N_COMPARED else {}), item, part)
            part.replace(file)
    progress(total, total, "texts")


def fitted(
    measurement: Measurement,
    *,
    without: str = "",
    progress: Progress = lambda _done, _total, _what: None,
) -> Profile:
    """The profile that is fitted to the observations; ``without`` names a kind of text to leave out."""
    chosen = [f for item, f in zip(measurement.items, measurement.files, strict=True) if item.task != without]
    texts = [observed(file) for file in chosen]
    scorer = fit(texts, power=POWER, progress=lambda done, total: progress(done, total, "layers"))
    costs = {name: float(np.mean([t.kl[name] for t in texts if name in t.kl])) for t in texts for name in t.kl}
    return Profile(
        model=measurement.model,
        model_sha256=measurement.model_sha256,
        model_bytes=measurement.model_bytes,
        n_texts=len(texts),
        n_tokens=sum(text.n_tokens for text in texts),
        kinds=",".join(kind for kind in measurement.kinds if kind != without),
        scorer=scorer,
        kl={name: round(kl, 5) for name, kl in costs.items()},
    )


def lost(
    engine: PatchedEngine,
    measurement: Measurement,
    profile: Profile,
    *,
    progress: Progress = lambda _done, _total, _what: None,
) -> list[tuple[str, Losses]]:
    """Kinds of text, and what the profile's choice of cells loses of a text of each; engine: as :func:`watch` has it.

    Measured once, by the profile that knows all kinds, whichever kind :func:`weighed` leaves out. What an earlier call
    measured of the same profile is read from the observations' folder.
    """
    texts = [*zip(measurement.items, measurement.files, strict=True)][:N_WEIGHED]
    found = []
    for number, (item, file) in enumerate(texts):
        kept = file.with_suffix(f".{profile.scorer.digest}")
        if not kept.exists():
            progress(number, len(texts), "texts again")
            part = file.with_suffix(".part")
            part.write_text(losses(engine, file, profile.scorer).dump())
            part.replace(kept)
        found.append((item.task, Losses.read(kept.read_text())))
    progress(len(texts), len(texts), "texts again")
    return found


def weighed(profile: Profile, texts: Sequence[tuple[str, Losses]], *, without: str = "") -> Profile:
    """The profile with its layers weighed by what is lost of ``texts``, those of the kind ``without`` aside."""
    chosen = [losses_ for kind, losses_ in texts if kind != without]
    return replace(profile, scorer=profile.scorer.weighed(layer_weights(chosen))) if chosen else profile


def forget(measurement: Measurement) -> None:
    """Remove the observations: they are large, and the profile holds what counts."""
    shutil.rmtree(measurement.files[0].parent)


def _own_items(texts: Sequence[str], n_tokens: int, count: Callable[[str], int]) -> Iterator[Item]:
    """A user's texts in parts of about ``n_tokens``, each by itself; no questions come with them."""
    for text in texts:
        part, left, number = "", n_tokens, 0
        for sentence in re.split(r"(?<=\n)|(?<=[.!?] )", text):
            part += sentence
            left -= count(sentence)
            if left <= 0:
                yield Item(OWN, number, part, ())
                part, left, number = "", n_tokens, number + 1
        if count(part) >= _SHORTEST:
            yield Item(OWN, number, part, ())


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
