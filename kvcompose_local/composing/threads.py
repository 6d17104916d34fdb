"""Work on layers in several threads, for the many cores beside a GPU: NumPy computes while other threads run."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TypeVar

T = TypeVar("T")


def each(function: Callable[[int], T], n: int, n_threads: int) -> list[T]:
    """What a function gives for 0 to ``n``, in their order."""
    if n_threads == 1:
        return [function(i) for i in range(n)]
    return list(_pool(n_threads).map(function, range(n)))


@lru_cache(maxsize=1)
def _pool(n_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(n_threads)
