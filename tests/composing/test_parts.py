"""What is computed in parts, on threads, is what is computed plainly."""

from __future__ import annotations

import os
import signal
import threading

import numpy as np
import pytest

from kvcompose_local.composing import threads
from kvcompose_local.composing.choice import A_NAT, PINNED, choose, competing
from kvcompose_local.composing.scorer import BOUNDS, Scorer
from kvcompose_local.composing.threads import in_parts

HEADS, N_COMPOSED, N_LIVE, N_SEEN = (2, 1, 4, 3, 2), (700, 0, 300, 5, 900), 200, 3000


def test_parts_follow_each_other_and_are_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "PART", 10)
    for sizes in ([4] * 9, [30, 1, 1, 30], [0, 0, 25], [100], [9], [0, 0]):
        parts = in_parts(lambda part: (part, threading.current_thread()), sizes)
        assert [i for part, _ in parts for i in range(len(sizes))[part]] == [*range(len(sizes))]
        is_main = [thread is threading.main_thread() for _, thread in parts]
        assert is_main == [True] + [False] * (len(parts) - 1), "the one that waits takes the first"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks here")
def test_a_child_has_threads_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "PART", 10)
    n_parts = len(in_parts(lambda part: part, [4] * 9))
    child = os.fork()
    if child == 0:
        signal.alarm(30)  # it would wait for threads that it has not
        os._exit(len(in_parts(lambda part: part, [4] * 9)) != n_parts)
    assert os.waitpid(child, 0)[1] == 0


def plainly(
    scorer: Scorer, layer: int, scores: np.ndarray, origins: np.ndarray, pinned: np.ndarray
) -> list[tuple[float, ...]]:
    """The logarithms of a layer's rows, in whole levels, head by head and row by row."""
    age = scorer.places[layer][:, 0]
    result = []
    for h, head in enumerate(scores):
        logarithms = []
        for score, origin in zip(head, origins[h], strict=True):
            log_age = np.log(np.clip(N_SEEN - origin, 1, scorer.furthest)).astype(np.float32)
            aged = np.clip(np.float32(score) + age[h] * log_age, *BOUNDS)
            level = np.floor(aged * np.float32(-A_NAT) + np.float32(A_NAT * PINNED + 0.5))
            logarithms.append(np.inf if pinned[origin] else -level)
        result.append(tuple(logarithms))
    return result


@pytest.mark.parametrize("part", [64, 500, 1 << 16])
def test_a_choice_in_parts_is_the_plain_one(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "PART", part)
    rng = np.random.default_rng(0)
    places = tuple(rng.normal(-0.2, 0.3, (h, 3)).astype(np.float32) for h in HEADS)
    scorer = Scorer(tuple(np.zeros((h, 4), np.float16) for h in HEADS), places, 2000)
    pinned = rng.random(N_SEEN) < 0.01
    first = N_SEEN - N_LIVE - 8
    sums = [rng.normal(-6, 2, (h, N_LIVE)).astype(np.float32) for h in HEADS]
    live = scorer.all_scores(np.concatenate(sums), first)
    of_layers = np.split(live, np.cumsum(HEADS)[:-1])
    composed, layers, plain = [], [], []
    for i, (h, k) in enumerate(zip(HEADS, N_COMPOSED, strict=True)):
        positions = np.log(np.clip(np.arange(first, first + N_LIVE) + 1, 1, scorer.furthest)).astype(np.float32)
        expected = np.clip(sums[i] + places[i][:, 1:2] * positions + places[i][:, 2:], *BOUNDS)
        np.testing.assert_allclose(of_layers[i], expected, rtol=1e-6)

        scores = np.round(rng.normal(-6, 2, (h, k)), 1).astype(np.float16)  # with ties
        origins = np.stack([rng.permutation(first)[:k] for _ in range(h)]).astype(np.uint16)
        composed.append(competing(scorer, i, scores, origins, N_SEEN, pinned))
        new = np.broadcast_to(np.arange(first, first + N_LIVE), (h, N_LIVE))
        joined = np.concatenate([scores, of_layers[i]], axis=1), np.concatenate([origins, new], axis=1)
        plain.append(plainly(scorer, i, *joined, pinned))
    newer = competing(scorer, None, live, np.arange(first, first + N_LIVE), N_SEEN, pinned)
    layers = [*zip(composed, np.split(newer, np.cumsum(HEADS)[:-1]), strict=True)]

    row_bytes = np.array(HEADS, np.int64)
    found = choose(layers, row_bytes, np.array([4000]), np.zeros_like(row_bytes))
    assert 3995 < sum(len(rows) * rows.shape[1] for rows in found) <= 4000
    for rows, heads in zip(found, plain, strict=True):
        for chosen, head in zip(rows, heads, strict=True):
            assert chosen.tolist() == sorted(range(len(head)), key=lambda row: (-head[row], row))[: rows.shape[1]]
