"""CIFAR-10's original files: six pickled batches, in a folder or in the original archive.

The format is described at https://www.cs.toronto.edu/~kriz/cifar.html. A pickle can run arbitrary code, so the
unpickler here allows numpy arrays only. Missing, damaged and other files raise `DatasetError`.
"""

from __future__ import annotations

import io
import lzma
import pickle
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from training.data.dataset import Split
from training.data.file_kind import describe_foreign_file
from training.errors import DatasetError

ARCHIVE = "cifar-10-python.tar.gz"
FOLDER = "cifar-10-batches-py"
TRAIN_FILES = tuple(f"data_batch_{number}" for number in range(1, 6))
TEST_FILE = "test_batch"
CLASSES = 10
_MAX_BATCH_BYTES = 1 << 26  # twice the size of the original's; limits the memory for any archive
_READ_BYTES = 1 << 20

# Names in pickles. numpy renamed the first module; the original has the old name.
_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
}


def read_batches(folder: Path) -> tuple[Split, Split]:
    """Read training and test images of the extracted archive, in the order of the batches' numbers."""

    def read(name: str) -> bytes:
        try:
            return (folder / name).read_bytes()
        except OSError as error:
            raise DatasetError(f"{folder / name} cannot be read: {error.strerror}") from error

    return _join(read, source=folder)


def read_archive(path: Path) -> tuple[Split, Split]:
    """Read training and test images from the archive, without extracting it to disk."""
    if kind := describe_foreign_file(path):
        raise DatasetError(f"{path} {kind}. CIFAR-10 is read from {ARCHIVE}, its extracted folder, or an image folder")
    contents: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r:*") as archive:
            for member in archive:
                folder, _, name = member.name.rpartition("/")
                if not member.isfile() or Path(folder).name != FOLDER or name not in (*TRAIN_FILES, TEST_FILE):
                    continue
                if member.size > _MAX_BATCH_BYTES:
                    raise DatasetError(f"{path}: {member.name} has {member.size:,} bytes, too large for a batch")
                file = archive.extractfile(member)
                assert file is not None
                contents[name] = file.read()
            # Read up to the checksum at the end, after padding: it detects flipped bits.
            while archive.fileobj is not None and archive.fileobj.read(_READ_BYTES):
                pass
    except (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        # If no format matches, the error has a line for each of them.
        reason = "it is empty, or does not start like an archive" if "\n" in str(error) else error
        raise DatasetError(f"{path} is not a complete tar archive ({reason}): download it again") from error

    def read(name: str) -> bytes:
        if name not in contents:
            raise DatasetError(f"{path} has no {FOLDER}/{name}: it is not CIFAR-10's original Python archive")
        return contents[name]

    return _join(read, source=path)


def _join(read: Callable[[str], bytes], *, source: Path) -> tuple[Split, Split]:
    batches = [_parse_batch(read(name), where=f"{source}, {name}") for name in TRAIN_FILES]
    images = np.concatenate([batch.images for batch in batches])
    labels = np.concatenate([batch.labels for batch in batches])
    return Split(images, labels), _parse_batch(read(TEST_FILE), where=f"{source}, {TEST_FILE}")


def _parse_batch(content: bytes, *, where: str) -> Split:
    try:
        batch = _BatchUnpickler(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:  # a damaged pickle can raise anything
        raise DatasetError(f"{where}: not a CIFAR-10 batch: {error or type(error).__name__}") from error
    if isinstance(batch, dict) and {"data", "labels"} <= batch.keys():
        raise DatasetError(
            f"{where}: its keys are str ('data'), but those of CIFAR-10's batches are bytes (b'data'): it was pickled "
            f"by another program. Use the files of the original {ARCHIVE}"
        )
    if isinstance(batch, dict) and b"fine_labels" in batch:
        raise DatasetError(f"{where}: this is CIFAR-100, not CIFAR-10")
    data, labels = (batch.get(key) for key in (b"data", b"labels")) if isinstance(batch, dict) else (None, None)
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3072:
        raise DatasetError(f"{where}: expected a dictionary with 'data' of uint8 (n, 3072)")
    if (
        not isinstance(labels, list)
        or len(labels) != len(data)
        or not all(type(label) is int and 0 <= label < CLASSES for label in labels)
    ):
        raise DatasetError(f"{where}: expected 'labels', {len(data)} whole numbers from 0 to {CLASSES - 1}")
    # A row contains the red, the green and the blue plane.
    images = data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return Split(np.ascontiguousarray(images), np.array(labels, np.int64))


class _BatchUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):  # Python 3's encoding of array bytes in the original's protocol
            return _encode_latin1
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it imports {module}.{name}, which a CIFAR-10 batch does not")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def _encode_latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it uses the encoding {encoding!r}, which a numpy array does not")
    return text.encode("latin1")
