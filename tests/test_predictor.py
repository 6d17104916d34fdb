"""Predictions of what questions look at, by hand, and what fitting them finds."""

from __future__ import annotations

import numpy as np
import pytest

from kvcompose_local.errors import InvalidInput
from kvcompose_local.evaluation.predicting import Observed, fit
from kvcompose_local.popularity import popularity_of, unpacked
from kvcompose_local.predictor import Predictor, features_of, for_budgets, for_ranks, n_features

RNG = np.random.default_rng(1)


def some_layers(n: int) -> list[np.ndarray]:
    """Two layers of one and two heads."""
    return [RNG.random((heads, n), np.float32) ** 4 for heads in (1, 2)]


def test_a_features_logarithm_is_of_attention_relative_to_its_head() -> None:
    replayed, seen = some_layers(3000), some_layers(3000)
    seen[1][1] = 0  # a head that looked at nothing
    popularity = popularity_of(a + b for a, b in zip(replayed, seen, strict=True))
    rows = np.concatenate([*features_of(replayed, seen, popularity)])
    assert rows.shape == (3000, n_features(3))
    assert rows.dtype == np.float32
    heads = np.concatenate([*replayed, *seen])
    relative = heads / np.maximum(heads.mean(axis=1, keepdims=True), 1e-9)
    expected = np.log(relative.T + 0.02)
    assert rows[:, :6] == pytest.approx(expected, abs=1e-4)
    assert rows[:, 6] == pytest.approx(np.log(popularity), abs=1e-5)
    assert (rows[:, 7] == 1).all()


def test_factors_are_those_of_each_head() -> None:
    replayed, seen = some_layers(1500), some_layers(1500)
    weights = RNG.normal(0, 0.2, (3, n_features(3)))
    popularity = popularity_of(a + b for a, b in zip(replayed, seen, strict=True))
    rows = np.concatenate([*features_of(replayed, seen, popularity)])
    factors = [unpacked(codes) for codes in Predictor(weights.tolist()).packed_factors(replayed, seen)]
    assert [factor.shape for factor in factors] == [(1, 1500), (2, 1500)]
    assert np.concatenate(factors) == pytest.approx(np.exp(weights @ rows.T), rel=1 / 40)
    extreme = Predictor(np.full_like(weights, 1e6).tolist()).packed_factors(replayed, seen)
    assert all(np.isfinite(unpacked(codes)).all() for codes in extreme)
    nothing = [np.zeros((heads, 0), np.float32) for heads in (1, 2)]
    assert [codes.shape for codes in Predictor(weights.tolist()).packed_factors(nothing, nothing)] == [(1, 0), (2, 0)]


def test_ranks_go_by_the_prediction_and_budgets_half_way() -> None:
    scores, factors = np.array([[1, 2]], np.float32), np.array([[4, 0.25]], np.float32)
    assert for_ranks(scores, factors).tolist() == [[4, 0.5]]
    assert for_budgets(scores, factors).tolist() == [[2, 1]]


@pytest.mark.parametrize(
    "weights", [[], [[]], [[0.0] * 3], [[0.0] * 4] * 2, [[0.0, 0.0, 0.0, np.inf]], [[0, 0, 0, 1e300]]], ids=str
)
def test_other_weights_are_refused(weights: list[list[float]]) -> None:
    with pytest.raises(InvalidInput, match="2 H \\+ 2"):
        Predictor(weights)


def test_fitting_finds_by_what_questions_go() -> None:
    """Head 0 looks where head 2 looked in the replay, head 1 nowhere else than before, head 2 at nothing."""
    texts = []
    for n in (4000, 5000):
        replayed, seen = some_layers(n), some_layers(n)
        both = [a + b for a, b in zip(replayed, seen, strict=True)]
        rows = np.concatenate([*features_of(replayed, seen, popularity_of(both))])
        scores = np.concatenate(both)
        looked = np.stack([scores[0] * np.exp(0.8 * rows[:, 2]), 0.1 * scores[1], 0 * scores[2]])
        texts.append(Observed(rows, scores, looked.astype(np.float32)))
    weights = np.array(fit(texts))
    assert weights.shape == (3, n_features(3))
    assert weights[0, 2] == pytest.approx(0.8, abs=0.1)
    assert np.abs(np.delete(weights[0, :6], 2)).max() < 0.1
    assert np.abs(weights[1, :7]).max() < 0.05
    assert (weights[2, :7] == 0).all()
    assert Predictor(weights.tolist()).n_heads == 3
