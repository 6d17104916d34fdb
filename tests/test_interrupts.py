"""Signals, raised in this process at the moments that matter."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from kvcompose_local.interrupts import Interrupts, uninterrupted

ENDING = [signal.SIGTERM, signal.SIGHUP]


@pytest.fixture(autouse=True)
def signals_as_in_a_terminal() -> Iterator[None]:
    """Under nohup these tests would start with one ignored, which is left so."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in ENDING}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", ENDING)
def test_a_signal_that_ends_the_chat_raises_only_where_somebody_waits(number: signal.Signals) -> None:
    interrupts = Interrupts()
    with interrupts.leaving_in_order():
        signal.raise_signal(number)
        assert interrupts.leaving == number
        with pytest.raises(KeyboardInterrupt), interrupts.waiting():
            pytest.fail("waits for what came before")
    interrupts = Interrupts()
    with interrupts.leaving_in_order(), pytest.raises(KeyboardInterrupt), interrupts.waiting():
        signal.raise_signal(number)
    assert interrupts.leaving == number


def test_ctrl_c_does_nothing_where_there_is_nothing_to_stop() -> None:
    interrupts = Interrupts()
    with interrupts.leaving_in_order():
        signal.raise_signal(signal.SIGINT)
        with interrupts.caught():
            assert not interrupts()
            signal.raise_signal(signal.SIGINT)
            assert interrupts()
        with pytest.raises(KeyboardInterrupt), interrupts.waiting():
            signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    assert not interrupts.leaving
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("number", ENDING)
def test_signals_wait_for_the_end_of_a_block_and_none_is_lost(number: signal.Signals) -> None:
    interrupts, done = Interrupts(), []

    def block() -> None:
        with interrupts.waiting(), uninterrupted():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(number)
            done.append(number)

    with interrupts.leaving_in_order():
        handlers = [signal.getsignal(n) for n in (signal.SIGINT, *ENDING)]
        with pytest.raises(KeyboardInterrupt):
            block()
        assert done == [number]
        assert interrupts.leaving == number
        assert [signal.getsignal(n) for n in (signal.SIGINT, *ENDING)] == handlers


def test_what_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        interrupts = Interrupts()
        with interrupts.leaving_in_order():
            signal.raise_signal(signal.SIGHUP)
            assert not interrupts.leaving
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
