"""What the methods know of a context: collected once an item, shared by all methods and keep ratios."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt

from kvcompose_local import profiles
from kvcompose_local.attention import AttentionMax
from kvcompose_local.cell_scores import N_NEAREST, SCORE_DTYPE, SEEN_DTYPE
from kvcompose_local.compaction import near_chunk
from kvcompose_local.engines.base import LlamaEngine
from kvcompose_local.install.model_files import model_digest
from kvcompose_local.interfaces import FloatArray
from kvcompose_local.profiles import Profile, Tuning

#: Tokens of :attr:`Statistics.look_back`.
N_LOOKING_BACK = 64
#: Queries of a recent-query method (SnapKV, arXiv 2404.14469, uses 32 with short contexts).
N_RECENT = 32


class Statistics:
    """Of one context, which the engine's cache holds, uncompressed, when the attributes are first asked for.

    All are lists of L arrays over the T tokens; scores are float32 (H, T), as the program makes them.
    """

    def __init__(self, engine: LlamaEngine, tokens: Sequence[int], *, n_scratch: int, n_lead_in: int) -> None:
        """Reads ``tokens`` into the empty cache of ``engine``; n_scratch, n_lead_in: of the chat's replay policy."""
        self.engine = engine
        self.tokens = list(tokens)
        self.n_scratch = n_scratch
        self.n_lead_in = n_lead_in
        self._seen = AttentionMax.over(engine.shape.layers, exclude_nearest=N_NEAREST, dtype=SEEN_DTYPE)
        engine.decode(self.tokens, seen=self._seen)

    @property
    def n_tokens(self) -> int:
        return len(self.tokens)

    @cached_property
    def seen(self) -> list[FloatArray]:
        """The most attention that any later token but the 16 nearest paid during prefill."""
        return [layer.astype(np.float32) for layer in self._seen.result()]

    @cached_property
    def replay(self) -> list[FloatArray]:
        """The most attention that any replayed token pays, replayed in the chat's chunks."""
        chunk = self.n_scratch - self.n_lead_in
        seen = AttentionMax.over(self.engine.shape.layers, dtype=SCORE_DTYPE)
        for start in range(0, self.n_tokens, chunk):
            part = self.tokens[max(start - self.n_lead_in, 0) : start + chunk]
            self.engine.replay(part, seen, near_chunk(start, min(start + chunk, self.n_tokens)))
        return [layer.astype(np.float32) for layer in seen.result()]

    @cached_property
    def both(self) -> list[FloatArray]:
        """Their sum, which is what the chat ranks tokens by."""
        return [a + b for a, b in zip(self.replay, self.seen, strict=True)]

    @cached_property
    def look_back(self) -> list[FloatArray]:
        """The most attention that any of the last 64 tokens pays when these are replayed."""
        seen = AttentionMax.over(self.engine.shape.layers)
        self.engine.replay(self.tokens[-N_LOOKING_BACK:], seen)
        return [layer.astype(np.float32) for layer in seen.result()]

    @cached_property
    def profile(self) -> Profile:
        """The layer profile of the model. Raises KVComposeError where there is none."""
        return profiles.find(model_digest(self.engine.model.path))

    @cached_property
    def tuning(self) -> Tuning:
        """What the program knows of the model beside the text."""
        return profiles.tuning_of(self.engine.model.path, model_digest)

    @cached_property
    def whole_replay(self) -> list[FloatArray]:
        """Attention, float32 (Q, T), replayed in one piece as published: needs as much room again."""
        seen = AttentionMax(len(self.engine.shape.layers), [layer.n_heads for layer in self.engine.shape.layers])
        self.engine.replay(self.tokens, seen)
        return [layer.astype(np.float32) for layer in seen.result()]

    @cached_property
    def recent(self) -> list[FloatArray]:
        """The mean attention of the last 32 tokens."""
        sums = [np.zeros((layer.n_heads, self.n_tokens), np.float32) for layer in self.engine.shape.layers]

        def tap(layer: int, weights: FloatArray) -> None:
            sums[layer] += weights[:, :, : self.n_tokens].sum(axis=1) / N_RECENT

        self.engine.drop_tail(N_RECENT)
        with self.engine.watching(tap):
            self.engine.decode(self.tokens[-N_RECENT:])
        return sums

    @cached_property
    def key_norms(self) -> list[FloatArray]:
        """The Euclidean norms of an F16 cache's keys, float32 (H, T)."""
        return [self._norms(rows, i) for i, rows in enumerate(self.engine.snapshot().keys)]

    @cached_property
    def value_norms(self) -> list[FloatArray]:
        """The Euclidean norms of an F16 cache's values, float32 (H, T)."""
        return [self._norms(rows, i) for i, rows in enumerate(self.engine.snapshot().values)]

    def _norms(self, rows: npt.NDArray[np.uint8], layer: int) -> FloatArray:
        n_heads = self.engine.shape.layers[layer].n_kv_heads
        by_head = np.ascontiguousarray(rows).view(np.float16).astype(np.float32).reshape(len(rows), n_heads, -1)
        return np.asarray(np.linalg.norm(by_head, axis=2).T, np.float32)  # (H, T)
