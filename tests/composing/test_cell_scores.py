"""What composed cells keep: scores and where their tokens stood."""

from __future__ import annotations

import numpy as np
import pytest

from kvcompose_local.composing.cell_scores import CellScores
from kvcompose_local.composing.scorer import BOUNDS
from kvcompose_local.errors import InvalidInput
from kvcompose_local.interfaces import LayerShape

LAYERS = [LayerShape(i, 4, 2, 8) for i in range(2)]


def test_scores_follow_a_rewrite_and_the_next() -> None:
    cells = CellScores(LAYERS)
    live = np.float32([[0, 1, 2, 3], [3, 2, 1, 0]] * 2)
    scores, origins = cells.rows(live, 5)[0]
    assert origins.tolist() == [[5, 6, 7, 8]] * 2
    assert scores.tolist() == live[:2].tolist()
    assert scores.dtype == np.float16
    cells.keep([np.array([[3, 1], [0, 2]]), np.array([[2], [2]])], live, 5)
    scores, origins = cells.rows(np.float32([[4], [5], [0], [0]]), 9)[0]
    assert scores.tolist() == [[3, 1, 4], [3, 1, 5]]
    assert origins.tolist() == [[8, 6, 9], [5, 7, 9]]
    assert origins.dtype == np.uint16
    cells.keep([np.array([[2, 0], [1, 2]]), np.array([[0], [0]])], np.float32([[40], [np.nan]] * 2), 70_000)
    scores, origins = cells.rows(np.zeros((4, 0), np.float32), 70_001)[0]
    assert scores.tolist() == [[BOUNDS[1], 3], [1, BOUNDS[0]]]
    assert origins.tolist() == [[70_000, 8], [7, 70_000]]


def test_what_is_older_than_a_position_stays_best_first() -> None:
    cells = CellScores(LAYERS)
    live = np.float32([[0, 1, 2, 3], [3, 2, 1, 0]] * 2)
    cells.keep([np.array([[3, 2, 1, 0], [0, 1, 2, 3]]), np.array([[3], [3]])], live, 0)
    one, two = cells.before(2)
    assert one.tolist() == [[2, 3], [0, 1]]
    assert two.shape == (2, 0)


def test_they_come_back_as_they_were_and_no_others() -> None:
    cells = CellScores(LAYERS)
    live = np.float32([[0, 1, 2, 3], [3, 2, 1, 0]] * 2)
    cells.keep([np.array([[3, 1], [0, 2]]), np.array([[2], [2]])], live, 0)
    kept, origins = (tuple(part) for part in cells.view())
    again = CellScores(LAYERS).restored(kept, origins, (2, 1), 4)
    for one, two in zip((*cells.view()[0], *cells.view()[1]), (*again.view()[0], *again.view()[1]), strict=True):
        np.testing.assert_array_equal(one, two)
    bad = [np.full_like(kept[0], np.nan), kept[1]]
    for arguments in (
        (kept[:1], origins, (2, 1), 4),
        (kept, origins, (1, 1), 4),
        (kept, origins, (2, 1), 3),
        (kept, [origins[0] - 2, origins[1]], (2, 1), 4),
        (kept, [origins[0].astype(float), origins[1]], (2, 1), 4),
        (bad, origins, (2, 1), 4),
        ([kept[0].astype(np.float64), kept[1]], origins, (2, 1), 4),
    ):
        with pytest.raises(InvalidInput):
            CellScores(LAYERS).restored(*arguments)
