"""The files of a version: stamps that change with them, retries of failed loads, and verification of checksums.

TensorFlow verifies only the contents of variables: a flipped bit in `saved_model.pb` can change predictions. The
optional `assets.extra/SHA256SUMS` has the format of `sha256sum`. Unlisted files, for example warm-up records that were
added later, are not verified.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from serving.errors import ModelLoadError

FIRST_DELAY_S = 5.0
LONGEST_DELAY_S = 300.0
MAX_ENTRIES = 10_000  # of a stamp: a symbolic link may lead to the whole file system
SUMS_FILE = Path("assets.extra", "SHA256SUMS")
MAX_SUMS_BYTES = 16 * 1024 * 1024
_LINE = re.compile(r"([0-9a-fA-F]{64}) [ *](.+)")
_SHOWN_AT_MOST = 5

Stamp = frozenset[tuple[str | int, ...]]
_Key = tuple[str, int]  # a model and its version


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


def read_model_stamp(path: Path) -> Stamp:
    """Return a value that changes with the SavedModel in `path`, but not with other files such as warm-up records."""
    names = ("saved_model.pb", "saved_model.pbtxt", "variables", "assets")
    return frozenset().union(*(read_stamp(path / name) for name in names))


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


def read_file(file: Path, *, max_bytes: int) -> bytes:
    """Read a small file of a version.

    Raises:
        ModelLoadError: it is missing, unreadable, too large, or not a regular file.
    """
    try:
        if not stat.S_ISREG(file.stat().st_mode):  # opening a pipe would block
            raise ModelLoadError(f"{file} is not a regular file", code="FAILED_PRECONDITION")
        with file.open("rb") as stream:
            content = stream.read(max_bytes + 1)
    except OSError as error:
        raise ModelLoadError(f"cannot read {file}: {error.strerror or error}") from error
    if len(content) > max_bytes:
        raise ModelLoadError(f"{file} is larger than {max_bytes:,} bytes", code="DATA_LOSS")
    return content


def has_checksums(path: Path) -> bool:
    """Return True if a version has checksums, even if they are unreadable."""
    return os.path.lexists(path / SUMS_FILE)  # False without permission for the folder


class Verification:
    """Verifies a version in a background thread, so that large files do not delay other models.

    `stamp` is the version's `read_stamp` before the verification; `notify` is called in the thread when it is done.
    `verify` raises ModelLoadError; by default it is `verify_checksums`.
    """

    def __init__(
        self, path: Path, stamp: Stamp, notify: Callable[[], None], *, verify: Callable[[Path], None] | None = None
    ) -> None:
        self.stamp = stamp
        self.error: BaseException | None = None
        self._path = path
        self._notify = notify
        self._verify = verify or verify_checksums
        self._done = threading.Event()
        threading.Thread(target=self._run, name=f"verify {path.name}", daemon=True).start()

    @property
    def done(self) -> bool:
        """True when `error` is final."""
        return self._done.is_set()

    def wait(self, timeout_s: float) -> None:
        """Wait until the verification is done or the timeout expires."""
        self._done.wait(timeout_s)

    def _run(self) -> None:
        try:
            self._verify(self._path)
        except BaseException as error:  # raised where the version is loaded
            self.error = error
        self._done.set()
        self._notify()


def verify_checksums(path: Path, *, only: Collection[Path] | None = None) -> None:
    """Compare the files of a version with its checksums, if it has any.

    Args:
        path: the version's folder.
        only: the files to verify, relative to the folder; by default all listed files.

    Raises:
        ModelLoadError: a file differs from its checksum, is missing or unreadable, or SHA256SUMS is damaged. The
            message names the file.
    """
    if not has_checksums(path):
        return
    problems = []
    for name, expected in _read_sums(path / SUMS_FILE).items():
        if only is not None and Path(name) not in only:
            continue
        if problem := _verify_file(path / name, expected):
            problems.append(f"{name} {problem}")
    if problems:
        shown = "; ".join(problems[:_SHOWN_AT_MOST])
        more = f"; and {len(problems) - _SHOWN_AT_MOST} more" if len(problems) > _SHOWN_AT_MOST else ""
        raise ModelLoadError(
            f"{path} differs from its export: {shown}{more}. Copy or export the version again; if the change is "
            f"intended, delete {SUMS_FILE}",
            code="DATA_LOSS",
        )


def _read_sums(file: Path) -> dict[str, str]:
    """Read the checksum of each file; names are relative to the version's folder."""
    content = read_file(file, max_bytes=MAX_SUMS_BYTES)
    sums: dict[str, str] = {}
    for number, line in enumerate(content.decode("utf-8", "replace").split("\n"), 1):
        if not line:
            continue
        match = _LINE.fullmatch(line)
        if match is None or _is_outside(match[2]):
            raise ModelLoadError(
                f"line {number} of {file} is damaged: expected a SHA-256 sum, two spaces, and the name of a file in "
                "the version",
                code="DATA_LOSS",
            )
        sums[match[2]] = match[1].lower()
    if not sums:
        raise ModelLoadError(f"{file} is damaged: it lists no files", code="DATA_LOSS")
    return sums


def _is_outside(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return name.startswith("/") or ".." in parts or "\0" in name


def _verify_file(file: Path, expected: str) -> str:
    """Return an error without the file's name ("is missing"), or an empty string."""
    try:
        if not stat.S_ISREG(file.stat().st_mode):
            return "is not a regular file"
        with file.open("rb") as stream:
            actual = hashlib.file_digest(stream, "sha256").hexdigest()
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    return "" if actual == expected else f"has been altered (its SHA-256 is {actual[:12]}..., not {expected[:12]}...)"
