"""How the arena is divided."""

from __future__ import annotations

import pytest

from kvcompose_local.composing.policy import DEVICE_MICRO_BATCH, Policy


@pytest.mark.parametrize(
    ("n_cells", "n_headroom"),
    [(512, 128), (1024, 256), (1500, 375), (2043, 512), (2048, 512), (3328, 1024), (8192, 2048), (13000, 3584)],
)
def test_headroom_on_a_device(n_cells: int, n_headroom: int) -> None:
    """A quarter of the cells, in whole micro-batches where that is no more than a third."""
    found = Policy.for_cells(n_cells, on_device=True)
    assert found.n_headroom == n_headroom
    assert found.n_headroom <= n_cells / 3
    assert found.n_headroom % DEVICE_MICRO_BATCH == 0 or n_cells < 3 * DEVICE_MICRO_BATCH


@pytest.mark.parametrize(("n_cells", "n_headroom"), [(512, 32), (2048, 128), (7936, 512), (32768, 512)])
def test_headroom_on_a_host(n_cells: int, n_headroom: int) -> None:
    assert Policy.for_cells(n_cells).n_headroom == n_headroom
