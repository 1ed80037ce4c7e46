"""Retries of failed model loads: after any change of the files, otherwise with exponential backoff."""

from __future__ import annotations

import stat
import time
from dataclasses import dataclass
from pathlib import Path

FIRST_DELAY_S = 5.0
LONGEST_DELAY_S = 300.0
MAX_ENTRIES = 10_000  # of a stamp: a symbolic link may lead to the whole file system

Stamp = frozenset[tuple[str | int, ...]]
_Key = tuple[str, int]  # a model and its version


@dataclass
class _Failure:
    stamp: Stamp
    count: int
    retry_at_s: float  # a `time.monotonic()` timestamp


class Retries:
    """Stores the versions that failed to load, with the stamps of their files."""

    def __init__(self) -> None:
        self._failures: dict[_Key, _Failure] = {}

    def is_due(self, key: _Key, stamp: Stamp) -> bool:
        """Return True if a version has not failed yet, its files have changed, or its backoff delay is over."""
        failure = self._failures.get(key)
        return failure is None or failure.stamp != stamp or time.monotonic() >= failure.retry_at_s

    def record_failure(self, key: _Key, stamp: Stamp) -> None:
        """Record a failure. Each failure with unchanged files doubles the delay (exponential backoff)."""
        failure = self._failures.get(key)
        count = failure.count if failure is not None and failure.stamp == stamp else 0
        delay_s = min(LONGEST_DELAY_S, FIRST_DELAY_S * 2.0 ** min(count, 30))
        self._failures[key] = _Failure(stamp, count + 1, time.monotonic() + delay_s)

    def forget(self, key: _Key) -> None:
        """Remove the failures of a version that has been loaded."""
        self._failures.pop(key, None)

    def forget_missing(self, name: str, found: set[int]) -> None:
        """Remove the failures of versions that are no longer on disk."""
        for key in [key for key in self._failures if key[0] == name and key[1] not in found]:
            del self._failures[key]


def read_stamp(path: Path) -> Stamp:
    """Return a value that changes with the contents, names, permissions and link targets under `path`."""
    stamp: set[tuple[str | int, ...]] = set()
    seen: set[tuple[int, int]] = set()
    remaining = [path]
    while remaining and len(stamp) < MAX_ENTRIES:
        entry = remaining.pop()
        try:
            status = entry.stat()
            # Unlike mtime, ctime also changes with mode and owner, and cannot be set back.
            times = (status.st_mtime_ns, status.st_ctime_ns)
            stamp.add((str(entry), status.st_dev, status.st_ino, status.st_mode, status.st_size, *times))
            inode = (status.st_dev, status.st_ino)
            if not stat.S_ISDIR(status.st_mode) or inode in seen:  # seen: a link to a parent folder
                continue
            seen.add(inode)
            remaining.extend(entry.iterdir())
        except OSError as error:  # deleted, unreadable, or a broken link, which may change
            stamp.add((str(entry), error.errno or 0))
    return frozenset(stamp)
