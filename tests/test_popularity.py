"""Popularity of tokens, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from kvcompose_local.popularity import for_budgets, for_ranks, packed, popularity_of, sharpness, unpacked


def test_each_layer_counts_as_much_as_any_other_however_strong_its_scores_are() -> None:
    weak, strong = np.array([[1, 2, 3, 2]], np.float32) / 1024, np.array([[4, 2, 1, 1], [0, 0, 0, 8]], np.float32)
    relative = [weak[0] / weak.mean(), (strong[0] / 2 + strong[1] / 2) / 2]
    total = relative[0] + relative[1]
    assert popularity_of([weak, strong]) == pytest.approx(total / np.median(total))
    assert popularity_of([weak * 512, strong]) == pytest.approx(popularity_of([weak, strong]))


def test_tokens_that_nobody_looks_at_have_some_popularity_and_none_counts_where_there_is_no_attention() -> None:
    found = popularity_of([np.array([[0, 1, 1, 1, 1e9]], np.float32)])
    assert 0 < found[0] < found[1] == 1 < found[4] < np.inf
    assert popularity_of([np.zeros((2, 3), np.float32)]).tolist() == [1, 1, 1]
    assert popularity_of([np.array([[0, 0, 0, 1]], np.float32)]).tolist() == [1, 1, 1, 1]
    assert popularity_of([np.zeros((2, 0), np.float32)]).shape == (0,)


def test_a_head_is_sharp_that_looks_at_few_tokens() -> None:
    scores = np.array([[1, 1, 1, 1], [3, 2, 2, 5], [0, 1, 1, 10], [0, 0, 0, 0]], np.float32)
    assert sharpness(scores).tolist() == [[0], [pytest.approx(2 * (1 - 2.5 / 3))], [1], [0]]
    assert sharpness(np.zeros((2, 0), np.float32)).tolist() == [[0], [0]]


def test_popularity_counts_for_ranks_as_far_as_a_head_is_sharp_and_for_budgets_within_bounds() -> None:
    scores, popularity = np.ones((3, 2), np.float32), np.array([0.25, 4], np.float32)
    sharp = np.array([[0], [0.5], [1]], np.float32)
    assert for_ranks(scores, popularity, sharp).tolist() == [[1, 1], [0.5, 2], [0.25, 4]]
    assert for_budgets(scores, popularity) == pytest.approx(np.array([[0.7, 1.5]] * 3))


def test_a_byte_holds_a_popularity_within_a_fortieth() -> None:
    popularity = np.geomspace(0.005, 200, 1000, dtype=np.float32).reshape(2, 500)
    again = unpacked(packed(popularity))
    assert again.dtype == np.float32
    assert again == pytest.approx(popularity, rel=1 / 40)
    assert unpacked(packed(np.ones(1, np.float32))).tolist() == [1]
    assert packed(unpacked(np.arange(256, dtype=np.uint8))).tolist() == list(range(256))
    assert packed(np.array([0, 1e30], np.float32)).tolist() == [0, 255]
