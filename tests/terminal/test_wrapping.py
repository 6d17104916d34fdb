"""Text on narrow terminals: no word is cut, nothing is lost."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvcompose_local.terminal.wrapping import n_shown, wrapped


def test_lines_end_between_words() -> None:
    assert wrapped("uncompressed, it\nwould take more", 12) == "uncompressed,\nit\nwould take\nmore"
    assert wrapped("/pin   keep every token", 12, 7) == "/pin   keep\n      every\n      token"
    assert wrapped("then `run it --now`, once", 12) == "then\n`run it --now`,\nonce"
    assert wrapped("世界 世界 世界", 9) == "世界 世界\n世界"
    assert wrapped("fits  as it is  ", 16) == "fits  as it is  "


@given(st.text("ab` 世\n", max_size=60), st.integers(1, 20), st.integers(0, 20))
def test_nothing_but_white_space_changes(text: str, width: int, indent: int) -> None:
    told = wrapped(text, width, indent)
    assert told.split() == text.split()
    if "`" not in text:
        assert all(n_shown(line.rstrip()) <= width or len(line.split()) == 1 for line in told.split("\n"))
