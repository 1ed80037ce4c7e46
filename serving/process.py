"""Effects on the whole process: standard streams, logging, metrics, TensorFlow's environment, and the exit.

Only the command line and `serve` apply them; importing a module changes nothing.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import sys
import threading
from typing import NoReturn

from prometheus_client import disable_created_metrics

from serving.log_format import make_formatter
from serving.log_output import BackgroundHandler
from serving.request_log import COLLECT_S, access_logger

logger = logging.getLogger("serving")

STDOUT, STDERR = 1, 2  # file descriptors

# How long a thread may hold the interpreter's lock while another waits for it. With Python's 5 ms, a model's thread
# would wait for the event loop longer than a call of a small model takes.
SWITCH_INTERVAL_S = 1e-4

_importing = threading.Lock()  # two threads must not import TensorFlow at the same time


def open_standard_streams() -> None:
    """Open closed standard streams to the null device, and ignore errors of broken ones.

    Otherwise the first sockets would get their descriptors, and log lines would be sent to a client.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free descriptor: this one
            setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w", closefd=False))
    logging.raiseExceptions = False


def end_at_early_sigterm() -> None:
    """As the first process of a container, end at SIGTERM until the server handles it: the kernel would ignore it."""
    if os.getpid() == 1:
        signal.signal(signal.SIGTERM, lambda number, _: os._exit(128 + number))


def configure_logging(level: str, *, log_format: str, log_requests: bool, worker: int | None = None) -> None:
    """Write log messages of a level and above to standard error, and the request log to standard output.

    Warnings and uncaught exceptions become log messages.

    Args:
        level: one of `settings.LOG_LEVELS`.
        log_format: one of `log_format.LOG_FORMATS`.
        log_requests: whether there is a request log.
        worker: the number of a worker process, which shares the streams with others.
    """
    formatter = make_formatter(log_format, worker=worker)
    is_shared = worker is not None
    errors = BackgroundHandler(STDERR, is_shared=is_shared)
    errors.setFormatter(formatter)
    logging.basicConfig(level=level.upper(), handlers=[errors])
    logging.captureWarnings(True)
    sys.excepthook = lambda kind, error, traceback: logger.critical("exit", exc_info=(kind, error, traceback))
    threading.excepthook = lambda args: logger.error(
        "thread %s has ended", args.thread.name if args.thread else "", exc_info=args.exc_value
    )
    if log_requests:
        requests = BackgroundHandler(STDOUT, collect_s=COLLECT_S, is_shared=is_shared)
        requests.setFormatter(formatter)
        access_logger.addHandler(requests)
        access_logger.propagate = False


def configure_metrics() -> None:
    """Leave out prometheus_client's `_created` gauge of every counter, which would double the size of the page."""
    disable_created_metrics()  # type: ignore[no-untyped-call]


def configure_tensorflow() -> None:
    """Set TensorFlow's environment variables, unless they are set; before it is imported."""
    # Its own log lines; errors arrive as exceptions, with the reason.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # Convolutions by oneDNN, which TensorFlow itself chooses only on CPUs with AVX-512 VNNI: a third faster on others.
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")


def import_tensorflow() -> None:
    """Import TensorFlow without Keras and without garbage collections: in 0.6 of the time, with 43 MB less.

    TensorFlow imports Keras, and with it Matplotlib, to register Keras' optimizers, which serving never needs. A later
    `import keras` works as usual; one in another thread at this moment would fail, so libraries do not call this.
    """
    configure_tensorflow()
    with _importing:
        hides_keras = "keras" not in sys.modules
        if hides_keras:
            sys.modules["keras"] = None  # type: ignore[assignment]  # how Python marks a module that cannot be imported
        gc.disable()  # each collection would go through all that is imported, which stays
        try:
            import tensorflow  # noqa: F401
        finally:
            gc.enable()
            if hides_keras:
                del sys.modules["keras"]


def exit_process(code: int) -> NoReturn:
    """End the process from any thread, even while a model call hangs."""
    with contextlib.suppress(OSError, ValueError):  # a stream is closed or broken
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
