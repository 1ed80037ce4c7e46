"""Durable file writes: contents are synced before the rename, and the folder after it.

Otherwise a file can be empty after a power failure: the name was written, the contents were not.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from training.errors import StorageFullError

_FULL = (errno.ENOSPC, errno.EDQUOT)
# From file systems that cannot sync a folder, such as some network and FUSE ones.
_CANNOT_SYNC = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)


def sync(path: Path) -> None:
    """Flush a file's contents, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not path.is_dir() or error.errno not in _CANNOT_SYNC:
            raise
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Create a folder and its missing parents, durably."""
    if path.is_dir():
        return
    if path.parent != path:
        make_folder(path.parent)
    path.mkdir(exist_ok=True)
    sync(path.parent)


def write_file(path: Path, content: bytes) -> None:
    """Write a file durably and atomically."""
    # A fixed name: the next write overwrites what a killed process left.
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    partial.replace(path)
    sync(path.parent)


def is_full(error: BaseException) -> bool:
    """Return whether the disk or a quota is full. TensorFlow's errors tell it only in their message."""
    return getattr(error, "errno", None) in _FULL or any(os.strerror(number) in str(error) for number in _FULL)


@contextlib.contextmanager
def explain_full_storage(path: Path, advice: str) -> Iterator[None]:
    """Convert errors of a full disk to a `StorageFullError` with `path` and `advice`."""
    try:
        yield
    except StorageFullError:
        raise
    except Exception as error:  # OSError or a TensorFlow error; TensorFlow is not imported here
        if not is_full(error):
            raise
        raise StorageFullError(f"disk full: cannot write {path}. {advice}") from error
