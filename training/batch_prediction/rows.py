"""The rows of a source, one for each image, and their batches."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from image_formats.files import MAX_FILE_BYTES
from image_formats.header import UnreadableImage

BATCH_BYTES = 16 << 20  # files of a batch; bounds the memory of a batch from an archive, and the time that it takes


class Row(NamedTuple):
    """One image of a source.

    Attributes:
        source: its path, its name in an archive, or its row number.
        content: the encoded image, or the path of its file.
        size: of the encoded image in bytes, when the source was listed.
        problem: the reason why there is no content, or an empty string.
    """

    source: str
    content: bytes | str
    size: int
    problem: str = ""

    def read(self) -> bytes:
        """Return the encoded image; raise `UnreadableImage` if it is missing, unreadable or too large."""
        if self.problem:
            raise UnreadableImage(self.problem)
        return self.content if isinstance(self.content, bytes) else _read_file(self.content, self.size)


class Source(Protocol):
    """Where the images come from.

    Attributes:
        count: the number of rows.
        fingerprint: JSON values that change with the images.
    """

    count: int
    fingerprint: dict[str, Any]

    def read(self, start: int) -> Iterator[Row]:
        """Yield the rows from number `start` on, always in the same order."""


def make_batches(rows: Iterable[Row], batch_size: int) -> Iterator[list[Row]]:
    """Yield batches of `batch_size` rows, or fewer where their files reach `BATCH_BYTES`.

    A batch depends only on the rows since the last one, so a run that continues after any batch makes the same ones.
    The outputs of a model can differ in the last bit with the images that share a call.
    """
    batch: list[Row] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += row.size
        if len(batch) == batch_size or size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def describe_excess(size: int) -> str:
    """Return the reason why a file of `size` bytes is not read."""
    return f"the file has {size:,} bytes; the maximum is {MAX_FILE_BYTES:,}"


def as_text(path: str) -> str:
    """Return a path as text; bytes that are not UTF-8 are escaped."""
    return path if path.isascii() else os.fsencode(path).decode(errors="backslashreplace")


def _read_file(path: str, size: int) -> bytes:
    """Read a file that is expected to have `size` bytes."""
    try:
        if size > MAX_FILE_BYTES:
            raise UnreadableImage(describe_excess(size))
        # `os.open`, as a file object takes several times as long. A pipe is not waited for.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        try:
            data = os.read(descriptor, size + 1)
            if len(data) != size:  # it has changed since it was listed, or the system reads less at once
                status = os.fstat(descriptor)
                if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
                    raise UnreadableImage("is not a regular file")  # reading a pipe could wait for ever
                if status.st_size > MAX_FILE_BYTES:
                    raise UnreadableImage(describe_excess(status.st_size))
                data = Path(path).read_bytes()
            return data
        finally:
            os.close(descriptor)
    except FileNotFoundError as error:
        raise UnreadableImage("file not found") from error
    except IsADirectoryError as error:
        raise UnreadableImage("is a folder, not an image") from error
    except OSError as error:
        raise UnreadableImage(f"cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # a NUL in the name
        raise UnreadableImage(f"invalid file name: {error}") from error
