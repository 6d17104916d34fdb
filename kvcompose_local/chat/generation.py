"""Generates one answer, token by token, and finds out why it ends."""

from __future__ import annotations

import codecs
import time
from collections.abc import Callable, Collection, Iterator, Sequence

from kvcompose_local.chat.memory import CacheMemory
from kvcompose_local.chat.reasoning import Format, Reader, Said
from kvcompose_local.chat.state import TurnStats
from kvcompose_local.chat.text_model import TextModel
from kvcompose_local.chat.transcript import Transcript
from kvcompose_local.errors import ContextFull

#: Models without a template answer as the assistant and then go on as the user.
PLAIN_STOP = "\nUser:"


def generate(
    model: TextModel,
    memory: CacheMemory,
    transcript: Transcript,
    stats: TurnStats,
    max_tokens: int,
    *,
    form: Format,
    draw: Callable[[Reader], int],
    stops: Sequence[str],
    shown: Collection[str],
    should_stop: Callable[[], bool],
    forget: Callable[[], None],
) -> Iterator[Said]:
    """Answer what the cache holds; yields pieces of whole characters.

    Tokens and text are added to the transcript, counts and seconds to ``stats``, whose ``stopped`` says why the answer
    ended. form: how the model marks its thinking; draw: gives the next token of what a reader has read so far; stops:
    texts that end the answer; shown: control tokens that are part of what is said. should_stop is asked between tokens;
    forget makes the cache follow a transcript that lost its last tokens.
    """
    # Tokens are bytes, not characters: one character may span several tokens.
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    said = transcript
    reader = Reader(form, opened=form.opens_at_end(said.fed))
    started, reports = time.perf_counter(), len(memory.reports)
    held, whole = "", said.end  # what may begin a stop text; where what was said and its tokens end alike
    stats.stopped = "interrupt"  # unless the loop says otherwise: the consumer may close this generator
    try:
        while not should_stop():
            if stats.generated_tokens == max_tokens:
                stats.stopped = "length"
                break
            token = draw(reader)
            if model.is_end(token):
                stats.stopped = "end"
                break
            stats.generated_tokens += 1
            control = model.control_text(token)
            held += decoder.decode(model.token_bytes(token) if not control else b"")
            if found := [(at, stop) for stop in stops if (at := held.find(stop)) >= 0]:
                end, stats.stop = min(found)
                said_before, held = held[:end], ""
                yield from reader.take(said_before)
                said.cut(whole)  # the next prompt may begin with the stop text itself
                forget()
                stats.stopped = "end"
                break
            said.tokens.append(token)
            keep = max((_beginning_at_end(stop, held) for stop in stops), default=0)
            piece, held = held[: len(held) - keep], held[len(held) - keep :]
            if piece or control:
                said.fed += piece + control
                # A marker that belongs to no format is fed, since the model said it, and shown to nobody.
                yield from reader.take(piece + control * (control in shown or form.is_part(control)))
            if not held and not decoder.getstate()[0]:
                whole = said.end
            memory.feed([token])
    except ContextFull:
        stats.stopped = "context"
    except KeyboardInterrupt:
        stats.stopped = "interrupt"
    finally:
        spent = sum(report.seconds for report in memory.reports[reports:])
        stats.compactions += len(memory.reports) - reports
        stats.compaction_seconds += spent
        stats.decode_seconds += time.perf_counter() - started - spent
    held += decoder.decode(b"", final=True)
    said.fed += held
    yield from reader.take(held)
    yield from reader.finish()
    if not form.keys and reader.opened:  # the template is silent about thinking, so the model's first use decides
        model.use_format(form.of(reader.opened))


def _beginning_at_end(stop: str, text: str) -> int:
    """How many characters at the end of ``text`` may be the beginning of ``stop``."""
    return next((n for n in range(len(stop), 0, -1) if text.endswith(stop[:n])), 0)
