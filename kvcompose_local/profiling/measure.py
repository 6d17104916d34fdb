"""Measures a model's profile: what questions about many kinds of text look at, and the scorer that is fitted to it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Sequence

from kvcompose_local.composing.fitting import fit
from kvcompose_local.engines.patched import PatchedEngine
from kvcompose_local.evaluation.tasks import Item, make_item
from kvcompose_local.install.files import own_folder
from kvcompose_local.install.model_files import size_of
from kvcompose_local.profiles import Profile, user_path
from kvcompose_local.profiling.observing import observe, observed

#: Kinds of text that differ, the ones that most is known of first.
TASKS = (
    *("needles_8", "source", "qa", "records", "recall", "logs", "vt", "table", "niah_multikey_3", "dialogue"),
    *("niah_multivalue", "german", "niah_single_3", "french", "niah_multiquery", "spanish", "chinese", "listing"),
    "instructions",
)
#: Texts are of these shares of the length that is asked for: what age costs must not be learnt from one length alone.
LENGTHS = (1.0, 0.25, 1.0, 0.5)
#: Seeds of the evaluation start at 0: a profile must not have seen its texts.
FIRST_SEED = 1_000_000
#: What stands in place of a chat's message.
_GAP = "\x00"

Progress = Callable[[int, int, str], None]


def measure_profile(
    engine: PatchedEngine,
    model_sha256: str,
    *,
    n_texts: int = 2 * len(TASKS),
    n_tokens: int = 2048,
    tasks: Sequence[str] = TASKS,
    own_texts: Sequence[str] = (),
    progress: Progress = lambda _done, _total, _what: None,
) -> Profile:
    """The profile that ``n_texts`` texts of up to about ``n_tokens`` tokens give, ``own_texts`` cut into such first.

    engine: uncompressed F16 and empty, with room for a text and its questions; progress gets (done, in all, of what).
    What was seen of a text stands in the cache folder until all of them are done, so that another call goes on there.
    """
    model = engine.model
    head, _, tail = model.render_chat([{"role": "user", "content": _GAP}], add_generation_prompt=True).partition(_GAP)
    items = [*_own_items(own_texts, n_tokens, lambda text: len(model.tokenize(text)))][:n_texts]
    for number in range(n_texts - len(items)):
        length = max(int(n_tokens * LENGTHS[number % len(LENGTHS)]), 256)
        task = tasks[number % len(tasks)]
        items.append(make_item(task, FIRST_SEED + number, length, lambda text: len(model.tokenize(text))))
    folder = user_path(model_sha256).with_suffix(f".{n_tokens}.texts")
    own_folder(folder)
    files = []
    for number, item in enumerate(items):
        progress(number, n_texts, "texts")
        files.append(folder / f"{item.task}-{item.seed}.safetensors")
        if not files[-1].exists():
            engine.clear()
            part = files[-1].with_suffix(".part")
            observe(engine, item, head, tail, part)
            part.replace(files[-1])
    progress(n_texts, n_texts, "texts")
    texts = [observed(file) for file in files]
    scorer = fit(texts, progress=lambda done, total: progress(done, total, "layers"))
    seen = sum(text.n_tokens for text in texts)
    kinds = ",".join(dict.fromkeys(item.task for item in items))
    profile = Profile(model.name, model_sha256, size_of(model.path), len(texts), seen, kinds, scorer)
    shutil.rmtree(folder)
    return profile


def _own_items(texts: Sequence[str], n_tokens: int, count: Callable[[str], int]) -> Iterator[Item]:
    """A user's texts in parts of about ``n_tokens``, each by itself; no questions come with them."""
    for text in texts:
        part, left, number = "", n_tokens, 0
        for sentence in re.split(r"(?<=\n)|(?<=[.!?] )", text):
            part += sentence
            left -= count(sentence)
            if left <= 0:
                yield Item("own", number, part, ())
                part, left, number = "", n_tokens, number + 1
        if count(part) >= 256:
            yield Item("own", number, part, ())
