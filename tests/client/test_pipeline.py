"""Tests of `map_in_order`: what `Client` cannot show of it."""

from __future__ import annotations

import signal
import threading
import time

import pytest

from client.pipeline import map_in_order


def test_a_signal_that_does_not_wake_the_main_thread_interrupts_it_all_the_same() -> None:
    release, finished = threading.Event(), threading.Event()

    def call(item: int) -> list[int]:
        if item == 1:
            time.sleep(0.5)  # by now the main thread waits for this call
            # Another thread receives the signal, so the wait in the main thread is not interrupted, as when
            # the signal comes just before the wait.
            signal.pthread_kill(threading.get_ident(), signal.SIGINT)
            release.wait(30)
            finished.set()
        return [item]

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        results = map_in_order(call, [0, 1], in_flight=4)
        assert next(results) == 0
        with pytest.raises(KeyboardInterrupt):
            next(results)
        assert not finished.is_set()
    finally:
        signal.signal(signal.SIGINT, before)
        release.set()
