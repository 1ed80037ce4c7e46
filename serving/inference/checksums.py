"""Verifies a version's files against the optional checksums of its export, `assets.extra/SHA256SUMS`.

TensorFlow verifies only the contents of variables: a flipped bit in `saved_model.pb` can change predictions. The file
has the format of `sha256sum`. Unlisted files, for example warm-up records that were added later, are not verified.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import threading
from collections.abc import Callable, Collection
from pathlib import Path, PurePosixPath

from serving.errors import ModelLoadError
from serving.inference.retries import Stamp

SUMS_FILE = Path("assets.extra", "SHA256SUMS")
MAX_SUMS_BYTES = 16 * 1024 * 1024
_LINE = re.compile(r"([0-9a-fA-F]{64}) [ *](.+)")
_SHOWN_AT_MOST = 5


def has_checksums(path: Path) -> bool:
    """Return True if a version has checksums, even if they are unreadable."""
    return os.path.lexists(path / SUMS_FILE)  # False without permission for the folder


class Verification:
    """Verifies a version in a background thread, so that large files do not delay other models.

    Args:
        path: the version's folder.
        stamp: the version's `read_stamp` before the verification.
        notify: called in the background thread when the verification is done.
    """

    def __init__(self, path: Path, stamp: Stamp, notify: Callable[[], None]) -> None:
        self.stamp = stamp
        self.error: BaseException | None = None
        self._path = path
        self._notify = notify
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
            verify_checksums(self._path)
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
    try:
        if not stat.S_ISREG(file.stat().st_mode):  # opening a pipe would block
            raise ModelLoadError(f"{file} is not a regular file", code="FAILED_PRECONDITION")
        with file.open("rb") as stream:
            content = stream.read(MAX_SUMS_BYTES + 1)
    except OSError as error:
        raise ModelLoadError(f"cannot read {file}: {error.strerror or error}") from error
    if len(content) > MAX_SUMS_BYTES:
        raise ModelLoadError(f"{file} is larger than {MAX_SUMS_BYTES:,} bytes", code="DATA_LOSS")
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
