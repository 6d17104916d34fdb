"""From attention to token scores, and the two conventions every later stage shares.

Source: arXiv 2509.05165, steps 4 and 5 of the method. Axes: layer L, query head Q, KV head H, token T.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvcompose_local.errors import InvalidInput
from kvcompose_local.interfaces import FloatArray, IntArray

Scores = NDArray[Any] | Sequence[NDArray[Any]]

_INDEX_BITS = 32
#: The bits of a key that hold its index.
INDEX_MASK = (1 << _INDEX_BITS) - 1


def token_scores(attention_max: NDArray[Any], n_kv_heads: int, *, add_mean_across_heads: bool = True) -> FloatArray:
    """Score of every token for every KV head: float32 (L, H, T).

    ``attention_max`` is float (L, Q, T), the largest softmax weight each token got from each query head.
    Query heads ``h*G … h*G + G-1`` share KV head ``h``, ``G = Q // H``; the score is their mean. With
    ``add_mean_across_heads`` the mean over the KV heads is added.

    Raises InvalidInput for another shape or dtype, Q not a multiple of ``n_kv_heads``, or a value that is NaN
    or infinite. Source: arXiv 2509.05165, steps 4 and 5.
    """
    attention = np.asarray(attention_max)
    if attention.ndim != 3 or attention.dtype.kind != "f":
        raise InvalidInput(
            f"attention_max must be floats of shape (layers, query heads, tokens), not {attention.dtype} "
            f"{attention.shape}"
        )
    n_layers, n_query_heads, n_tokens = attention.shape
    if n_kv_heads < 1 or n_query_heads < 1 or n_query_heads % n_kv_heads:
        raise InvalidInput(f"{n_query_heads} query heads cannot be shared by {n_kv_heads} KV heads")
    groups = attention.reshape(n_layers, n_kv_heads, n_query_heads // n_kv_heads, n_tokens)
    with np.errstate(invalid="ignore", over="ignore"):  # told apart below, in one place
        scores: FloatArray = groups.mean(axis=2, dtype=np.float32)  # (L, H, T)
        if add_mean_across_heads:
            scores += scores.mean(axis=1, keepdims=True)
    if not np.isfinite(scores).all():
        raise InvalidInput("attention_max holds NaN or infinite values; collect the attention again")
    return scores


def as_layers(scores: Scores) -> list[FloatArray]:
    """The scores as L checked float32 arrays (H_l, T_l); later stages take their input through here.

    Takes a float array (L, H, T), or a sequence of L float arrays whose heads and tokens may differ (T_l may
    be 0). Scores are compared as float32. Raises InvalidInput for any other shape or dtype, and for NaN or
    infinite scores.
    """
    return list(each_layer(scores))


def each_layer(scores: Scores | Iterable[NDArray[Any]]) -> Iterator[FloatArray]:
    """:func:`as_layers`, one layer after another: scores that are made on demand then need little memory."""
    if isinstance(scores, np.ndarray) and scores.ndim != 3:
        raise InvalidInput(f"scores must have shape (layers, heads, tokens), not {scores.shape}")
    index = -1
    for index, values in enumerate(scores):
        try:
            layer = np.asarray(values)
        except ValueError as error:
            raise InvalidInput(f"scores of layer {index} are not an array: {error}") from error
        if layer.ndim != 2 or layer.dtype.kind != "f" or (layer.shape[0] == 0 and layer.shape[1] > 0):
            raise InvalidInput(
                f"scores of layer {index} must be floats of shape (heads, tokens), not {layer.dtype} {layer.shape}"
            )
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused
            layer = layer.astype(np.float32, copy=False)
        if not np.isfinite(layer).all():
            raise InvalidInput(f"scores of layer {index} hold NaN or infinite values")
        yield layer
    if index < 0:
        raise InvalidInput("scores hold no layer")


def best_first_keys(scores: FloatArray, indices: IntArray) -> IntArray:
    """int64 keys whose ascending order is: higher score first, and of equal scores the lower index first.

    ``scores`` is float32 without NaN, ``indices`` broadcasts to its shape, each in [0, 2**32). One integer
    sort or partition of the keys settles order and ties together, and integer sorts are vectorised where
    stable float argsorts are not. :func:`key_indices` reads the indices back.
    """
    bits = (np.float32(0) - scores).view(np.int32)  # the subtraction also makes one zero of +0 and -0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # IEEE 754 floats as integers of the same order
    keys: IntArray = (ordered.astype(np.int64) << _INDEX_BITS) | indices
    return keys


def key_indices(keys: IntArray) -> IntArray:
    """The indices that :func:`best_first_keys` put into ``keys``."""
    return keys & INDEX_MASK
