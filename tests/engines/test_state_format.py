"""The serialized state: exact round trips, hostile bytes, and the gather against a naive loop."""

from __future__ import annotations

import contextlib
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcompose_local.engines.state_format import CellBlock, Plane, parse_state, row_bytes, write_state
from kvcompose_local.errors import StateFormatError

F16, Q4_0, Q8_0 = 1, 2, 8
HEADS, DIM, LAYERS = 2, 64, 2


def block(n: int, ggml_type: int = F16, *, transposed: bool = False, first: int = 0) -> CellBlock:
    rng = np.random.default_rng(n)
    width = row_bytes(ggml_type, HEADS * DIM)

    def plain() -> Plane:
        return Plane(ggml_type, rng.integers(0, 256, (n, width), dtype=np.uint8))

    def by_element() -> Plane:
        return Plane(ggml_type, rng.integers(0, 256, (HEADS * DIM, n, 2), dtype=np.uint8), True)

    return CellBlock(
        np.arange(first, first + n, dtype=np.int32),
        tuple(plain() for _ in range(LAYERS)),
        tuple(by_element() if transposed else plain() for _ in range(LAYERS)),
    )


@pytest.mark.parametrize(("ggml_type", "transposed"), [(F16, False), (F16, True), (Q8_0, False), (Q4_0, False)])
@pytest.mark.parametrize("n", [1, 7])
def test_round_trip(ggml_type: int, transposed: bool, n: int) -> None:
    cells = block(n, ggml_type, transposed=transposed, first=5)
    again = parse_state(write_state(cells))
    assert (again.positions == cells.positions).all()
    for a, b in zip(again.keys + again.values, cells.keys + cells.values, strict=True):
        assert (a.ggml_type, a.transposed) == (b.ggml_type, b.transposed)
        assert (a.data == b.data).all()


def test_an_empty_state() -> None:
    assert len(parse_state(write_state(CellBlock(np.empty(0, np.int32), (), ()))).positions) == 0


@settings(deadline=None, max_examples=60)
@given(data=st.data(), n=st.integers(1, 9), ggml_type=st.sampled_from([F16, Q8_0, Q4_0]), transposed=st.booleans())
def test_gather_is_a_loop_over_heads(data: st.DataObject, n: int, ggml_type: int, transposed: bool) -> None:
    transposed = transposed and ggml_type == F16
    cells = block(n, ggml_type, transposed=transposed)
    n_tail = data.draw(st.integers(0, n))
    k = data.draw(st.integers(0, n - n_tail))
    index = st.integers(0, n - 1)
    table = st.lists(st.lists(index, min_size=k, max_size=k), min_size=HEADS, max_size=HEADS)
    selection = [np.array(data.draw(table), np.int64).reshape(HEADS, k) for _ in range(LAYERS)]
    result = cells.gather(selection, n_tail)
    assert result.positions.tolist() == [*range(n - n_tail - k, n)]
    for planes, gathered in ((cells.keys, result.keys), (cells.values, result.values)):
        for layer in range(LAYERS):
            old, new = planes[layer].data, gathered[layer].data
            if planes[layer].transposed:  # (elements, n, 2) -> (n, elements * 2), an element of a head at a time
                old, new = (a.transpose(1, 0, 2).reshape(a.shape[1], 2 * HEADS * DIM) for a in (old, new))
            head = old.shape[1] // HEADS
            assert (new[k:] == old[n - n_tail :]).all()
            for h in range(HEADS):
                for r in range(k):
                    source = selection[layer][h, r]
                    part = slice(h * head, (h + 1) * head)
                    assert (new[r, part] == old[source, part]).all()


def test_composed_cells_take_the_positions_before_the_live_ones() -> None:
    cells = block(10, first=90)
    selection = [np.tile(np.arange(3), (HEADS, 1))] * LAYERS
    assert cells.gather(selection, 2).positions.tolist() == [95, 96, 97, 98, 99]
    assert cells.gather(selection, 0).positions.tolist() == [97, 98, 99]


def test_impossible_gathers_are_refused() -> None:
    cells = block(4)
    good = np.zeros((HEADS, 2), np.int64)
    for selection, n_tail in (
        ([good], 0),
        ([good, np.zeros((HEADS, 1), np.int64)], 0),
        ([good, good + 4], 0),
        ([good, good - 1], 0),
        ([good, good], 5),
        ([np.zeros((HEADS, 5), np.int64)] * 2, 0),
        ([np.zeros((3, 1), np.int64)] * 2, 0),
    ):
        with pytest.raises(StateFormatError):
            cells.gather(selection, n_tail)
    with pytest.raises(StateFormatError, match="heads"):
        block(4, transposed=True).gather([np.zeros((3, 1), np.int64)] * 2, 0)
    with pytest.raises(StateFormatError, match="whole blocks"):
        block(4, Q8_0).gather([np.zeros((8, 1), np.int64)] * 2, 0)  # half a Q8_0 block a head


def test_each_field_is_checked() -> None:
    good = write_state(block(2))

    def with_bytes(offset: int, layout: str, value: int) -> np.ndarray:
        raw = bytearray(good.tobytes())
        struct.pack_into(layout, raw, offset, value)
        return np.frombuffer(bytes(raw), np.uint8)

    layers_at = 16 + 2 * 12 + 4
    for blob, message in (
        (with_bytes(0, "<I", 1), "another llama.cpp version"),
        (with_bytes(8, "<I", 2), "2 streams"),
        (with_bytes(12, "<I", 3), "several sequences|inside a field|impossible|left over|names"),
        (with_bytes(12, "<I", 0), "left over"),
        (with_bytes(20, "<I", 2), "several sequences"),
        (with_bytes(layers_at, "<I", 99), "inside a field|impossible|does not know"),
        (with_bytes(layers_at, "<I", 1 << 30), "names"),
        (with_bytes(layers_at + 4, "<i", 77), "does not know"),
        (with_bytes(layers_at + 8, "<Q", 1 << 60), "impossible"),
        (good[:-1], "inside a field"),
        (np.append(good, np.uint8(0)), "left over"),
        (good[:3], "inside a field"),
    ):
        with pytest.raises(StateFormatError, match=message):
            parse_state(blob)


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_mutated_states_never_do_worse_than_a_clear_error(data: st.DataObject) -> None:
    raw = bytearray(write_state(block(2, transposed=data.draw(st.booleans()))).tobytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, min(120, len(raw) - 1)))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(StateFormatError):  # anything else fails the test
        parse_state(np.frombuffer(bytes(raw), np.uint8))


def test_rows_are_whole_blocks() -> None:
    assert row_bytes(F16, 64) == 128
    assert row_bytes(Q8_0, 64) == 68
    with pytest.raises(StateFormatError, match="whole blocks"):
        row_bytes(Q8_0, 33)
