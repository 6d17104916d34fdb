"""Damaged recurrent states and sliding windows: an error, a cache that still works, and never an abort."""

from __future__ import annotations

import subprocess
import sys

import damaged_states
import pytest

from kvcompose_local.llama_ffi.cells import library_is_patched


@pytest.mark.skipif(not library_is_patched(), reason="the library of this run has no patch series")
@pytest.mark.parametrize("name", damaged_states.SHAPES)
def test_damaged_states_are_told(name: str) -> None:
    command = [sys.executable, damaged_states.__file__, name, "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{damaged_states.N_TRIES} states" in done.stdout
