"""Sources of files: a folder, a pattern, a list. The listing is kept on disk, so that millions of files fit."""

from __future__ import annotations

import glob
import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from image_formats.files import find_image_files
from training.batch_prediction.rows import Row, as_text
from training.errors import PredictionError


class Listing:
    """The files of a source. Each line of its file is JSON: path, size in bytes, time of the last change.

    Args:
        paths: in the order of the rows; `None` for a row without a path.
        file: where the listing is written to.
    """

    def __init__(self, paths: Iterable[str | None], file: Path) -> None:
        self._file = file
        digest = hashlib.sha256()
        count = 0
        with file.open("wb") as stream:
            for path in paths:
                line = json.dumps((path, *_stat(path))).encode() + b"\n"
                digest.update(line)
                stream.write(line)
                count += 1
        self.count = count
        self.fingerprint: dict[str, Any] = {"files": count, "sha256": digest.hexdigest()}

    def read(self, start: int) -> Iterator[Row]:
        """See `Source.read`."""
        with self._file.open("rb") as stream:
            for index, line in enumerate(itertools.islice(stream, start, None), start):
                path, size, _ = json.loads(line)
                if path is None:
                    yield Row(str(index), b"", 0, "the row has no path")
                else:
                    yield Row(as_text(path), path, size)


def _stat(path: str | None) -> tuple[int, int | None]:
    try:
        status = os.stat(path or "")  # noqa: PTH116 - creating a Path for each file is slow
    except (OSError, ValueError):  # ValueError: a NUL in the name
        return 0, None
    return status.st_size, status.st_mtime_ns


def find_images(folder: str) -> Iterator[str]:
    """Return the image files in a folder and below; see `find_image_files`.

    Raises:
        PredictionError: a folder cannot be listed.
    """

    def fail(error: OSError) -> None:
        raise PredictionError(f"{error.filename} cannot be read as a folder: {error.strerror}") from error

    return find_image_files(folder, on_error=fail)


def match_files(pattern: str) -> Iterator[str]:
    """Yield the files that match a pattern, sorted; `**` matches folders to any depth."""
    return filter(os.path.isfile, sorted(glob.iglob(pattern, recursive=True)))  # noqa: PTH207


def read_list(file: Path) -> Iterator[str]:
    """Yield the paths in a list, one a line; empty lines are skipped. The paths are relative to the working folder."""
    with file.open(encoding="utf-8-sig", errors="surrogateescape") as lines:
        for line in lines:
            if path := line.rstrip("\r\n"):
                yield path
