"""Work in parts side by side: NumPy lets other threads run while it computes."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TypeVar

import numpy as np

from kvcompose_local.install.threads import default_threads

T = TypeVar("T")

#: Numbers of a part: they fit into a core's cache, and take NumPy much longer than threads take to take turns.
PART = 1 << 17
#: More threads than this wait for each other.
_MOST = 6


def in_parts(function: Callable[[slice], T], sizes: Sequence[int]) -> list[T]:
    """``function`` of slices that follow each other and are all heads, or all layers, together.

    sizes: how many numbers each head, or each layer, has; a slice has about :data:`PART` of them.
    """
    n_parts = sum(sizes) // PART
    if n_parts < 2:
        return [function(slice(0, len(sizes)))]
    ends = np.cumsum(sizes)
    cuts = np.searchsorted(ends, ends[-1] * np.arange(1, n_parts) // n_parts) + 1
    edges = sorted({0, *cuts.tolist(), len(sizes)})
    own, *others = itertools.starmap(slice, itertools.pairwise(edges))
    found = [_pool().submit(function, part) for part in others]
    return [function(own), *(part.result() for part in found)]  # others take some time to wake up


@lru_cache(maxsize=1)
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(min(default_threads(), _MOST) - 1, 1), "composing")


if hasattr(os, "register_at_fork"):  # a child has none of the threads
    os.register_at_fork(after_in_child=_pool.cache_clear)
