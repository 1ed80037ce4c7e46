"""CIFAR-10: searched in several places and formats, or downloaded."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from training.data.cifar10_batches import ARCHIVE, FOLDER, TEST_FILE, read_archive, read_batches
from training.data.dataset import Dataset, Split
from training.data.download import DownloadError, download
from training.data.image_folder import LAYOUTS, find_image_folders, load_image_folder, read_class_names
from training.errors import DatasetError

CLASS_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
SHA256 = "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"
# Keras 3 extracts into a "-target" folder and keeps the archive beside it; Keras before 3.3 used neither suffix.
_KERAS_PLACES = (
    f"{FOLDER}-target/{FOLDER}",
    FOLDER,
    ARCHIVE,  # our own download
    f"{FOLDER}-target_archive",
    f"{FOLDER}.tar.gz",
)


def load_cifar10(
    data: Path | None, *, seed: int, url: str = URL, sha256: str = SHA256, timeout_s: float = 6.0
) -> Dataset:
    """Load CIFAR-10 from `data`, else from `$CIFAR10_DATA`, else from Keras's cache, else download it there.

    A named place without CIFAR-10 is an error; the next place is not tried.

    Args:
        data: the original archive, its extracted folder, an image folder, or a folder that contains one of these, which
            is searched in the order extracted folder, archive, image folder.
        seed: of the test split of an image folder without one.
        url: of the original archive.
        sha256: of the original archive.
        timeout_s: of the download; see `download`.

    Raises:
        DatasetError: it was not found, or is damaged; the message says what was tried and what to do.
    """
    if data is not None:
        return _load_from(data, seed=seed)
    if named := os.environ.get("CIFAR10_DATA"):
        try:
            return _load_from(Path(named), seed=seed)
        except DatasetError as error:
            raise DatasetError(f"{error}\n(the path comes from the environment variable CIFAR10_DATA)") from error
    cache = Path(os.environ.get("KERAS_HOME") or Path.home() / ".keras") / "datasets"
    for place in _KERAS_PLACES:
        if (cache / place).exists():
            try:
                return _load_from(cache / place, seed=seed)
            except DatasetError as error:
                raise DatasetError(
                    f"{error}\n(this is Keras's cache: remove {cache / place} to download it again)"
                ) from error
    try:
        download(url, cache / ARCHIVE, sha256=sha256, timeout_s=timeout_s)
    except DownloadError as error:
        raise DatasetError(
            "CIFAR-10 was not found:\n"
            "  no path was given (--data, or the environment variable CIFAR10_DATA)\n"
            f"  it is not in Keras's cache, {cache}\n"
            f"  the download of {url} failed: {error}\n"
            "Use one of these:\n"
            f"  make train DATA=/path/to/{ARCHIVE}    (or its extracted folder, or an image folder)\n"
            "  make train DATASET=shapes    (images drawn by this program, no data needed)\n"
            "  make demo    (the same, and serve the model)"
        ) from error
    return _load_from(cache / ARCHIVE, seed=seed)


def _load_from(path: Path, *, seed: int) -> Dataset:
    if path.is_file():
        return _make_dataset(path, read_archive(path))
    if not path.is_dir():
        raise DatasetError(f"{path} does not exist")
    for folder in (path, path / FOLDER):
        if (folder / TEST_FILE).is_file():
            return _make_dataset(folder, read_batches(folder))
    if (path / ARCHIVE).is_file():
        return _make_dataset(path / ARCHIVE, read_archive(path / ARCHIVE))
    found = _find_images(path)
    if not found:
        raise DatasetError(
            f"{path} does not contain CIFAR-10: expected {ARCHIVE}, {FOLDER}/, or an image folder ({LAYOUTS})"
        )
    if len(found) > 1:
        raise DatasetError(f"{path} contains {len(found)} image folders, such as {found[0]} and {found[1]}: name one")
    (folder,) = found
    other = f"To train on it: make train DATASET=folder DATA={shlex.quote(str(folder))}"
    if (names := read_class_names(folder)) != CLASS_NAMES:
        raise DatasetError(
            f"{folder} is an image folder, but not of CIFAR-10: its classes are {', '.join(names[:10])}"
            f"{', ...' if len(names) > 10 else ''}. {other}"
        )
    try:
        dataset = load_image_folder(folder, image_size=None, seed=seed, default_size=None)
    except DatasetError as error:
        raise DatasetError(f"{error}\n(CIFAR-10's images are all 32x32. {other})") from error
    height, width = dataset.train.images.shape[1:3]
    if (height, width) != (32, 32):
        raise DatasetError(f"{folder} has images of {height}x{width}, but CIFAR-10's are 32x32. {other}")
    return Dataset("cifar10", dataset.source, CLASS_NAMES, dataset.train, dataset.test)


def _find_images(path: Path) -> list[Path]:
    """Return the image folders at `path` or directly in it; only those with CIFAR-10's classes, if there are any."""
    if _has_own_classes(path):
        return [path]
    below = [child for child in sorted(path.iterdir()) if child.is_dir() and _has_own_classes(child)]
    return below or find_image_folders(path)


def _has_own_classes(folder: Path) -> bool:
    try:
        return read_class_names(folder) == CLASS_NAMES
    except DatasetError:
        return False


def _make_dataset(source: Path, splits: tuple[Split, Split]) -> Dataset:
    return Dataset("cifar10", str(source), CLASS_NAMES, *splits)
