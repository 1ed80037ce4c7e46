"""Command lines of this package, for messages and reports."""

from __future__ import annotations

import contextlib
import shlex
import sys
from pathlib import Path


def format_command(*words: str | Path) -> str:
    """Return `python -m training` with `words`, quoted for the shell, with the Python that runs this process.

    After `make` that is `.venv/bin/python`, which is not on the PATH.
    """
    python = Path(sys.executable or "python")
    with contextlib.suppress(ValueError, OSError):  # OSError: the working directory is gone
        python = python.relative_to(Path.cwd())
    return shlex.join([str(python), "-m", "training", *map(str, words)])
