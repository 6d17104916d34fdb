"""The cache as a bar chart in plain text: the cells of each layer, and the memory of all of them."""

from __future__ import annotations

import textwrap

from kvcompose_local.interfaces import CacheLayout, ModelShape
from kvcompose_local.terminal.figures import MIB

#: Marks of composed and live cells, where the terminal can show them and elsewhere.
UNICODE_MARKS, ASCII_MARKS = "█░", "#."
_SHORTEST_BAR = 4


def can_show(text: str, encoding: str | None) -> bool:
    """Whether a stream of this encoding can show these characters."""
    try:
        text.encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def draw(layout: CacheLayout, shape: ModelShape, *, cap_bytes: int, width: int, marks: str = ASCII_MARKS) -> str:
    """One line a layer, of which a full bar is the most that a layer may hold, and the total; one line for all layers
    where nothing is composed yet, as they hold the same then. No line is wider than ``width`` columns.

    cap_bytes: bytes that the cells of all layers may take; marks: one for composed cells and one for live cells.
    """
    n_live = layout.n_live
    if any(layout.composed):
        lines = _bars(layout, shape, width, marks)
    else:
        lines = textwrap.wrap(f"{n_live} live cells in each of {len(shape.layers)} layers", width)
    used = sum(layer.row_bytes * (k + n_live) for layer, k in zip(shape.layers, layout.composed, strict=True))
    full = layout.position * shape.uncompressed_row_bytes
    total = (
        f"in all {used / MIB:.2f} of {cap_bytes / MIB:.2f} MiB, room for {layout.n_free} more live cells; "
        f"uncompressed, these {layout.position} tokens would take {full / MIB:.2f} MiB"
    )
    return "\n".join(lines + textwrap.wrap(total, width))


def _bars(layout: CacheLayout, shape: ModelShape, width: int, marks: str) -> list[str]:
    """What the marks mean, and a line a layer."""
    n_live = layout.n_live
    most = max(layout.composed) + n_live + layout.n_free
    rows = [
        (str(layer.index), k, f"{k} + {n_live}", f"{layer.row_bytes * (k + n_live) / MIB:.2f}")
        for layer, k in zip(shape.layers, layout.composed, strict=True)
    ]
    wide = [max(len(row[i]) for row in rows) for i in (0, 2, 3)]  # type: ignore[arg-type]
    n_columns = max(width - sum(wide) - 4, _SHORTEST_BAR)
    lines = textwrap.wrap(f"{marks[0]} composed + {marks[1]} live cells of each layer, MiB", width)
    for index, k, cells, mib in rows:
        bar = _bar(k, n_live, most, n_columns, marks)
        lines.append(f"{index:>{wide[0]}} {bar:<{n_columns}} {cells:>{wide[1]}}  {mib:>{wide[2]}}"[:width])
    return lines


def _bar(n_composed: int, n_live: int, most: int, n_columns: int, marks: str) -> str:
    """A bar in which no kind of cell vanishes."""
    columns = [max(round(n * n_columns / most), 1) if n else 0 for n in (n_composed, n_live)]
    if excess := max(sum(columns) - n_columns, 0):
        columns[columns.index(max(columns))] -= excess
    return marks[0] * columns[0] + marks[1] * columns[1]
