"""`map_in_order` and signals."""

from __future__ import annotations

import signal
import threading
import time

import pytest

from client.batches import map_in_order


def test_signal_in_another_thread_interrupts_the_main_thread() -> None:
    release, finished = threading.Event(), threading.Event()

    def call(item: int) -> list[int]:
        if item == 1:
            time.sleep(0.5)  # until the main thread waits for this call
            # This thread receives the signal, so the wait in the main thread is not interrupted, as if the signal
            # arrived just before the wait.
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
