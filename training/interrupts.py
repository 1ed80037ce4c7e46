"""Interrupts (SIGINT, SIGTERM) that wait for a safe point of a loop."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any


class DeferredInterrupts:
    """In its `with` block, holds SIGINT and SIGTERM back until `check()` or the end of the block.

    Python raises `KeyboardInterrupt` between any two bytecodes of the main thread, TensorFlow's own included: in a
    `__del__`, where it is lost, or in the middle of a call, after which a training has crashed with damaged memory.
    A second signal is not held back, so that what hangs can be interrupted. Without handlers in Python, and in other
    threads than the main one, where Python runs no handlers, signals do what they do without this class.
    """

    def __init__(self) -> None:
        self._handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}
        self._held: int | None = None

    def __enter__(self) -> DeferredInterrupts:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                handler = signal.getsignal(number)
                if callable(handler):
                    self._handlers[number] = handler
                    signal.signal(number, self._hold)
        return self

    def __exit__(self, error_type: object, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if error_type is None:
            self.check()

    def check(self) -> None:
        """Call the handler of a signal that was held back; by default it raises `KeyboardInterrupt`."""
        if self._held is not None:
            number, self._held = self._held, None
            self._handlers[number](number, None)

    def _hold(self, number: int, frame: FrameType | None) -> None:
        if self._held is None:
            self._held = number
        else:
            self._handlers[number](number, frame)
