"""Scores, budgets and kept sets against the published implementation (kvpress 0.5.5) on random input."""

from pathlib import Path

import numpy as np
import pytest

from kvcompose_local.composing.budgets import allocate_layer_budgets
from kvcompose_local.composing.scores import token_scores
from kvcompose_local.composing.selection import select_composites

REFERENCE = np.load(Path(__file__).parent.parent / "data" / "kvcompose_reference_cases.npz")
CASES = sorted(name.removesuffix("/budgets") for name in REFERENCE.files if name.endswith("/budgets"))


def test_all_reference_cases_are_here():
    assert len(CASES) == 88


@pytest.mark.parametrize("case", CASES)
def test_matches_the_reference(case):
    config, keep, mean, first_layer_largest = case.split("/")
    expected = {part: REFERENCE[f"{case}/{part}"] for part in ("scores", "budgets", "kept_mask")}

    scores = token_scores(
        REFERENCE[f"{config}/attention_max"],
        int(REFERENCE[f"{config}/n_kv_heads"]),
        add_mean_across_heads=mean == "mean1",
    )
    budgets = allocate_layer_budgets(
        scores,
        float(keep.removeprefix("keep")),
        first_layer_largest=first_layer_largest == "first_layer_largest1",
        min_per_layer=1,
    )
    kept = np.zeros(scores.shape, bool)
    for layer, tokens in enumerate(select_composites(scores, budgets)):
        np.put_along_axis(kept[layer], tokens, True, axis=1)

    np.testing.assert_allclose(scores, expected["scores"], rtol=0, atol=1e-6)
    assert budgets.tolist() == expected["budgets"].tolist()
    np.testing.assert_array_equal(np.packbits(kept, axis=-1), expected["kept_mask"])
