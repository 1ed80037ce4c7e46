"""Sources of encoded images: a tar archive, compressed or not."""

from __future__ import annotations

import itertools
import lzma
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from image_formats.content import HEAD_BYTES, name_format
from image_formats.files import MAX_FILE_BYTES, has_image_suffix, is_system_name
from training.batch_prediction.rows import Row, as_text, describe_excess
from training.errors import PredictionError

_DAMAGES = (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, OSError)


class Archive:
    """The images in a tar archive, in its order; the rules for names are those of folders.

    Raises:
        PredictionError: the archive is damaged or cut off. It is read to the end here, before anything is predicted.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        status = path.stat()
        self.fingerprint: dict[str, Any] = {"archive": path.name, "bytes": status.st_size, "time": status.st_mtime_ns}
        self.count = sum(1 for _ in self._find_members())

    def read(self, start: int) -> Iterator[Row]:
        """See `Source.read`."""
        for archive, member in itertools.islice(self._find_members(), start, None):
            name = as_text(member.name)
            if member.size > MAX_FILE_BYTES:
                yield Row(name, b"", 0, describe_excess(member.size))
            else:
                data = self._read(archive, member, MAX_FILE_BYTES)
                yield Row(name, data, len(data))

    def _find_members(self) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
        try:
            with tarfile.open(self._path, errorlevel=2) as archive:
                while member := archive.next():
                    archive.members.clear()  # type: ignore[attr-defined]  # it would keep all in memory
                    if member.isreg() and self._is_image(archive, member):
                        yield archive, member
        except _DAMAGES as error:
            raise PredictionError(
                f"{self._path} is damaged or cut off ({error}): make the archive again, or unpack what is in it and "
                "name the folder"
            ) from error

    def _is_image(self, archive: tarfile.TarFile, member: tarfile.TarInfo) -> bool:
        if any(map(is_system_name, PurePosixPath(member.name.removeprefix("./")).parts)):
            return False
        return has_image_suffix(member.name) or name_format(self._read(archive, member, HEAD_BYTES)) is not None

    @staticmethod
    def _read(archive: tarfile.TarFile, member: tarfile.TarInfo, size: int) -> bytes:
        file = archive.extractfile(member)
        assert file is not None  # it is a regular file
        with file:
            return file.read(size)
