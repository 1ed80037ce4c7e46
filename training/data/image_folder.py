"""Folders of images by class: `train/<class>/*` and `test/<class>/*`, or `<class>/*`."""

from __future__ import annotations

import itertools
import logging
import os
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from image_formats.content import EXPECTED
from image_formats.files import is_image_file, is_system_name
from training.data.dataset import Dataset, Split
from training.data.file_kind import describe_file
from training.data.image_reading import DEFAULT_SIZE, read_images
from training.data.shared_images import warn_of_shared_images
from training.errors import DatasetError

TEST_FRACTION = 0.1  # of a folder without a test split
LAYOUTS = "train/<class>/* and test/<class>/*, or <class>/*"
# Names of the folders of a split, case-insensitive.
_SPLITS = {"train": ("train", "training"), "test": ("test", "testing"), "validation": ("val", "valid", "validation")}
_SHOWN_AT_MOST = 5
_SAMPLED_AT_MOST = 1_000  # files that are opened to detect an image folder

logger = logging.getLogger(__name__)


def find_image_folders(folder: Path) -> list[Path]:
    """Return `folder` if it is an image folder; otherwise the image folders directly in it.

    An image folder has folders `train/<class>/`, or a folder with image files, detected by their content. Several
    folders with images in deeper folders are classes, as for Keras; a single one is searched.
    """
    if _is_image_folder(folder):
        return [folder]
    subfolders = _subfolders(folder)
    holders = [path for path in subfolders if any(map(is_image_file, _sample(path)))]
    if len(holders) > 1 and not any(map(has_splits, subfolders)):
        return [folder]
    return [path for path in subfolders if _is_image_folder(path)]


def read_class_names(folder: Path) -> tuple[str, ...]:
    """Return the sorted class names of an image folder; raise `DatasetError` if one is not UTF-8, or has no other."""
    by_class = _find_splits(folder)["train"][0] if has_splits(folder) else folder
    names = tuple(path.name for path in _subfolders(by_class))
    for name in names:
        if name != _shown(Path(name)):
            raise DatasetError(f"{_shown(by_class / name)} cannot be a class: its name is not UTF-8. Rename the folder")
    if names and all(any(name.lower() in known for known in _SPLITS.values()) for name in names):
        raise DatasetError(
            f"{by_class} has images directly in {'/ and '.join(names)}/: use a folder for each class, {LAYOUTS}"
        )
    if len(names) < 2:
        raise DatasetError(
            f"{by_class} has {'one class folder' if names else 'no class folders'}; at least 2 are needed"
        )
    return names


def load_image_folder(
    folder: Path,
    *,
    image_size: tuple[int, int] | None,
    seed: int,
    default_size: tuple[int, int] | None = DEFAULT_SIZE,
    test_fraction: float = TEST_FRACTION,
) -> Dataset:
    """Load an image folder.

    Every file in a class folder and the folders below it must be an image. Hidden files and folders (`.DS_Store`,
    `._cat.jpg`) and those of file managers and file systems (`Thumbs.db`, `__MACOSX`, `@eaDir`, `lost+found`) are
    skipped, files beside the class folders are ignored. Without a test folder, the validation folder is used for
    testing; without either, a tenth of each class is split off.

    Args:
        folder: in one of the two layouts, or with a single such folder in it.
        image_size: (height, width) to resize to; `None` keeps small images of equal size.
        seed: of the test split, if there is no test folder.
        default_size: (height, width) for large images and images of different sizes; see `read_images`.
        test_fraction: part of each class that is split off for testing, if there is no test folder.

    Raises:
        DatasetError: the folder does not exist, a file is damaged, a class is empty, missing in `test/`, or too small.
            The message names the file or class.
    """
    if folder.is_file():
        raise DatasetError(f"{folder} {describe_file(folder)}")
    found = find_image_folders(folder)
    if not found:
        raise DatasetError(f"{folder} is not an image folder and contains none: {_explain_no_images(folder)}")
    if len(found) > 1:
        raise DatasetError(f"{folder} contains {len(found)} image folders, {_listed(found)}: name one of them")
    if has_splits(found[0]):
        return _load_splits(found[0], image_size, default_size)
    return _load_and_split(found[0], image_size, default_size, seed, test_fraction)


def _explain_no_images(folder: Path) -> str:
    """Return the reason why `find_image_folders` found nothing, for the end of a message."""
    if any(map(is_image_file, _list(folder))):
        return f"its images are directly in it; put them into a folder for each class, {LAYOUTS}"
    types = Counter(
        path.suffix.lower() or "without a suffix" for subfolder in _subfolders(folder) for path in _sample(subfolder)
    )
    if not types:
        return f"expected {LAYOUTS}"
    listed = _listed([f"{name} ({count:,})" for name, count in types.most_common()])
    return f"the files in its folders have unsupported types, {listed}; {EXPECTED}"


def _load_splits(folder: Path, image_size: tuple[int, int] | None, default_size: tuple[int, int] | None) -> Dataset:
    class_names = read_class_names(folder)
    splits = _find_splits(folder)
    for paths in splits.values():
        if len(paths) > 1:
            raise DatasetError(
                f"{folder} has {_listed([f'{path.name}/' for path in paths])} for the same split: keep one"
            )
    (train_folder,) = splits["train"]
    if not (tests := splits["test"] or splits["validation"]):
        raise DatasetError(
            f"{folder} has {train_folder.name}/ but no test/: add one with the same classes, or name "
            f"{shlex.quote(str(train_folder))} itself, and a tenth of it is split off for testing"
        )
    (test_folder,) = tests
    if not splits["test"]:
        logger.info("%s has no test/, so the images of %s/ are the test images", folder, test_folder.name)
    train_name, test_name = train_folder.name, test_folder.name
    if others := [path.name for path in _subfolders(folder) if path.name not in (train_name, test_name)]:
        logger.warning(
            f"of {folder}, only {train_name}/ and {test_name}/ are read, not {_listed(others)}; "
            f"the validation images are split off from {train_name}/"
        )
    test_classes = [path.name for path in _subfolders(test_folder)]
    if not test_classes and any(map(is_image_file, _list(test_folder))):
        raise DatasetError(
            f"the images of {test_folder} are directly in it, so their classes are unknown: put them into a folder for "
            "each class, or move the folder away, and a tenth of the training images is split off for testing"
        )
    if missing := [name for name in class_names if name not in test_classes]:
        raise DatasetError(f"{test_folder} lacks the {_classes(missing)} of {train_folder}")
    if unknown := [name for name in test_classes if name not in class_names]:
        raise DatasetError(f"{test_folder} has the {_classes(unknown)}, which {train_folder} lacks")
    paths, labels = _list_classes(train_folder, class_names, at_least=2, needed_for="to train and validate")
    test_paths, test_labels = _list_classes(test_folder, class_names, at_least=1, needed_for="to test")
    images = read_images([*paths, *test_paths], image_size=image_size, folder=folder, default_size=default_size)
    warn_of_shared_images(images, [*paths, *test_paths], is_test=np.arange(len(images)) >= len(paths), folder=folder)
    train, test = Split(images[: len(paths)], labels), Split(images[len(paths) :], test_labels)
    return Dataset(folder.resolve().name, _shown(folder), class_names, train, test)


def _load_and_split(
    folder: Path,
    image_size: tuple[int, int] | None,
    default_size: tuple[int, int] | None,
    seed: int,
    test_fraction: float,
) -> Dataset:
    class_names = read_class_names(folder)
    paths, labels = _list_classes(folder, class_names, at_least=3, needed_for="to train, validate and test")
    images = read_images(paths, image_size=image_size, folder=folder, default_size=default_size)
    split = Split(images, labels)
    is_test = split.choose(test_fraction, seed=seed)
    warn_of_shared_images(images, paths, is_test=is_test, folder=folder)
    train, test = split.divide(is_test)
    part = "a tenth" if test_fraction == TEST_FRACTION else f"{test_fraction:.0%}"
    source = f"{_shown(folder)} ({part} split off for testing, seed {seed})"
    return Dataset(folder.resolve().name, source, class_names, train, test)


def _list_classes(
    folder: Path, class_names: Sequence[str], *, at_least: int, needed_for: str
) -> tuple[list[Path], np.ndarray]:
    """Return the files of all classes, sorted by class and name, and their labels."""
    files = {name: list(_walk(folder / name)) for name in class_names}
    if empty := [name for name in class_names if not files[name]]:
        raise DatasetError(f"{folder} has no images in the {_classes(empty)}")
    for name in class_names:
        if other := [path for path in files[name] if not path.is_file()]:
            raise DatasetError(f"{other[0]} is not a regular file; a class folder must contain images only")
        if len(files[name]) < at_least:
            raise DatasetError(
                f"{folder} has too few images in the class {name!r}: {len(files[name])}; at least {at_least} are "
                f"needed {needed_for}"
            )
    if any(path.parent.name != name for name in class_names for path in files[name]):
        logger.info("the classes of %s are %s; images in folders below them are included", folder, _listed(class_names))
    labels = np.repeat(np.arange(len(class_names), dtype=np.int64), [len(files[name]) for name in class_names])
    return [path for name in class_names for path in files[name]], labels


def _shown(path: Path) -> str:
    """Return a path as text; bytes that are not UTF-8 are escaped."""
    return os.fsencode(path).decode(errors="backslashreplace")


def _is_image_folder(folder: Path) -> bool:
    return has_splits(folder) or any(map(is_image_file, itertools.chain.from_iterable(map(_list, _subfolders(folder)))))


def _find_splits(folder: Path) -> dict[str, list[Path]]:
    """Return the folders of each split, by their usual names."""
    subfolders = _subfolders(folder)
    return {split: [path for path in subfolders if path.name.lower() in names] for split, names in _SPLITS.items()}


def has_splits(folder: Path) -> bool:
    """Return whether an image folder has the layout with `train/<class>/`."""
    # A class called "train" contains images, not folders.
    return any(_subfolders(path) for path in _find_splits(folder)["train"])


def _sample(folder: Path) -> Iterator[Path]:
    """Yield the first paths of `_walk`: the folder may be a whole disk."""
    return itertools.islice(_walk(folder), _SAMPLED_AT_MOST)


def _walk(folder: Path, above: tuple[tuple[int, int], ...] = ()) -> Iterator[Path]:
    """Yield the files in a folder and below, sorted; links to a parent folder are skipped."""
    status = folder.stat()
    above = (*above, (status.st_dev, status.st_ino))
    for path in _list(folder):
        if not path.is_dir():
            yield path
        elif (path.stat().st_dev, path.stat().st_ino) not in above:
            yield from _walk(path, above)


def _subfolders(folder: Path) -> list[Path]:
    return [path for path in _list(folder) if path.is_dir()]


def _list(folder: Path) -> list[Path]:
    """Return the entries of a folder, sorted, without hidden files and those of file managers."""
    try:
        paths = sorted(folder.iterdir())
    except OSError as error:
        raise DatasetError(f"{folder} cannot be read as a folder: {error.strerror}") from error
    return [path for path in paths if not is_system_name(path.name)]


def _classes(names: Sequence[str]) -> str:
    return f"{'class' if len(names) == 1 else 'classes'} {_listed([repr(name) for name in names])}"


def _listed(items: Sequence[object]) -> str:
    more = f" and {len(items) - _SHOWN_AT_MOST} more" if len(items) > _SHOWN_AT_MOST else ""
    return ", ".join(str(item) for item in items[:_SHOWN_AT_MOST]) + more
