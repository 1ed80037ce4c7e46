"""Write files so that they survive a power cut: contents are synced before a name refers to them, then the folder is.

Without that a file system may keep the name and lose the contents: after a cut the file is there and empty.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from training.errors import StorageFullError

_FULL = (errno.ENOSPC, errno.EDQUOT)
# What file systems answer that cannot sync a folder, among them some network and FUSE ones.
_CANNOT_SYNC = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)


def sync(path: Path) -> None:
    """Flush a file's contents, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not path.is_dir() or error.errno not in _CANNOT_SYNC:
            raise
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Make a folder and its missing parents, durably."""
    if path.is_dir():
        return
    if path.parent != path:
        make_folder(path.parent)
    path.mkdir(exist_ok=True)
    sync(path.parent)


def write_file(path: Path, content: bytes) -> None:
    """Write a file durably, whole or not at all."""
    # One name for all tries: what a killed process left is written over by the next.
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
    """Return whether `error` says that the disk or a quota is full; TensorFlow says so in words only."""
    return getattr(error, "errno", None) in _FULL or any(os.strerror(number) in str(error) for number in _FULL)


@contextlib.contextmanager
def explain_full_storage(path: Path, advice: str) -> Iterator[None]:
    """Turn the errors of a full disk into a `StorageFullError` that names `path` and ends with `advice`."""
    try:
        yield
    except StorageFullError:
        raise
    except Exception as error:  # OSError, or one of TensorFlow's, which is not imported for this
        if not is_full(error):
            raise
        raise StorageFullError(f"no space is left for {path}. {advice}") from error
