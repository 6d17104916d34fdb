"""The memory of a model: its class, its size, and why it cannot be composed."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass

from kvcompose_local.errors import EngineError
from kvcompose_local.llama_ffi.context import Context
from kvcompose_local.llama_ffi.library import bind
from kvcompose_local.llama_ffi.model import Model


class _Memory(ctypes.Structure):
    _fields_ = [
        *(
            (name, ctypes.c_int32)
            for name in (
                "kind",
                "is_mla",
                "n_pos",
                "is_biased",
                "is_turned",
                "n_layers",
                "n_shared",
                "n_window_layers",
            )
        ),
        *((name, ctypes.c_uint64) for name in ("attention_bytes", "window_bytes", "recurrent_bytes")),
    ]


_get_memory = bind("llama_kvc_get_memory", ctypes.c_int32, ctypes.c_void_p, ctypes.POINTER(_Memory))
_supported = bind("llama_kvc_supported", ctypes.c_int32, ctypes.c_void_p)
_last_error = bind("llama_kvc_last_error", ctypes.c_char_p)
_architecture = bind("llama_kvc_architecture", ctypes.c_char_p, ctypes.c_int32)
#: Of enum llama_kvc_memory_kind.
_KINDS = ("none", "attention", "recurrent", "hybrid", "indexed")
#: Why memories of some kinds cannot be composed; of the others the library tells.
_OBSTACLES = {
    "none": "it keeps nothing of what it read",
    "recurrent": "it is recurrent: one state holds all that it read",
    "indexed": "an index of its own chooses what its attention sees",
}


@dataclass(frozen=True)
class Memory:
    """The memory of a context.

    kind: ``none`` of encoders, ``attention``, ``recurrent``, ``hybrid`` of both, or ``indexed`` where an index of its
    own chooses what attention sees; n_layers: with full attention and cells of their own; n_shared: layers that read
    the cells of another; n_window_layers: with sliding windows; bytes are of whole buffers; obstacle: why the cells
    cannot be composed, empty where they can.
    """

    kind: str
    is_mla: bool
    has_sections: bool
    is_turned: bool
    n_layers: int
    n_shared: int
    n_window_layers: int
    attention_bytes: int
    window_bytes: int
    recurrent_bytes: int
    obstacle: str

    @property
    def words(self) -> str:
        """For people: the kind, and what is special of it."""
        special = (
            ("MLA", self.is_mla),
            ("M-RoPE", self.has_sections),
            ("windows", self.n_window_layers > 0),
            ("shared KV", self.n_shared > 0),
            ("no RoPE", not self.is_turned and self.kind == "attention"),
        )
        return ", ".join([self.kind, *(word for word, applies in special if applies)])


def memory_of(context: Context) -> Memory:
    """The memory of a context, which may be dry. Raises EngineError where the library does not tell."""
    told = _Memory()
    if _get_memory is None or _get_memory(context._ctx, ctypes.byref(told)) != 0:
        raise EngineError("this llama.cpp does not tell of its memory: `kvcompose-local build` makes one that does")
    kind = _KINDS[told.kind]
    composable = _supported(context._ctx) == 0
    reason = _OBSTACLES.get(kind) or _last_error().decode("utf-8", "replace")
    return Memory(
        kind=kind,
        is_mla=bool(told.is_mla),
        has_sections=told.n_pos > 1,
        is_turned=bool(told.is_turned),
        n_layers=told.n_layers,
        n_shared=told.n_shared,
        n_window_layers=told.n_window_layers,
        attention_bytes=told.attention_bytes,
        window_bytes=told.window_bytes,
        recurrent_bytes=told.recurrent_bytes,
        obstacle="" if composable else reason,
    )


def dry_memory(model: Model, *, n_ctx: int, n_positions: int, n_ubatch: int, cache_type: str) -> Memory:
    """The memory of the context that an engine would make of a dry model, without taking that memory."""
    with Context(
        model,
        n_ctx=n_ctx,
        n_positions=n_positions,
        n_ubatch=n_ubatch,
        n_threads=1,
        flash_attention=True,
        cache_type=cache_type,
    ) as context:
        return memory_of(context)


def architectures() -> Iterator[str]:
    """The architectures that the loaded llama.cpp knows; none where it is not patched."""
    i = 0
    while _architecture is not None and (name := _architecture(i)) is not None:
        yield name.decode()
        i += 1
