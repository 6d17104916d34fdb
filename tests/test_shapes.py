"""Random models of the shapes that people run, under a budget, and docs/models.md that tells of them."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from real_shapes import PAGE, SHAPES, page, try_shape

from kvcompose_local.engines import physical_cores
from kvcompose_local.llama_ffi.cells import library_is_patched

pytestmark = pytest.mark.skipif(not library_is_patched(), reason="the library of this run has no patch series")
NAMES = [shape.name for shape in SHAPES]


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> Iterator[dict[str, Future[str]]]:
    """What was done with each shape that this run wants, as many at a time as there are cores."""
    wanted = {
        item.callspec.params["name"] for item in request.session.items if getattr(item, "obj", None) is test_shape
    }
    if any(getattr(item, "obj", None) is test_page for item in request.session.items):
        wanted |= set(NAMES)
    with ThreadPoolExecutor(physical_cores()) as pool:
        yield {shape.name: pool.submit(try_shape, shape) for shape in SHAPES if shape.name in wanted}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("name", NAMES)
def test_shape(outcomes: dict[str, Future[str]], name: str) -> None:
    assert outcomes[name].result()


def test_page(outcomes: dict[str, Future[str]]) -> None:
    """docs/models.md is what scripts/shapes would write."""
    assert PAGE.read_text(encoding="utf-8") == page([outcomes[name].result() for name in NAMES])
