"""What a GGUF header says that ``llama_model_meta_val_str`` leaves out: arrays, and the names of tensors."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kvcompose_local.llama_ffi.library import bind

_STRING, _ARRAY = 8, 9  # GGUF_TYPE_STRING, GGUF_TYPE_ARRAY
#: GGUF's numbers of integer types, and of booleans.
_INTEGERS: dict[int, Any] = {
    0: ctypes.c_uint8,
    1: ctypes.c_int8,
    2: ctypes.c_uint16,
    3: ctypes.c_int16,
    4: ctypes.c_uint32,
    5: ctypes.c_int32,
    7: ctypes.c_bool,
    10: ctypes.c_uint64,
    11: ctypes.c_int64,
}


class _Parameters(ctypes.Structure):
    _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p)]


_open = bind("gguf_init_from_file", ctypes.c_void_p, ctypes.c_char_p, _Parameters)
_free = bind("gguf_free", None, ctypes.c_void_p)
_find_key = bind("gguf_find_key", ctypes.c_int64, ctypes.c_void_p, ctypes.c_char_p)
_find_tensor = bind("gguf_find_tensor", ctypes.c_int64, ctypes.c_void_p, ctypes.c_char_p)
_kind = bind("gguf_get_kv_type", ctypes.c_int, ctypes.c_void_p, ctypes.c_int64)
_kind_of_array = bind("gguf_get_arr_type", ctypes.c_int, ctypes.c_void_p, ctypes.c_int64)
_length = bind("gguf_get_arr_n", ctypes.c_size_t, ctypes.c_void_p, ctypes.c_int64)
_text = bind("gguf_get_arr_str", ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_size_t)
_data = bind("gguf_get_arr_data", ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)


@contextmanager
def open_header(path: Path) -> Iterator[int | None]:
    """A ``gguf_context`` of the file; None where it cannot be read."""
    header = _open(os.fsencode(path), _Parameters(True, None))
    try:
        yield header
    finally:
        if header:
            _free(header)


def integers(header: int | None, key: str) -> list[int]:
    """An array of integers; empty where there is none."""
    i = _find_key(header, key.encode()) if header else -1
    if i < 0 or _kind(header, i) != _ARRAY:
        return []
    number, n = _INTEGERS.get(_kind_of_array(header, i)), _length(header, i)
    return list((number * n).from_address(_data(header, i))) if number and n else []


def texts(header: int | None, key: str) -> list[str]:
    """An array of strings; empty where there is none."""
    i = _find_key(header, key.encode()) if header else -1
    if i < 0 or _kind(header, i) != _ARRAY or _kind_of_array(header, i) != _STRING:
        return []
    return [_text(header, i, n).decode("utf-8", "replace") for n in range(_length(header, i))]


def has_tensor(header: int | None, name: str) -> bool:
    """Whether a tensor of this name is in the file."""
    return bool(header) and _find_tensor(header, name.encode()) >= 0
