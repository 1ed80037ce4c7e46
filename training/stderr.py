"""Hides what TensorFlow's C++ code prints at every log level."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def hide_stderr() -> Iterator[None]:
    """Redirect the stderr of the process, not only Python's, to nowhere. Errors that are raised are not affected."""
    sys.stderr.flush()
    stderr = os.dup(2)
    try:
        with Path(os.devnull).open("wb") as devnull:
            os.dup2(devnull.fileno(), 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
