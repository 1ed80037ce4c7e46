"""When to try again to load a version that failed: on any change of its files, else after an increasing delay."""

from __future__ import annotations

import stat
import time
from dataclasses import dataclass
from pathlib import Path

FIRST_DELAY_S = 5.0
LONGEST_DELAY_S = 300.0
MAX_ENTRIES = 10_000  # files and folders looked at; a link may lead to the whole file system

Stamp = frozenset[tuple[str | int, ...]]
_Key = tuple[str, int]  # a model and its version


@dataclass
class _Failure:
    stamp: Stamp
    count: int
    retry_at_s: float  # on the clock of `time.monotonic`


class Retries:
    """Remembers the versions that could not be loaded, and how their files were then."""

    def __init__(self) -> None:
        self._failures: dict[_Key, _Failure] = {}

    def is_due(self, key: _Key, stamp: Stamp) -> bool:
        """Whether to load a version: the first time, when its files have changed, or when its delay is over."""
        failure = self._failures.get(key)
        return failure is None or failure.stamp != stamp or time.monotonic() >= failure.retry_at_s

    def record_failure(self, key: _Key, stamp: Stamp) -> None:
        """Remember that a version failed. Each failure of unchanged files doubles the delay until the next attempt."""
        failure = self._failures.get(key)
        count = failure.count if failure is not None and failure.stamp == stamp else 0
        delay_s = min(LONGEST_DELAY_S, FIRST_DELAY_S * 2.0 ** min(count, 30))
        self._failures[key] = _Failure(stamp, count + 1, time.monotonic() + delay_s)

    def forget(self, key: _Key) -> None:
        """Forget the failures of a version: it is loaded, or gone."""
        self._failures.pop(key, None)

    def forget_missing(self, name: str, found: set[int]) -> None:
        """Forget the versions of a model that are not on disk any more."""
        for key in [key for key in self._failures if key[0] == name and key[1] not in found]:
            del self._failures[key]


def read_stamp(path: Path) -> Stamp:
    """Return what changes with anything under `path`: contents, names, permissions, and the targets of links."""
    stamp: set[tuple[str | int, ...]] = set()
    seen: set[tuple[int, int]] = set()
    remaining = [path]
    while remaining and len(stamp) < MAX_ENTRIES:
        entry = remaining.pop()
        try:
            status = entry.stat()
            # The change time (ctime) also changes with the mode and the owner, and cannot be set back as mtime can.
            times = (status.st_mtime_ns, status.st_ctime_ns)
            stamp.add((str(entry), status.st_dev, status.st_ino, status.st_mode, status.st_size, *times))
            inode = (status.st_dev, status.st_ino)
            if not stat.S_ISDIR(status.st_mode) or inode in seen:  # seen: a link back to a folder above
                continue
            seen.add(inode)
            remaining.extend(entry.iterdir())
        except OSError as error:  # gone, unreadable, or a link to nowhere: that too may change
            stamp.add((str(entry), error.errno or 0))
    return frozenset(stamp)
