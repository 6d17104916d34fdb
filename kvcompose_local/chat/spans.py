"""Spans of positions, (start, stop), such as what is pinned; they may overlap."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def within(spans: Sequence[tuple[int, int]], n: int) -> npt.NDArray[np.bool_]:
    """Which of the first ``n`` positions are in some (start, stop): bool (n,)."""
    found = np.zeros(n, bool)
    for start, stop in spans:
        found[start:stop] = True
    return found


def n_within(spans: Sequence[tuple[int, int]]) -> int:
    """How many positions are in some (start, stop)."""
    return int(within(spans, max((stop for _, stop in spans), default=0)).sum())
