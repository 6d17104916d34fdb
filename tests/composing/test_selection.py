import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from kvcompose_local.composing.budgets import allocate_layer_budgets
from kvcompose_local.composing.selection import select_composites
from kvcompose_local.errors import InvalidInput

SCORES = np.array([[[1, 8, 4], [4, 1, 4]], [[9, 0, 2], [2, 1, 1]]], np.float32)  # L=2, H=2, T=3
COARSE = st.integers(-3, 3).map(lambda eighths: eighths / 8)  # many ties


@st.composite
def scores_and_budgets(draw):
    shapes = draw(st.lists(st.tuples(st.integers(1, 3), st.integers(0, 8)), min_size=1, max_size=4))
    scores = [draw(arrays(np.float32, shape, elements=COARSE)) for shape in shapes]
    return scores, [draw(st.integers(0, n_tokens)) for _, n_tokens in shapes]


def test_hand_worked():
    first, second = select_composites(SCORES, [2, 1])
    assert first.tolist() == [[1, 2], [0, 2]]  # of the equal 4s the lower index is first
    assert second.tolist() == [[0], [0]]
    assert first.dtype == second.dtype == np.int64


@given(scores_and_budgets())
def test_equals_the_naive_sort(case):
    scores, budgets = case
    selection = select_composites(scores, budgets)
    assert len(selection) == len(scores)
    for tokens, values, n_kept in zip(selection, scores, budgets, strict=True):
        n_tokens = values.shape[1]
        expected = [sorted(range(n_tokens), key=lambda t, head=head: (-head[t], t))[:n_kept] for head in values]
        assert tokens.shape == (values.shape[0], n_kept)
        assert tokens.tolist() == expected


def test_equals_a_stable_sort_of_many_tokens():
    scores = np.random.default_rng(0).normal(size=(2, 3, 5000)).astype(np.float16)  # some ties
    expected = np.argsort(-scores, axis=2, kind="stable")
    for n_kept in (1, 4999, 5000):
        selection = select_composites(scores, [n_kept, n_kept])
        np.testing.assert_array_equal(selection, expected[:, :, :n_kept])


@given(scores_and_budgets())
def test_indices_are_unique_and_in_range(case):
    scores, budgets = case
    for tokens, values in zip(select_composites(scores, budgets), scores, strict=True):
        assert ((tokens >= 0) & (tokens < values.shape[1])).all()
        assert all(len(set(head.tolist())) == head.size for head in tokens)


@given(scores_and_budgets())
def test_keep_1_keeps_every_token(case):
    scores, _ = case
    for tokens, values in zip(select_composites(scores, allocate_layer_budgets(scores, 1)), scores, strict=True):
        np.testing.assert_array_equal(np.sort(tokens, axis=1), np.tile(np.arange(values.shape[1]), (len(values), 1)))


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.1, 0.37, 0.5, 0.9, 1.0]))
def test_permuting_tokens_permutes_the_selection(seed, keep_ratio):
    random = np.random.default_rng(seed)
    scores = random.permutation(3 * 2 * 40).reshape(3, 2, 40).astype(np.float32)  # distinct
    order = random.permutation(40)  # token order[t] moves to t
    budgets = allocate_layer_budgets(scores, keep_ratio)
    moved_budgets = allocate_layer_budgets(scores[:, :, order], keep_ratio)
    assert moved_budgets.tolist() == budgets.tolist()
    for tokens, moved in zip(
        select_composites(scores, budgets), select_composites(scores[:, :, order], budgets), strict=True
    ):
        np.testing.assert_array_equal(order[moved], tokens)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_refuses_non_finite_scores(bad):
    scores = SCORES.copy()
    scores[0, 1, 1] = bad
    with pytest.raises(InvalidInput, match="NaN or infinite"):
        select_composites(scores, [1, 1])


@pytest.mark.parametrize("budgets", [[1], [1, 1, 1], [4, 0], [-1, 1], [1.0, 1.0], [[1, 1]], 1])
def test_refuses_wrong_budgets(budgets):
    with pytest.raises(InvalidInput):
        select_composites(SCORES, budgets)
