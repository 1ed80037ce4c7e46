"""CIFAR-10's original files: six pickled batches in a folder, or in the archive that they are published in.

Their form is described at https://www.cs.toronto.edu/~kriz/cifar.html. A pickle can run any program, so these are
read by an unpickler that knows numpy's arrays and nothing else.
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
_MAX_BATCH_BYTES = 1 << 26  # the original's have half of that; no archive makes us read more into memory
_READ_BYTES = 1 << 20

# Names in pickles; numpy renamed the first module, and the original has the old name.
_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
}


def read_batches(folder: Path) -> tuple[Split, Split]:
    """Read the training and the test images of an extracted archive, the batches in the order of their numbers.

    Raises:
        DatasetError: a batch is missing, damaged or no batch.
    """

    def read(name: str) -> bytes:
        try:
            return (folder / name).read_bytes()
        except OSError as error:
            raise DatasetError(f"{folder / name} cannot be read: {error.strerror}") from error

    return _join(read, source=folder)


def read_archive(path: Path) -> tuple[Split, Split]:
    """Read the training and the test images out of the archive; nothing is unpacked to the disk.

    Raises:
        DatasetError: the archive is damaged or another one, or a batch in it is missing, damaged or no batch.
    """
    if kind := describe_foreign_file(path):
        raise DatasetError(f"{path} {kind}. CIFAR-10 is read from {ARCHIVE}, from its extracted folder, or from images")
    contents: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r:*") as archive:
            for member in archive:
                folder, _, name = member.name.rpartition("/")
                if not member.isfile() or Path(folder).name != FOLDER or name not in (*TRAIN_FILES, TEST_FILE):
                    continue
                if member.size > _MAX_BATCH_BYTES:
                    raise DatasetError(f"{path}: {member.name} has {member.size:,} bytes, too many for a batch")
                file = archive.extractfile(member)
                assert file is not None
                contents[name] = file.read()
            # The checksum comes last, behind some padding: without it a flipped bit would go unseen.
            while archive.fileobj is not None and archive.fileobj.read(_READ_BYTES):
                pass
    except (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        # Where no way to open it works, the error has a line for each of them.
        reason = f"{error}" if "\n" not in f"{error}" else "it is empty, or its beginning is no archive's"
        raise DatasetError(f"{path} is not a whole tar archive ({reason}): fetch it again") from error

    def read(name: str) -> bytes:
        if name not in contents:
            raise DatasetError(f"{path} has no {FOLDER}/{name}: it is not CIFAR-10's original archive for Python")
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
        raise DatasetError(f"{where}: this is no batch of CIFAR-10: {error or type(error).__name__}") from error
    if isinstance(batch, dict) and {"data", "labels"} <= batch.keys():
        raise DatasetError(
            f"{where}: its keys are text ('data'), and those of CIFAR-10's own batches are bytes (b'data'): it was "
            f"pickled anew by another program. Use the files of the original {ARCHIVE}"
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
    # A row holds the red, the green, then the blue plane.
    images = data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return Split(np.ascontiguousarray(images), np.array(labels, np.int64))


class _BatchUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):  # how Python 3 writes an array's bytes in the original's protocol
            return _encode_latin1
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no batch of CIFAR-10 does")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def _encode_latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it asks for the encoding {encoding!r}, which no numpy array does")
    return text.encode("latin1")
