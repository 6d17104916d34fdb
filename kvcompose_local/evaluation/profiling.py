"""Measures a model's profile over some texts: what each layer keeps when the whole score decides, and the predictor."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from kvcompose_local import profiles
from kvcompose_local.budgets import allocate_tempered
from kvcompose_local.compaction import Policy
from kvcompose_local.engines.patched import PatchedEngine
from kvcompose_local.evaluation.predicting import fit, observe
from kvcompose_local.evaluation.statistics import Statistics
from kvcompose_local.evaluation.tasks import make_item
from kvcompose_local.install.model_files import size_of
from kvcompose_local.profiles import KEEPS, Profile, faded

#: Kinds of text that differ: facts in prose, documents, a conversation, code-like assignments, and such as questions
#: are hard about.
TASKS = ("needles_8", "qa", "recall", "vt", "niah_multikey_3", "niah_multivalue", "niah_single_3", "niah_multiquery")
#: What stands in place of a chat's message.
_GAP = "\x00"
#: Seeds of the evaluation start at 0: a profile must not have seen its texts.
FIRST_SEED = 1_000_000


def measure_profile(
    engine: PatchedEngine,
    model_sha256: str,
    *,
    n_texts: int = 16,
    n_tokens: int = 2048,
    weights: Sequence[float] = (),
    progress: Callable[[int, int, str], None] = lambda _done, _total, _what: None,
) -> Profile:
    """The mean over ``n_texts`` texts of about ``n_tokens`` tokens; layers compete by ``weights`` if there are any.

    engine: uncompressed and empty, with room for a text and its replay; progress gets (done, in all, of what).
    """
    model = engine.model
    head, _, tail = model.render_chat([{"role": "user", "content": _GAP}], add_generation_prompt=True).partition(_GAP)
    budgets, lengths, observed = [], [], []
    for number in range(n_texts):
        progress(number, n_texts, "texts")
        task = TASKS[number % len(TASKS)]
        item = make_item(task, FIRST_SEED + number, n_tokens, lambda text: len(model.tokenize(text)))
        tokens = model.tokenize(head + item.context + "\n\n", add_bos=model.adds_bos)
        policy = Policy.for_cells(len(tokens))
        engine.clear()
        stats = Statistics(engine, tokens, n_scratch=policy.n_scratch, n_lead_in=policy.n_lead_in)
        scores = stats.both
        ones, n_cells = [1] * len(scores), len(tokens) * len(scores)
        budgets.append(
            np.stack(
                [allocate_tempered(scores, ones, int(keep * n_cells), weights=faded(weights, keep)) for keep in KEEPS]
            )
        )
        lengths.append(len(tokens))
        observed.append(observe(stats, item, tail))
    progress(n_texts, n_texts, "texts")
    predictor = fit(observed, lambda done, total: progress(done, total, "heads"))
    n_bytes = size_of(model.path)
    return profiles.average(model.name, model_sha256, budgets, lengths, weights, n_bytes, predictor)
