"""`ModelWatcher`: the thread that loads the models, then polls for new, changed and deleted versions."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from serving.inference.liveness import Liveness
from serving.inference.repository import ModelRepository
from serving.memory import MemoryBudget
from serving.process import configure_tensorflow

logger = logging.getLogger("serving")


class ModelWatcher:
    """Loads the models of a repository in a thread, keeps them up to date, and adapts the memory budget to them."""

    def __init__(
        self, repository: ModelRepository, memory: MemoryBudget, liveness: Liveness, *, poll_interval_s: float
    ) -> None:
        self._repository = repository
        self._memory = memory
        self._liveness = liveness
        self._poll_interval_s = poll_interval_s
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._has_tried = threading.Event()

    def start(
        self, *, before_load: Callable[[], None] = lambda: None, on_error: Callable[[Exception], None] | None = None
    ) -> None:
        """Start the thread, unless it is started.

        Args:
            before_load: called in the thread first.
            on_error: called with what `before_load` or the first load raises, after which the thread ends. By default
                the error is logged.
        """
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, args=(before_load, on_error or _log_error), name="models", daemon=True
                )
                self._liveness.watch_thread(self._thread)
                self._thread.start()

    def wait_for_first_load(self, timeout_s: float) -> bool:
        """Wait until every model had its first load attempt; returns False at the timeout."""
        return self._has_tried.wait(timeout_s)

    @property
    def has_tried(self) -> bool:
        """Whether every model had its first load attempt."""
        return self._has_tried.is_set()

    def _run(self, before_load: Callable[[], None], on_error: Callable[[Exception], None]) -> None:
        try:
            configure_tensorflow()
            before_load()
            self._repository.load()
            self._memory.adapt(in_use=True)
        except Exception as error:
            on_error(error)
            return
        finally:
            self._has_tried.set()
        logger.info("memory budget: %s MB for all requests", f"{self._memory.total_bytes / 1e6:,.0f}")
        if reason := self._repository.not_ready_because:
            logger.error("not ready: %s", reason)
        else:
            logger.info("ready")
        self._repository.poll_forever(self._poll_interval_s)


def _log_error(error: Exception) -> None:
    logger.error("the models could not be loaded", exc_info=error)
