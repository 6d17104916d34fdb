"""The scorer, its fit, and the choice of rows: pure arrays."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from kvcompose_local.composing.choice import A_NAT, PINNED, competing, logarithms_of, ranked
from kvcompose_local.composing.fitting import Observed, fit, poisson
from kvcompose_local.composing.scorer import BOUNDS, Scorer
from kvcompose_local.composing.scores import as_layers
from kvcompose_local.composing.selection import select_composites
from kvcompose_local.errors import InvalidInput

RNG = np.random.default_rng(0)


def scorer(*, age: float = 0.0, position: float = 0.0, n_layers: int = 1, furthest: int = 100) -> Scorer:
    """Two heads of one number each: head 0 goes by its key, head 1 by its value."""
    weights = np.array([[1.0, 0.0], [0.0, 2.0]], np.float16)
    places = np.array([[age, position, -1.0]] * 2, np.float32)
    return Scorer((weights,) * n_layers, (places,) * n_layers, furthest)


def test_scores_are_linear_in_a_heads_own_key_and_value() -> None:
    keys, values = RNG.random((2, 5, 1), np.float32), RNG.random((2, 5, 1), np.float32)
    found = scorer().scores(0, keys, values, 7)
    np.testing.assert_allclose(found, [keys[0, :, 0] - 1, 2 * values[1, :, 0] - 1], rtol=1e-6)
    assert found.dtype == np.float32


def test_places_count_by_their_logarithms_up_to_the_furthest() -> None:
    by_place = scorer(age=-0.5, position=0.25)
    none = np.zeros((2, 3, 1), np.float32)
    np.testing.assert_allclose(by_place.scores(0, none, none, 3)[0], 0.25 * np.log([4, 5, 6]) - 1, rtol=1e-6)
    np.testing.assert_allclose(by_place.scores(0, none, none, 400)[0], [0.25 * np.log(100) - 1] * 3, rtol=1e-6)
    origins = np.array([[0, 450, 499], [499, 0, 1]])
    ages = by_place.ages(0, origins, 500)
    np.testing.assert_allclose(ages[0], -0.5 * np.log([100, 50, 1]), rtol=1e-6)
    np.testing.assert_allclose(by_place.ages(0, origins[1], 500)[0], -0.5 * np.log([1, 100, 100]), rtol=1e-6)


def test_no_score_is_beyond_the_bounds() -> None:
    huge = np.full((2, 2, 1), 1e6, np.float32)
    assert (scorer().scores(0, huge, -huge, 0) == [[BOUNDS[1]] * 2, [BOUNDS[0]] * 2]).all()


def test_a_scorer_of_other_heads_is_refused() -> None:
    scorer(n_layers=2).check([2, 2])
    with pytest.raises(InvalidInput, match="measure it again"):
        scorer(n_layers=2).check([2, 3])
    with pytest.raises(InvalidInput, match="measure it again"):
        scorer().scores(0, np.zeros((2, 3, 2), np.float32), np.zeros((2, 3, 1), np.float32), 0)
    good = scorer()
    for wrong in (
        ((), (), 1),
        (good.weights, (), 1),
        (good.weights, (np.zeros((3, 3), np.float32),), 1),
        (good.weights, (np.full((2, 3), np.nan, np.float32),), 1),
        ((np.full((2, 2), np.inf, np.float16),), good.places, 1),
        (good.weights, good.places, 0),
    ):
        with pytest.raises(InvalidInput):
            Scorer(*wrong)


def test_a_digest_names_what_counts() -> None:
    assert scorer().digest == scorer().digest
    others = [scorer(age=1.0), scorer(position=1.0), scorer(furthest=99), scorer(n_layers=2)]
    assert len({scorer().digest, *(other.digest for other in others)}) == 5


def observed(seed: int, n: int, truth: Scorer) -> Observed:
    """A text of which questions look at what a scorer says, give or take."""
    rng = np.random.default_rng(seed)
    keys = rng.standard_normal((2, n, 1)).astype(np.float32)
    values = rng.standard_normal((2, n, 1)).astype(np.float32)
    logarithms = truth.scores(0, keys, values, 0) + truth.ages(0, np.arange(n), n)
    looked = (np.exp(logarithms) * rng.gamma(4, 0.25, logarithms.shape)).astype(np.float32)
    return Observed([keys], [values], [looked], n)


def test_a_fit_finds_what_made_the_attention() -> None:
    truth = scorer(age=-0.4, position=-0.2, furthest=2000)
    found = fit([observed(seed, n, truth) for seed, n in enumerate((500, 2000, 1000, 2000))], ridge=1e-5)
    np.testing.assert_allclose(found.weights[0].astype(np.float32), truth.weights[0].astype(np.float32), atol=0.1)
    np.testing.assert_allclose(found.places[0][:, :2], truth.places[0][:, :2], atol=0.1)
    assert found.furthest == 2000


def test_a_fit_to_a_power_gives_its_root() -> None:
    truth = scorer(age=-0.4, position=-0.2, furthest=2000)
    texts = [observed(seed, n, truth) for seed, n in enumerate((500, 2000, 1000, 2000))]
    powers = [replace(text, looked=[looked**1.5 for looked in text.looked]) for text in texts]
    found = fit(powers, ridge=1e-5, power=1.5)
    np.testing.assert_allclose(found.weights[0].astype(np.float32), truth.weights[0].astype(np.float32), atol=0.1)
    np.testing.assert_allclose(found.places[0][:, :2], truth.places[0][:, :2], atol=0.1)
    unseen = replace(texts[0], looked=[texts[0].looked[0] * 0])
    assert (fit([unseen], power=1.5).scores(0, unseen.keys[0], unseen.values[0], 0) == BOUNDS[0]).all()


def test_a_head_that_nobody_looks_at_gets_the_lowest_score() -> None:
    text = observed(0, 300, scorer())
    nothing = Observed(text.keys, text.values, [text.looked[0] * np.float32([[1], [0]])], 300)
    found = fit([nothing]).scores(0, text.keys[0], text.values[0], 0)
    assert (found[1] == BOUNDS[0]).all()
    assert (found[0] > BOUNDS[0]).all()


def test_the_regression_is_where_its_slope_is_zero() -> None:
    x = np.concatenate([RNG.standard_normal((400, 3)), np.ones((400, 1))], axis=1).astype(np.float32)
    y = RNG.poisson(np.exp(x @ np.float32([0.5, -1, 0, 0.3]))).astype(np.float32)
    b = poisson(x, y, 0.0)
    np.testing.assert_allclose(x.T @ (y - np.exp(x @ b)) / y.sum(), 0, atol=1e-3)


@pytest.mark.parametrize("share", [0.002, 0.02])
def test_the_regression_stands_tokens_far_from_all_others(share: float) -> None:
    """A head's sinks: few tokens with huge keys, which get much attention, but not exponentially much."""
    x = RNG.standard_normal((6000, 40)).astype(np.float32)
    x[:: round(1 / share)] += 15 * RNG.standard_normal(40).astype(np.float32)
    y = np.exp(x @ (0.05 * RNG.standard_normal(40)).astype(np.float32) - 8)
    y[:: round(1 / share)] = 0.05
    x = np.concatenate([(x - x.mean(axis=0)) / x.std(axis=0), np.ones((6000, 1))], axis=1).astype(np.float32)
    b = poisson(x, y.astype(np.float32), 0.003)
    expected = np.exp(x @ b)
    assert expected.max() < 1
    held = 0.003 * np.append(b[:-1], 0)
    np.testing.assert_allclose(x.T @ (y - expected) / y.sum() - held, 0, atol=2e-3)


@given(arrays(np.uint16, st.tuples(st.integers(1, 3), st.integers(0, 9)), elements=st.integers(0, 64000)))
def test_ranks_are_those_of_the_published_selection(levels: np.ndarray) -> None:
    """Best first, of equal ones the lower row: as select_composites has them."""
    (order,), (worth,) = ranked([(levels[:, :4], levels[:, 4:])])
    n = levels.shape[1]
    expected = select_composites([-levels.astype(np.float32)], [n])[0]
    np.testing.assert_array_equal(order, expected)
    sorted_ = np.sort(logarithms_of(levels).astype(np.float64), axis=1)[:, ::-1]
    np.testing.assert_allclose(worth, np.exp(sorted_ / 2).mean(axis=0), rtol=1e-4)
    assert (np.diff(worth) <= 0).all()
    assert as_layers([worth[None]])


def test_pinned_tokens_compete_above_all_and_age_below() -> None:
    pinned = np.zeros(10, bool)
    pinned[3] = True
    scores, origins = np.full((2, 3), BOUNDS[1], np.float16), np.array([[3, 4, 9], [0, 3, 9]])
    found = competing(scorer(age=-1.0), 0, scores, origins, 10, pinned)
    best = (PINNED - BOUNDS[1]) * A_NAT
    assert found[0, 0] == found[1, 1] == 0 < found[0, 2] == best < found[0, 1] < found[1, 0]
    assert (competing(None, 0, scores, origins, 10, np.zeros(10, bool)) == best).all()
    assert logarithms_of(found)[0].tolist() == [PINNED, pytest.approx(5 - np.log(6), abs=1 / A_NAT), BOUNDS[1]]


def test_what_is_not_a_number_competes_below_all() -> None:
    scores = np.array([[np.nan, -np.inf, np.inf, -50, 0]], np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = competing(None, 0, scores, np.arange(5), 5, np.zeros(5, bool))
    assert logarithms_of(found).tolist() == [[BOUNDS[0], BOUNDS[0], BOUNDS[1], BOUNDS[0], 0]]
