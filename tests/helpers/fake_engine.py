"""An engine of byte tokens without a model: it keeps what a real one would, so that the policy can be checked."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

import numpy as np

from kvcompose_local.chat.reasoning import Format, format_of
from kvcompose_local.composing.scorer import products
from kvcompose_local.errors import ContextFull, InvalidInput
from kvcompose_local.interfaces import (
    AttentionSink,
    ByteArray,
    CacheLayout,
    CacheSnapshot,
    FloatArray,
    HalfArray,
    LayerShape,
    ModelShape,
    Progress,
    Selection,
)

END = 256


class FakeEngine:
    """Cells hold (token, position) of each head; a token attracts attention in proportion to its value."""

    name = "fake"
    max_replay = 10**9
    compute_bytes = None
    cannot_snapshot = ""
    row_steps = (1,)

    def __init__(
        self,
        n_cells: int,
        answers: Sequence[str] = (),
        *,
        per_layer: bool = False,
        n_layers: int = 2,
        reads_rows: bool = False,
        moves_on: bool = False,
    ) -> None:
        self.reads_rows = reads_rows
        self.state_bytes = 12 if moves_on else 0
        self.max_drop = 0 if moves_on else 10**9
        layers = tuple(LayerShape(i, 4, 2, 10) for i in range(n_layers))
        self.shape = ModelShape("Fake", "fake", 10**6, 257, layers)
        self.per_layer = per_layer
        self.cache_bytes = n_cells * self.shape.row_bytes
        self.arena_bytes: tuple[int, ...] = (self.cache_bytes,)
        self.answers = [*answers]
        self.replayed: list[bytes] = []
        self.fed = b""
        self.clear()

    def clear(self) -> None:
        self.composed = [np.zeros((2, 0), np.int64) for _ in self.shape.layers]
        self.live: list[int] = []
        self.position = 0
        self.state = 0  # of all tokens, in their order, like that of a recurrent layer
        self.answer_left: list[int] = []  # of what is being said

    def layout(self) -> CacheLayout:
        composed = tuple(c.shape[1] for c in self.composed)
        used = sum(k + len(self.live) for k in composed) * 10
        free = (self.arena_bytes[0] - used) // self.shape.row_bytes
        return CacheLayout(composed, len(self.live), free, self.position)

    def decode(self, tokens: Sequence[int], progress: Progress | None = None, *, logits: bool = True) -> None:
        if len(tokens) > self.layout().n_free:
            raise ContextFull("fake cache is full")
        for n, token in enumerate(tokens, 1):
            self.live.append(token)
            self.fed += bytes([token])
            self.position += 1
            self.state = (self.state * 31 + token + 1) % 2**61
            if progress is not None:
                progress(n, len(tokens))

    def sample(self) -> int:
        if not self.answer_left:
            self.answer_left = [*self.answers.pop(0).encode(), END]
        return self.answer_left.pop(0)

    def replay(self, tokens: Sequence[int], seen: AttentionSink) -> None:
        if len(tokens) > self.layout().n_free:
            raise ContextFull("fake cache is full")
        self.replayed.append(bytes(tokens))
        values = np.array(self.live, np.float32) / 256
        heads = np.linspace(0.5, 1, 4, dtype=np.float32)[:, None]
        for i in range(len(self.shape.layers)):
            seen.update(i, (heads * (values if i % 2 == 0 else 1 - values))[:, None], slice(None))

    def live_rows(self, n: int) -> list[tuple[FloatArray, FloatArray]]:
        """Key and value of a token are its number / 256, of even layers, or what is left to 1; one number a head."""
        numbers = np.tile(np.array(self.live[:n], np.float32) / 256, (2, 1))[..., None]
        of_layers = [numbers if i % 2 == 0 else 1 - numbers for i in range(len(self.shape.layers))]
        return [(rows, rows) for rows in of_layers]

    def live_products(self, weights: Sequence[FloatArray | HalfArray], n: int) -> FloatArray:
        return np.concatenate([products(w, *rows) for w, rows in zip(weights, self.live_rows(n), strict=True)])

    def checkpoint(self) -> ByteArray:
        """Position and state."""
        return np.array([self.position, self.state] if self.state_bytes else [], "<i8").view(np.uint8)

    def _back_to(self, position: int, checkpoint: ByteArray | None) -> None:
        if self.state_bytes and position != self.position:
            assert checkpoint is not None, "a state does not go back by itself"
            of, self.state = checkpoint.view("<i8").tolist()
            assert of == position, "a checkpoint of another place"
        self.position = position

    def rewrite(
        self,
        selection: Sequence[Selection],
        n_tail: int,
        n_forgotten: int = 0,
        checkpoint: ByteArray | None = None,
    ) -> None:
        assert not (n_tail and n_forgotten)
        rows = [np.concatenate([c, np.tile(self.live, (2, 1)).astype(np.int64)], axis=1) for c in self.composed]
        self.composed = [np.take_along_axis(r, s, axis=1) for r, s in zip(rows, selection, strict=True)]
        self.live = self.live[len(self.live) - n_tail :]
        self._back_to(self.position - n_forgotten, checkpoint)
        if self.layout().n_free < 0:
            raise ContextFull("the fake cache overflowed")

    def snapshot(self) -> CacheSnapshot:
        rows = [np.concatenate([c, np.tile(self.live, (2, 1))], axis=1).T.astype("<i4") for c in self.composed]
        planes = tuple(np.ascontiguousarray(r).view(np.uint8).reshape(len(r), 8) for r in rows)
        values = tuple(np.zeros((len(r), 2), np.uint8) for r in rows)
        layout = self.layout()
        return CacheSnapshot(layout.composed, layout.n_live, layout.position, planes, values, self.checkpoint())

    def view(self) -> CacheSnapshot:
        return self.snapshot()

    def restore(self, snapshot: CacheSnapshot) -> None:
        if not any(snapshot.composed) and not snapshot.n_live:  # nothing to be of another engine
            self.clear()
            return
        if any((k.shape[1], v.shape[1]) != (8, 2) for k, v in zip(snapshot.keys, snapshot.values, strict=True)):
            raise InvalidInput("not the fake engine's cells")
        self.clear()
        rows = [np.ascontiguousarray(keys).view("<i4").T.astype(np.int64) for keys in snapshot.keys]
        self.composed = [r[:, :k] for r, k in zip(rows, snapshot.composed, strict=True)]
        self.live = rows[0][0, snapshot.composed[0] :].tolist()
        self.position = snapshot.position
        if self.state_bytes:
            self.state = int(snapshot.state.view("<i8")[1])

    def drop_tail(self, n: int, checkpoint: ByteArray | None = None) -> None:
        self.live = self.live[: len(self.live) - n]
        self._back_to(self.position - n, checkpoint)


class FakeModel:
    """Text as UTF-8 bytes, and a template in square brackets."""

    adds_bos = False

    def __init__(self, *, template: bool = True, trims: bool = False, forgets: bool = False) -> None:
        self.template = template
        self.trims = trims
        self.forgets = forgets  # drops thinking from all but the last answer, as Qwen's template does

    @property
    def has_template(self) -> bool:
        return self.template

    template_name = ""
    folds_system = False
    reasoning_format = format_of("fake")

    def use_template(self, name: str) -> None:
        self.template_name = name

    def use_thinking(self, thinking: str | None) -> bool:
        return thinking is None

    def use_format(self, form: Format) -> None:
        self.reasoning_format = form

    def control_text(self, token: int) -> str:
        return ""

    def is_marker(self, text: str) -> bool:
        return False

    def render_chat(
        self, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool, now: datetime | None = None
    ) -> str:
        contents = [m["content"].strip() if self.trims else m["content"] for m in messages]
        for i, message in enumerate(messages):
            if "reasoning" in message and not (self.forgets and i < len(messages) - 1):
                contents[i] = self.reasoning_format.marked(message["reasoning"], contents[i])
        text = "".join(f"[{m['role'][0]}]{c}[/]" for m, c in zip(messages, contents, strict=True))
        return text + "[a]" * add_generation_prompt

    def special_text(self, which: str) -> str:
        return ""

    def tokenize(self, text: str, *, add_bos: bool = False, special: bool = True) -> list[int]:
        return list(text.encode())

    def token_bytes(self, token: int) -> bytes:
        return bytes([token])

    def is_end(self, token: int) -> bool:
        return token == END
