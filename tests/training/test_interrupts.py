"""Interrupts that are held back until a safe point."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading

import pytest

from training.interrupts import DeferredInterrupts

NUMBERS = [signal.SIGINT, signal.SIGTERM]


class HandledError(Exception):
    """Raised by the handler of the tests."""


@pytest.fixture(autouse=True)
def handlers():
    before = {number: signal.getsignal(number) for number in NUMBERS}

    def handle(number, _frame):
        raise HandledError(number)

    for number in NUMBERS:
        signal.signal(number, handle)
    yield handle
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_is_handled_at_the_next_check(number, handlers):
    with DeferredInterrupts() as interrupts:
        interrupts.check()
        signal.raise_signal(number)
        with pytest.raises(HandledError, match=str(int(number))):
            interrupts.check()
        interrupts.check()  # it was handled
    assert signal.getsignal(number) is handlers


def run_deferred(*steps):
    with DeferredInterrupts():
        for step in steps:
            step()


def test_a_second_signal_is_handled_at_once():
    reached = []
    with pytest.raises(HandledError, match=str(int(signal.SIGINT))):
        run_deferred(
            lambda: signal.raise_signal(signal.SIGTERM),
            lambda: reached.append("after the first"),
            lambda: signal.raise_signal(signal.SIGINT),
            lambda: reached.append("after the second"),
        )
    assert reached == ["after the first"]


def test_a_signal_is_handled_at_the_end_of_the_block(handlers):
    with pytest.raises(HandledError):
        run_deferred(lambda: signal.raise_signal(signal.SIGINT))
    assert signal.getsignal(signal.SIGINT) is handlers


def test_an_error_of_the_block_is_not_replaced(handlers):
    with pytest.raises(IndexError):
        run_deferred(lambda: signal.raise_signal(signal.SIGINT), [].pop)
    assert signal.getsignal(signal.SIGINT) is handlers


def test_signals_without_a_handler_keep_their_action():
    """Ignored ones stay ignored; the default action of SIGTERM ends the process."""
    code = """
import signal, sys
from training.interrupts import DeferredInterrupts
signal.signal(signal.SIGINT, signal.SIG_IGN)
with DeferredInterrupts():
    signal.raise_signal(signal.SIGINT)
print("ignored", flush=True)
with DeferredInterrupts():
    signal.raise_signal(signal.SIGTERM)
"""
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, timeout=60, check=False)
    assert (done.stdout, done.returncode) == ("ignored\n", -signal.SIGTERM)


def test_another_thread_than_the_main_one_changes_no_handler(handlers):
    found = []

    def run():
        with DeferredInterrupts() as interrupts:
            found.append(signal.getsignal(signal.SIGINT))
            interrupts.check()

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [handlers]
