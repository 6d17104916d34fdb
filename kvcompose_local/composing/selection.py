"""Which tokens each head keeps.

Source: arXiv 2509.05165, step 10 of the method. Every head of a layer picks its own best tokens; the picks of
one rank stand together in one cell, the composite token of that rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvcompose_local.composing.budgets import layer_counts
from kvcompose_local.composing.scores import Scores, as_layers, best_first_keys, key_indices
from kvcompose_local.errors import InvalidInput
from kvcompose_local.interfaces import IntArray


def select_composites(scores: Scores, budgets: Sequence[int] | NDArray[Any]) -> list[IntArray]:
    """Token indices that make up the composite tokens of each layer: L int64 arrays (H_l, K_l).

    Column ``r`` of a layer's array is its composite token of rank ``r``: each head's ``r``-th best token.
    ``scores`` is float (L, H, T) or L arrays (H_l, T_l), ``budgets`` int (L,) holds the K_l. Of equal scores
    the lower index is better.

    Raises InvalidInput for scores :func:`~kvcompose_local.composing.scores.as_layers` refuses, and budgets that are not
    L integers in [0, T_l].
    """
    layers = as_layers(scores)
    kept = layer_counts("budgets", budgets, len(layers))
    selection = []
    for index, (layer, n_kept) in enumerate(zip(layers, kept.tolist(), strict=True)):
        n_tokens = layer.shape[1]
        if n_kept > n_tokens:
            raise InvalidInput(f"layer {index} cannot keep {n_kept} of {n_tokens} tokens")
        keys = best_first_keys(layer, np.arange(n_tokens))  # (H, T)
        if 0 < n_kept < n_tokens:
            keys.partition(n_kept - 1, axis=1)
        selection.append(key_indices(np.sort(keys[:, :n_kept], axis=1)))
    return selection
