"""CIFAR-10: found on disk or downloaded, as its original archive, its batches, or an image folder.

The original is described at https://www.cs.toronto.edu/~kriz/cifar.html.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import pickle
import queue
import tarfile
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from rich.console import Console
from rich.progress import Progress

from training.datasets.dataset import Dataset, Split
from training.datasets.image_folder import is_image_folder, load_image_folder
from training.errors import DatasetError

CLASS_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
SHA256 = "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"
_ARCHIVE = "cifar-10-python.tar.gz"
_BATCHES = "cifar-10-batches-py"
_TRAIN_FILES = tuple(f"data_batch_{number}" for number in range(1, 6))
_TEST_FILE = "test_batch"
# Where Keras keeps its copy: since 3.0 in a folder of this name, before that beside its archive.
_KERAS_PLACES = (f"{_BATCHES}-target/{_BATCHES}", _BATCHES, _ARCHIVE, f"{_BATCHES}.tar.gz")


def load_cifar10(
    data: Path | None, *, seed: int, url: str = URL, sha256: str = SHA256, timeout_s: float = 5.0
) -> Dataset:
    """Load CIFAR-10 from `data`, else from `$CIFAR10_DATA`, else from Keras's cache, else download it.

    A place that was named and holds no CIFAR-10 is an error; the next place is not tried then.

    Args:
        data: the original archive, its extracted folder, an image folder, or a folder that holds one of these (looked
            for in this order: extracted folder, archive, image folder).
        seed: of the test split, for an image folder that has none.
        url: where the original archive is.
        sha256: what the archive's SHA-256 must be.
        timeout_s: how long to wait for an answer, and then for each next piece of the download.

    Raises:
        DatasetError: it is nowhere, or what is there is damaged; the message says what was tried and what would work.
    """
    named = data or (Path(os.environ["CIFAR10_DATA"]) if os.environ.get("CIFAR10_DATA") else None)
    if named is not None:
        return _load_from(named, seed=seed)
    cache = _keras_cache()
    for place in _KERAS_PLACES:
        if (cache / place).exists():
            return _load_from(cache / place, seed=seed)
    try:
        return _load_from(_download(url, cache / _ARCHIVE, sha256=sha256, timeout_s=timeout_s), seed=seed)
    except httpx.HTTPError as error:
        raise DatasetError(
            "CIFAR-10 was not found:\n"
            "  no path was given (--data, or the environment variable CIFAR10_DATA)\n"
            f"  Keras's cache, {cache}, does not have it\n"
            f"  the download of {url} failed: {error or type(error).__name__}\n"
            "Any of these would work:\n"
            f"  make train DATA=/path/to/{_ARCHIVE}    (or its extracted folder, or an image folder)\n"
            "  make train DATASET=shapes    (images drawn by this program, no data needed)\n"
            "  make demo    (the same, then served)"
        ) from error


def _keras_cache() -> Path:
    home = os.environ.get("KERAS_HOME")
    return (Path(home) if home else Path.home() / ".keras") / "datasets"


def _load_from(path: Path, *, seed: int) -> Dataset:
    if path.is_file():
        return _load_archive(path)
    if not path.is_dir():
        raise DatasetError(f"there is no file or folder {path}")
    if (path / _TEST_FILE).is_file():
        return _load_batches(path)
    if (path / _BATCHES / _TEST_FILE).is_file():
        return _load_batches(path / _BATCHES)
    if (path / _ARCHIVE).is_file():
        return _load_archive(path / _ARCHIVE)
    images = [folder for folder in (path, *sorted(path.iterdir())) if folder.is_dir() and is_image_folder(folder)]
    if not images:
        raise DatasetError(
            f"{path} holds no CIFAR-10: expected {_ARCHIVE}, {_BATCHES}/, or an image folder "
            "(train/<class>/* and test/<class>/*, or <class>/*)"
        )
    dataset = load_image_folder(images[0], image_size=None, seed=seed)
    if dataset.class_names != CLASS_NAMES or dataset.train.images.shape[1:] != (32, 32, 3):
        height, width = dataset.train.images.shape[1:3]
        raise DatasetError(
            f"{images[0]} is an image folder, but not of CIFAR-10: its images are {height}x{width}, its classes "
            f"{', '.join(dataset.class_names[:12])}. To train on it: make train DATASET=folder DATA={images[0]}"
        )
    return Dataset("cifar10", dataset.source, CLASS_NAMES, dataset.train, dataset.test)


def _load_batches(folder: Path) -> Dataset:
    def read(name: str) -> bytes:
        try:
            return (folder / name).read_bytes()
        except OSError as error:
            raise DatasetError(f"{folder / name} cannot be read: {error.strerror}") from error

    return _assemble(read, source=folder)


def _load_archive(path: Path) -> Dataset:
    contents: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r:*") as archive:
            # Read by name and never unpacked, so nothing in the archive decides where anything is written.
            for member in archive:
                folder, _, name = member.name.rpartition("/")
                if member.isfile() and folder.endswith(_BATCHES) and name in (*_TRAIN_FILES, _TEST_FILE):
                    file = archive.extractfile(member)
                    assert file is not None
                    contents[name] = file.read()
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DatasetError(f"{path} is not a whole tar archive ({error}): remove it, or fetch it again") from error

    def read(name: str) -> bytes:
        if name not in contents:
            raise DatasetError(f"{path} has no {_BATCHES}/{name}: it is not the original CIFAR-10 archive for Python")
        return contents[name]

    return _assemble(read, source=path)


def _assemble(read: Callable[[str], bytes], *, source: Path) -> Dataset:
    batches = [_parse_batch(read(name), where=f"{source}, {name}") for name in _TRAIN_FILES]
    train = Split(
        np.concatenate([batch.images for batch in batches]), np.concatenate([batch.labels for batch in batches])
    )
    test = _parse_batch(read(_TEST_FILE), where=f"{source}, {_TEST_FILE}")
    return Dataset("cifar10", str(source), CLASS_NAMES, train, test)


class _BatchUnpickler(pickle.Unpickler):
    """Reads pickles that hold plain values and numpy arrays: a pickle can otherwise run any program."""

    _ALLOWED = (
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):  # how Python 3 writes an array's bytes in the original's protocol
            return _encode_latin1
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no batch of CIFAR-10 does")
        # The modules' present name; the original batches have the old one.
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def _encode_latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it asks for the encoding {encoding!r}, which no numpy array does")
    return text.encode("latin1")


def _parse_batch(content: bytes, *, where: str) -> Split:
    try:
        batch = _BatchUnpickler(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:  # a damaged pickle can raise anything
        raise DatasetError(f"{where}: this is no batch of CIFAR-10: {error or type(error).__name__}") from error
    data, labels = (batch.get(key) for key in (b"data", b"labels")) if isinstance(batch, dict) else (None, None)
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3072:
        raise DatasetError(f"{where}: expected a dictionary with 'data' of uint8 (n, 3072)")
    if (
        not isinstance(labels, list)
        or len(labels) != len(data)
        or not all(isinstance(label, int) and 0 <= label < len(CLASS_NAMES) for label in labels)
    ):
        raise DatasetError(f"{where}: expected 'labels', {len(data)} whole numbers from 0 to {len(CLASS_NAMES) - 1}")
    # A row holds the red, the green, then the blue plane.
    images = data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return Split(np.ascontiguousarray(images), np.array(labels, np.int64))


def _download(url: str, path: Path, *, sha256: str, timeout_s: float) -> Path:
    """Download to `path`, which appears only once the whole file is there and its SHA-256 is right."""
    path.parent.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True)
    digest = hashlib.sha256()
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}-", delete=False) as file:
        try:
            with (
                httpx.Client(timeout=timeout_s, follow_redirects=True) as client,
                _first_answer(client, url, timeout_s=timeout_s) as response,
                Progress(console=console, transient=True, disable=not console.is_terminal) as progress,
            ):
                response.raise_for_status()
                task = progress.add_task(f"downloading {url}", total=int(response.headers.get("content-length", 0)))
                for piece in response.iter_bytes(1 << 18):
                    file.write(piece)
                    digest.update(piece)
                    progress.advance(task, len(piece))
            if digest.hexdigest() != sha256:
                raise DatasetError(
                    f"what {url} sent is not the original CIFAR-10: "
                    f"its SHA-256 is {digest.hexdigest()}, expected {sha256}"
                )
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise
    return path


@contextmanager
def _first_answer(client: httpx.Client, url: str, *, timeout_s: float) -> Iterator[httpx.Response]:
    """Ask for `url`, and give up after `timeout_s` whatever it is that hangs."""
    # Looking up a name can hang for a minute where there is no network, and no timeout reaches into it: the asking is
    # done by a thread that can be left behind.
    answers: queue.SimpleQueue[httpx.Response | httpx.HTTPError] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put(client.send(client.build_request("GET", url), stream=True))
        except httpx.HTTPError as error:
            answers.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        answer = answers.get(timeout=timeout_s)
    except queue.Empty:
        raise httpx.ConnectTimeout(f"no answer within {timeout_s:g} s") from None
    if isinstance(answer, httpx.HTTPError):
        raise answer
    with contextlib.closing(answer):
        yield answer
