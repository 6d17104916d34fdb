"""Scores of cells, against what a compaction is told of them by hand."""

from __future__ import annotations

import numpy as np
import pytest

from kvcompose_local.cell_scores import N_UNSEEN, PINNED, CellScores
from kvcompose_local.errors import InvalidInput
from kvcompose_local.interfaces import CacheLayout, LayerShape
from kvcompose_local.popularity import ONE, packed, popularity_of, unpacked
from kvcompose_local.predictor import Predictor

LAYERS = (LayerShape(0, 2, 1, 64, 0), LayerShape(1, 4, 2, 128, 0))
NONE_PINNED = np.zeros(6, bool)
POPULARITY = packed(np.array([1, 0.5, 1, 4, 1, 1], np.float32))


def in_all_heads(codes: np.ndarray) -> list[np.ndarray]:
    return [np.tile(codes, (layer.n_kv_heads, 1)) for layer in LAYERS]


def weights(n_heads: int, *values: float) -> np.ndarray:
    """Of one query, the same in all heads: exact in every format that they are kept in."""
    return np.tile(np.array(values, np.float32), (n_heads, 1, 1))


def after_a_compaction() -> CellScores:
    """Two composed cells and a tail of two in each layer, made of eight live ones."""
    scores = CellScores(LAYERS)
    for i, layer in enumerate(LAYERS):
        scores.seen.update(i, weights(layer.n_heads, 0, 0.5, 0, 0.25, 0, 0, 0.125, 0), slice(None))
        scores.replayed.update(i, weights(layer.n_heads, 0, 0, 0.5, 0.5, 0, 0.125), slice(None))
    selection = [np.array([[3, 1]], np.uint16), np.array([[3, 1], [2, 5]], np.uint16)]
    scores.keep(selection, CacheLayout((0, 0), 8, 92, 8), NONE_PINNED, in_all_heads(POPULARITY), reserve=4)
    return scores


def test_a_live_cell_counts_with_its_replay_and_what_was_seen() -> None:
    scores = CellScores(LAYERS)
    scores.seen.update(1, weights(4, 0.5, 0.25), slice(None))
    scores.replayed.update(1, weights(4, 0.125, 0.125, 0.5), slice(None))
    pinned = np.array([False, True, False, False])
    assert scores.of_layer(1, pinned).tolist() == [[0.625, PINNED + 0.25, 0.5, 0]] * 2
    assert scores.of_layer(0, pinned).tolist() == [[0, PINNED, 0, 0]]


def test_what_was_seen_and_replayed_stays_with_what_a_rewrite_keeps() -> None:
    scores = after_a_compaction()
    assert scores.n_replayed == 0
    two_more = np.zeros(2, bool)
    # the composed cells, then the tail, of which only what was seen is known
    assert scores.of_layer(0, two_more).tolist() == [[0.75, 0.5, 0.125, 0]]
    assert scores.of_layer(1, two_more).tolist() == [[0.75, 0.5, 0.125, 0], [0.5, 0.125, 0.125, 0]]
    # later text looks at a composed cell, and at a live one
    scores.seen.update(1, weights(4, 0.5, 0, 0, 0, 0.25), slice(None))
    assert scores.of_layer(1, np.zeros(3, bool))[1].tolist() == [1.0, 0.125, 0.125, 0, 0.25]


def test_popularity_comes_with_composed_cells_and_counts_for_ranks_and_within_bounds_for_budgets() -> None:
    scores = after_a_compaction()
    live = in_all_heads(packed(np.array([0.25, 1], np.float32)))
    none = np.zeros(2, bool)
    # of head 1 the tokens 2 and 5, then the tail
    by_hand = np.array([[4, 0.5, 0.25, 1], [1, 1, 0.25, 1]], np.float32)
    assert scores.for_budgets(1, none, live) == pytest.approx(scores.of_layer(1, none) * np.clip(by_hand, 0.7, 1.5))
    # of live scores 0.125 and 0 the median is the mean: this head is not sharp at all
    assert scores.for_ranks(1, none, live) == pytest.approx(scores.of_layer(1, none))
    for i, layer in enumerate(LAYERS):
        scores.replayed.update(i, weights(layer.n_heads, 0, 0, 0, 0, 0.5), slice(None))
    none = np.zeros(5, bool)
    live = in_all_heads(packed(np.array([0.25, 1, 1, 2, 2], np.float32)))
    by_hand = np.array([[4, 0.5, 0.25, 1, 1, 2, 2], [1, 1, 0.25, 1, 1, 2, 2]], np.float32)
    assert scores.for_ranks(1, none, live) == pytest.approx(scores.of_layer(1, none) * by_hand)


def test_the_popularity_of_live_tokens_is_that_in_all_layers_but_that_of_pinned_ones() -> None:
    scores = CellScores(LAYERS)
    scores.replayed.update(0, weights(2, 0.25, 0.25, 0.5, 1), slice(None))
    scores.replayed.update(1, weights(4, 0.25, 0.25, 0.5, 0), slice(None))
    # relative to the means 0.5 and 0.25: 0.5, 0.5, 1, 2 and 1, 1, 2, 0
    expected = np.array([1.5, 1.5, 3, 2], np.float32) / 1.75
    for pinned in (np.zeros(4, bool), np.array([False, False, True, False])):
        expected[pinned] = 1
        found = scores.popularity_of_live(pinned)
        assert [codes.tolist() for codes in found] == [codes.tolist() for codes in in_all_heads(packed(expected))]


def test_with_a_predictor_each_head_has_factors_of_its_own_which_composed_cells_bring_along() -> None:
    rows = np.zeros((3, 8))
    rows[0, 0] = 1  # the first head of three goes by what it looked at in the replay,
    rows[1, 6], rows[2, 7] = 1, np.log(4)  # the second by popularity, the third looks four times as much at all
    scores = CellScores(LAYERS, Predictor(rows.tolist()))
    for i, layer in enumerate(LAYERS):
        scores.seen.update(i, weights(layer.n_heads, 0, 0.5, 0, 0.25, 0, 0, 0.125, 0), slice(None))
        scores.replayed.update(i, weights(layer.n_heads, 0, 0, 0.5, 0.5, 0, 0.125), slice(None))
    pinned = np.array([False, False, False, False, True, False])
    live = scores.popularity_of_live(pinned)
    assert [codes.shape for codes in live] == [(1, 6), (2, 6)]
    replayed = np.array([0, 0, 0.5, 0.5, 0, 0.125], np.float32)
    seen = np.array([0, 0.5, 0, 0.25, 0, 0], np.float32)
    popularity = popularity_of([(replayed + seen)[None]] * 3)
    by_hand = np.stack([replayed / replayed.mean() + 0.02, popularity, np.full(6, 4, np.float32)])
    by_hand[:, 4] = 1  # pinned
    assert unpacked(np.concatenate(live)) == pytest.approx(by_hand, rel=1 / 40)
    for i, of_heads in enumerate((by_hand[:1], by_hand[1:])):
        own = scores.of_layer(i, pinned)
        assert scores.for_ranks(i, pinned, live) == pytest.approx(own * of_heads, rel=1 / 40)
        assert scores.for_budgets(i, pinned, live) == pytest.approx(own * np.sqrt(of_heads), rel=1 / 40)
    selection = [np.array([[3, 4]], np.uint16), np.array([[3, 4], [2, 5]], np.uint16)]
    scores.keep(selection, CacheLayout((0, 0), 8, 92, 8), pinned, live, reserve=4)
    none = np.zeros(0, bool)
    factors = np.array([[live[1][0, 3], ONE], [live[1][1, 2], live[1][1, 5]]])
    assert scores.for_ranks(1, none, scores.popularity_of_live(none)) == pytest.approx(
        scores.of_layer(1, none) * unpacked(factors.astype(np.uint8))
    )
    kept, codes, attention = ([*part] for part in scores.view())
    assert codes[1].tolist() == factors.tolist()
    again = CellScores(LAYERS, Predictor(rows.tolist())).restored(kept, codes, attention, (2, 2), 2)
    assert again.for_ranks(1, none, again.popularity_of_live(none)).tolist() == (
        scores.for_ranks(1, none, scores.popularity_of_live(none)).tolist()
    )


def test_what_is_gone_from_the_cache_is_forgotten() -> None:
    scores = after_a_compaction()
    scores.replayed.update(0, weights(2, 0.5, 0.5), slice(None))
    scores.n_replayed = 2
    scores.trim(CacheLayout((2, 2), 1, 99, 7))
    assert scores.n_replayed == 1
    assert scores.seen.n_columns == (3, 3)
    assert scores.of_layer(0, np.zeros(2, bool)).tolist() == [[0.75, 0.5, 0.625, 0]]


def test_the_newest_live_cells_count_as_not_seen_yet() -> None:
    scores = CellScores(LAYERS)
    layout = CacheLayout((3, 3), 2 * N_UNSEEN, 0, 100)
    assert scores.n_seen(layout) == 0
    scores.seen.update(0, weights(2, *np.zeros(3 + N_UNSEEN + 5)), slice(None))
    assert scores.n_seen(layout) == 5


def test_scores_of_another_time_are_taken_back_or_refused() -> None:
    scores = after_a_compaction()
    kept, codes, seen = ([*part] for part in scores.view())
    again = CellScores(LAYERS).restored(kept, codes, seen, (2, 2), 2)
    none, live = np.zeros(2, bool), in_all_heads(np.full(2, ONE, np.uint8))
    for i in range(2):
        assert again.of_layer(i, none).tolist() == scores.of_layer(i, none).tolist()
        assert again.for_budgets(i, none, live).tolist() == scores.for_budgets(i, none, live).tolist()
    not_finite = [kept[0], np.full_like(kept[1], np.nan)]
    negative = [kept[0], np.full_like(kept[1], -1)]
    for wrong_kept, wrong_codes, wrong_seen, composed in (
        (kept[:1], codes, seen, (2, 2)),
        (kept, codes, seen, (2, 3)),
        (not_finite, codes, seen, (2, 2)),
        (negative, codes, seen, (2, 2)),
        ([kept[0], kept[1].astype(np.float64)], codes, seen, (2, 2)),
        (kept, codes[:1], seen, (2, 2)),
        (kept, [codes[0], codes[1][:1]], seen, (2, 2)),
        (kept, [codes[0], codes[1].astype(np.float32)], seen, (2, 2)),
        (kept, codes, seen[:1], (2, 2)),
        (kept, codes, [seen[0], seen[1][:1]], (2, 2)),
        (kept, codes, [seen[0], np.zeros((2, 5), np.float32)], (2, 2)),
    ):
        with pytest.raises(InvalidInput):
            scores.restored(wrong_kept, wrong_codes, wrong_seen, composed, 2)
