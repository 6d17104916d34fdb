"""Chats with models of which a part moves on: a chat that was disturbed goes on as if it never had been."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hybrid_shapes import SMALL, WINDOWS
from random_models import RandomModel

from kvcompose_local.chat import Chat
from kvcompose_local.chat.checkpoints import LEAST
from kvcompose_local.chat.memory import CacheMemory
from kvcompose_local.chat.report import CompactionReport
from kvcompose_local.chat.sessions import Setup, load, save
from kvcompose_local.composing.policy import Policy
from kvcompose_local.engines import open_engine
from kvcompose_local.engines.patched import PatchedEngine
from kvcompose_local.interfaces import Sampling
from kvcompose_local.llama_ffi.cells import library_is_patched

pytestmark = pytest.mark.skipif(not library_is_patched(), reason="the library of this run has no patch series")

N_TURNS = 20
POLICY = Policy(n_tail=32, n_headroom=190, n_scratch=32)
SHAPES = SMALL | WINDOWS


class Talk:
    """A chat of twenty turns, of which each is disturbed as it says."""

    def __init__(self, arch: str, folder: Path) -> None:
        self.shape = replace(SHAPES[arch], speaks=True)
        self.folder = folder
        self.done: list[str] = []
        self.rebuilt: list[int] = []
        self.compactions: list[CompactionReport] = []
        self.stops_after: int | None = None
        self.chat = self.opened()

    def opened(self) -> Chat:
        engine, positions = open_engine(
            Path(self.shape.name),
            n_ctx=4096,
            budget=0.3,
            n_threads=1,
            cache_type="f32",
            sampling=Sampling(temperature=0),
            load=lambda _path, **loading: RandomModel(self.shape, **loading),
        )
        memory = CacheMemory(engine, positions, policy=POLICY, on_compaction=self.compactions.append)
        return Chat(engine.model, memory, should_stop=self.stops, on_rebuild=self.rebuilt.append)

    @property
    def engine(self) -> PatchedEngine:
        engine = self.chat.memory.engine
        assert isinstance(engine, PatchedEngine)
        return engine

    def stops(self) -> bool:
        if self.stops_after is None:
            return False
        self.stops_after -= 1
        return self.stops_after < 0

    def say(self, text: str, max_tokens: int = 12) -> str:
        return "".join(self.chat.ask(text, max_tokens=max_tokens))

    def undo(self) -> None:
        self.say("This is taken back.")
        self.chat.undo()

    def undo_twice(self) -> None:
        self.say("Two", max_tokens=4)
        self.say("of them", max_tokens=4)
        self.chat.undo()
        self.chat.undo()

    def regen(self) -> None:
        for _ in range(2):
            "".join(self.chat.ask_again(max_tokens=12))

    def stopped(self) -> None:
        """Ctrl-C in an answer, which is asked for again."""
        self.stops_after = 5
        "".join(self.chat.ask_again(max_tokens=12))
        assert self.chat.turns[-1].stopped == "interrupt"
        self.stops_after = None
        "".join(self.chat.ask_again(max_tokens=12))

    def stopped_reading(self) -> None:
        """Ctrl-C while a message is read: between micro-batches, or before the last token."""
        self.stops_after = 0
        self.say("This is not read to its end. " * 2, max_tokens=4)
        assert self.chat.turns[-1].stopped == "interrupt"
        self.stops_after = None
        self.chat.undo()

    def saved(self) -> None:
        path = self.folder / "chat.kvc"
        model = self.engine.model
        setup = Setup(model.path, "f32", 0.3, model.files)
        save(path, self.chat, setup)
        self.engine.close()
        self.chat = self.opened()
        model = self.engine.model
        load(path, self.chat, Setup(model.path, "f32", 0.3, model.files))
        assert len(self.chat.memory.checkpoints.positions) == LEAST

    def run(self, *, disturbed: bool) -> None:
        kinds = [self.undo, self.regen, self.stopped, self.stopped_reading, self.undo_twice, self.saved]
        for turn in range(N_TURNS):
            n_compactions = len(self.chat.memory.reports)
            self.say(f"What about key {turn * 37 % 11}, keeper?")
            layout = self.engine.layout()
            # What is taken back must be live, and what is said instead must not compact: that is not taken back.
            is_live = len(self.chat.memory.reports) == n_compactions
            if disturbed and is_live and layout.n_free > POLICY.n_scratch + 80:
                kind = kinds[len(self.done) % len(kinds)]
                self.done.append(kind.__name__)
                kind()


@pytest.mark.parametrize("arch", SHAPES)
def test_a_disturbed_chat_goes_on_as_one_that_never_was(arch: str, tmp_path: Path) -> None:
    found = []
    for disturbed in (False, True):
        talk = Talk(arch, tmp_path)
        talk.run(disturbed=disturbed)
        answer = talk.chat.ask("And then?", max_tokens=50)
        "".join(answer)
        found.append((talk.chat.transcript.tokens, talk.compactions, talk.engine.logits()))
        talk.engine.close()
    (tokens, compactions, logits), (same_tokens, same_compactions, same_logits) = found
    assert set(talk.done) == {"undo", "regen", "stopped", "stopped_reading", "undo_twice", "saved"}
    assert len(compactions) >= 5
    assert talk.rebuilt == [], "nothing was read again"
    assert same_tokens == tokens
    assert [report.tokens_seen for report in same_compactions] == [report.tokens_seen for report in compactions]
    # What was taken back was read in pieces, a window's cells come back in another order: sums are rounded otherwise.
    # Of two cells whose scores differ by less either stays. A state that is a token off is off by a tenth and more.
    for report, same in zip(compactions, same_compactions, strict=True):
        np.testing.assert_allclose(same.composed, report.composed, atol=2)
    np.testing.assert_allclose(same_logits, logits, atol=1e-2 * logits.std())
    print(arch, f"{len(compactions)} compactions, {len(tokens)} tokens", talk.done, np.abs(same_logits - logits).max())
