"""Ways to choose what a cache keeps, at equal bytes.

Each module here registers its own: adding a method is one small file.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence

from kvcompose_local.errors import InvalidInput
from kvcompose_local.evaluation.statistics import Statistics
from kvcompose_local.interfaces import FloatArray, Selection

#: Takes the statistics and the number of cells to keep over all layers; returns a selection as ``Engine.rewrite`` does.
Method = Callable[[Statistics, int], Sequence[Selection]]

_METHODS: dict[str, Method] = {}


def method(name: str) -> Callable[[Method], Method]:
    """Register a method under a name."""

    def register(function: Method) -> Method:
        _METHODS[name] = function
        return function

    return register


def find_method(name: str) -> Method:
    """The method of a name. Raises InvalidInput, which lists all names."""
    if name not in _METHODS:
        raise InvalidInput(f"there is no method {name}: {', '.join(method_names())}")
    return _METHODS[name]


def method_names() -> list[str]:
    """All names."""
    return sorted(_METHODS)


def by_kv_head(attention: FloatArray, n_kv_heads: int) -> FloatArray:
    """Query heads (Q, T) by the KV head they share: (H, Q // H, T)."""
    return attention.reshape(n_kv_heads, -1, attention.shape[-1])


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
