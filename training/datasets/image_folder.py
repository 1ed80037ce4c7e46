"""Any folder of images sorted by class: `train/<class>/*` and `test/<class>/*`, or one level of `<class>/*`."""

from __future__ import annotations

import logging
import os
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track

from training.datasets.dataset import Dataset, Split
from training.datasets.image_file import is_image_file, read_image
from training.errors import DatasetError
from training.memory import require_memory

TEST_FRACTION = 0.1  # of a folder without a test split
LAYOUTS = "train/<class>/* and test/<class>/*, or <class>/*"
# What file managers leave behind, hidden files apart.
_LITTER = ("thumbs.db", "desktop.ini", "__macosx")
_SHOWN_AT_MOST = 5

logger = logging.getLogger(__name__)


def find_image_folders(folder: Path) -> list[Path]:
    """Return `folder` if it holds images by class, in either layout; else those folders right in it that do.

    A layout is known by the folders `train/<class>/`, or by a folder with image files in it, which are known by their
    content.

    Raises:
        DatasetError: the folder is missing or cannot be listed.
    """
    if _is_image_folder(folder):
        return [folder]
    return [path for path in _subfolders(folder) if _is_image_folder(path)]


def read_class_names(folder: Path) -> tuple[str, ...]:
    """Return the class names of a folder found by `find_image_folders`, sorted.

    Raises:
        DatasetError: there are fewer than two, or one is not UTF-8.
    """
    by_class = folder / "train" if _has_splits(folder) else folder
    names = tuple(path.name for path in _subfolders(by_class))
    for name in names:
        if not _is_text(name):
            raise DatasetError(
                f"{_shown(by_class / name)} cannot be a class: its name is not UTF-8, as labels are. Rename the folder"
            )
    if len(names) < 2:
        raise DatasetError(
            f"{by_class} has {'one class folder' if names else 'no class folders'}; at least 2 are needed"
        )
    if {"train", "test"} <= set(names):
        raise DatasetError(
            f"{by_class} has images right in train/ and test/: put them into a folder for each class, {LAYOUTS}"
        )
    return names


def load_image_folder(folder: Path, *, image_size: tuple[int, int] | None, seed: int) -> Dataset:
    """Load every image of a folder.

    Every file in a class's folder has to be an image. Only what file managers leave behind is passed over: files and
    folders whose names begin with a dot (`.DS_Store`, `._cat.jpg`), `__MACOSX`, `Thumbs.db` and `desktop.ini`. Files
    that lie beside the folders of the classes belong to no class and are not looked at. Without a test folder, a tenth
    of each class is set aside for testing.

    Args:
        folder: `train/<class>/*` and `test/<class>/*`, or `<class>/*`, or a folder that holds just one such folder.
        image_size: (height, width) to resize to, antialiased bilinear; `None` if all images are alike.
        seed: which images are set aside where there is no test folder.

    Raises:
        DatasetError: no such folder, a damaged file, an empty class, a class missing in `test/`, too few images in a
            class, or images of several sizes and no `image_size`. The message names the file or class.
    """
    found = find_image_folders(folder)
    if not found:
        raise DatasetError(f"{folder} is no image folder, and holds none: expected {LAYOUTS}")
    if len(found) > 1:
        raise DatasetError(f"{folder} holds {len(found)} image folders, {_listed(found)}: name one of them")
    return _load_splits(found[0], image_size) if _has_splits(found[0]) else _load_and_split(found[0], image_size, seed)


def _load_splits(folder: Path, image_size: tuple[int, int] | None) -> Dataset:
    class_names = read_class_names(folder)
    if not (folder / "test").is_dir():
        raise DatasetError(
            f"{folder} has train/ but no test/: make one with the same classes, or name {folder / 'train'} "
            "itself, and a tenth of it is set aside for testing"
        )
    if others := [path.name for path in _subfolders(folder) if path.name not in ("train", "test")]:
        logger.warning("only train/ and test/ are read of %s, not %s", folder, _listed(others))
    test_classes = [path.name for path in _subfolders(folder / "test")]
    if missing := [name for name in class_names if name not in test_classes]:
        raise DatasetError(f"{folder / 'test'} lacks the {_classes(missing)} that {folder / 'train'} has")
    if unknown := [name for name in test_classes if name not in class_names]:
        raise DatasetError(f"{folder / 'test'} has the {_classes(unknown)} that {folder / 'train'} does not have")
    paths, labels = _list_classes(folder / "train", class_names, at_least=2, needed_for="to train and validate")
    test_paths, test_labels = _list_classes(folder / "test", class_names, at_least=1, needed_for="to test")
    images = _read_images([*paths, *test_paths], image_size=image_size, folder=folder)
    train, test = Split(images[: len(paths)], labels), Split(images[len(paths) :], test_labels)
    return Dataset(folder.resolve().name, _shown(folder), class_names, train, test)


def _load_and_split(folder: Path, image_size: tuple[int, int] | None, seed: int) -> Dataset:
    class_names = read_class_names(folder)
    paths, labels = _list_classes(folder, class_names, at_least=3, needed_for="to train, validate and test")
    images = _read_images(paths, image_size=image_size, folder=folder)
    rng = np.random.default_rng(seed)
    is_test = np.zeros(len(labels), bool)
    for class_id in range(len(class_names)):
        members = np.flatnonzero(labels == class_id)
        is_test[rng.choice(members, max(1, round(TEST_FRACTION * len(members))), replace=False)] = True
    source = f"{_shown(folder)} (a tenth set aside for testing, seed {seed})"
    train, test = Split(images[~is_test], labels[~is_test]), Split(images[is_test], labels[is_test])
    return Dataset(folder.resolve().name, source, class_names, train, test)


def _list_classes(
    folder: Path, class_names: Sequence[str], *, at_least: int, needed_for: str
) -> tuple[list[Path], np.ndarray]:
    """Return the files of all classes, by class and then by name, and their labels."""
    files = {name: _list(folder / name) for name in class_names}
    if empty := [name for name in class_names if not files[name]]:
        raise DatasetError(f"{folder} has no images in the {_classes(empty)}")
    for name in class_names:
        if other := [path for path in files[name] if not path.is_file()]:
            kind = "a folder" if other[0].is_dir() else "no regular file"
            raise DatasetError(f"{other[0]} is {kind}; the folder of a class holds images and nothing else")
        if len(files[name]) < at_least:
            raise DatasetError(
                f"{folder} has too few images in the class {name!r}: {len(files[name])}, and at least {at_least} are "
                f"needed, {needed_for}"
            )
    labels = np.repeat(np.arange(len(class_names), dtype=np.int64), [len(files[name]) for name in class_names])
    return [path for name in class_names for path in files[name]], labels


def _read_images(paths: Sequence[Path], *, image_size: tuple[int, int] | None, folder: Path) -> np.ndarray:
    """Read all files, which must come out as one (height, width); return uint8 (n, height, width, 3)."""
    images: np.ndarray | None = None
    first = paths[0]
    damaged: list[str] = []
    # Closed here on an error: else its threads would go on until all files are read.
    with closing(_decode(paths, image_size, folder)) as decoded:
        for row, (path, image) in enumerate(zip(paths, decoded, strict=True)):
            if isinstance(image, DatasetError):
                damaged.append(str(image))
                continue
            if images is None:
                images, first = _allocate(len(paths), image), path
            if image.shape != images.shape[1:]:
                # At once: reading all of what may be many large photos would only tell the same.
                ours, theirs = (f"{height}x{width}" for height, width, _ in (images.shape[1:], image.shape))
                raise DatasetError(
                    f"the images in {folder} differ in size (height x width): {first} is {ours}, {path} is {theirs}. "
                    f"Choose one size with --image-size HEIGHTxWIDTH, such as --image-size {ours}"
                )
            images[row] = image
    if damaged:
        more = f"\n  and {len(damaged) - _SHOWN_AT_MOST} more" if len(damaged) > _SHOWN_AT_MOST else ""
        shown = "".join(f"\n  {message}" for message in damaged[:_SHOWN_AT_MOST])
        raise DatasetError(f"{len(damaged)} of {len(paths):,} files cannot be used; mend or remove them:{shown}{more}")
    assert images is not None
    return images


def _decode(
    paths: Sequence[Path], image_size: tuple[int, int] | None, folder: Path
) -> Generator[np.ndarray | DatasetError]:
    def read(path: Path) -> np.ndarray | DatasetError:
        try:
            return read_image(path, image_size=image_size)
        except DatasetError as error:
            return error

    console = Console(stderr=True)
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        yield from track(
            pool.map(read, paths),
            f"reading {folder}",
            total=len(paths),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
    finally:
        pool.shutdown(cancel_futures=True)


def _allocate(count: int, image: np.ndarray) -> np.ndarray:
    try:
        require_memory(
            # Split into training and test images, they are copied.
            2 * count * image.nbytes,
            f"{count:,} images of {image.shape[0]}x{image.shape[1]}",
            advice="make them smaller with --image-size HEIGHTxWIDTH",
        )
        return np.empty((count, *image.shape), np.uint8)
    except MemoryError as error:
        height, width, _ = image.shape
        raise DatasetError(
            f"{count:,} images of {height}x{width} need {count * image.size / 2**30:,.1f} GiB of memory, more than "
            "there is: make them smaller with --image-size HEIGHTxWIDTH"
        ) from error


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # bytes of a file name that are not UTF-8 become surrogates
        return False
    return True


def _shown(path: Path) -> str:
    """Return a path as text, with escapes for what is not UTF-8."""
    return os.fsencode(path).decode(errors="backslashreplace")


def _is_image_folder(folder: Path) -> bool:
    return _has_splits(folder) or any(
        is_image_file(path) for subfolder in _subfolders(folder) for path in _list(subfolder)
    )


def _has_splits(folder: Path) -> bool:
    # A class may be called "train": then there are images in it and no folders.
    return (folder / "train").is_dir() and bool(_subfolders(folder / "train"))


def _subfolders(folder: Path) -> list[Path]:
    return [path for path in _list(folder) if path.is_dir()]


def _list(folder: Path) -> list[Path]:
    """Return what a folder holds, by name, without what file managers leave behind."""
    try:
        paths = sorted(folder.iterdir())
    except OSError as error:
        raise DatasetError(f"{folder} cannot be read as a folder: {error.strerror}") from error
    return [path for path in paths if not path.name.startswith(".") and path.name.lower() not in _LITTER]


def _classes(names: Sequence[str]) -> str:
    return f"{'class' if len(names) == 1 else 'classes'} {_listed([repr(name) for name in names])}"


def _listed(items: Sequence[object]) -> str:
    more = f" and {len(items) - _SHOWN_AT_MOST} more" if len(items) > _SHOWN_AT_MOST else ""
    return ", ".join(str(item) for item in items[:_SHOWN_AT_MOST]) + more
