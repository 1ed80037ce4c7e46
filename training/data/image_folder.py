"""Folders of images by class: `train/<class>/*` and `test/<class>/*`, or `<class>/*`.

`list_image_folder` finds the files. `load_image_folder` reads them into memory; or it reads each once to check it, and
again whenever it is needed.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from image_formats.content import EXPECTED
from image_formats.files import is_image_file, is_system_name
from training.data.dataset import Dataset, Split, choose_rows
from training.data.file_kind import describe_file
from training.data.image_reading import DEFAULT_SIZE, read_image, read_images, stream_images
from training.data.labelled_files import ImageCheck, LabelledFiles
from training.data.shared_images import warn_of_shared_images
from training.data.streamed_images import Images, ImageSource, StreamedImages, select_images
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


def list_image_folder(folder: Path, *, seed: int, test_fraction: float = TEST_FRACTION) -> LabelledFiles:
    """Find the files of an image folder.

    Every file in a class folder and the folders below it must be an image. Hidden files and folders (`.DS_Store`,
    `._cat.jpg`) and those of file managers and file systems (`Thumbs.db`, `__MACOSX`, `@eaDir`, `lost+found`) are
    skipped, files beside the class folders are ignored. Without a test folder, the validation folder is used for
    testing; without either, a tenth of each class is split off.

    Args:
        folder: in one of the two layouts, or with a single such folder in it.
        seed: of the test split, if there is no test folder.
        test_fraction: part of each class that is split off for testing, if there is no test folder.

    Raises:
        DatasetError: the folder does not exist, or a class is empty, missing in `test/`, or too small. The message
            names the file or class.
    """
    if folder.is_file():
        raise DatasetError(f"{folder} {describe_file(folder)}")
    found = find_image_folders(folder)
    if not found:
        raise DatasetError(f"{folder} is not an image folder and contains none: {_explain_no_images(folder)}")
    if len(found) > 1:
        raise DatasetError(f"{folder} contains {len(found)} image folders, {_listed(found)}: name one of them")
    if has_splits(found[0]):
        return _list_splits(found[0])
    return _list_and_split(found[0], seed, test_fraction)


def load_image_folder(
    folder: Path,
    *,
    image_size: tuple[int, int] | None,
    seed: int,
    default_size: tuple[int, int] | None = DEFAULT_SIZE,
    test_fraction: float = TEST_FRACTION,
    stream: bool = False,
) -> Dataset:
    """Load an image folder; see `list_image_folder` for its files.

    Args:
        folder: in one of the two layouts, or with a single such folder in it.
        image_size: (height, width) to resize to; `None` keeps small images of equal size.
        seed: of the test split, if there is no test folder.
        default_size: (height, width) for large images and images of different sizes; see `stream_images`.
        test_fraction: part of each class that is split off for testing, if there is no test folder.
        stream: do not keep the images in memory. All are read once, so that damaged files are found now, and again
            whenever they are needed.

    Raises:
        DatasetError: the folder is unusable, or a file is damaged; the message names it.
        MemoryTooSmallError: the images do not fit into memory.
    """
    files = list_image_folder(folder, seed=seed, test_fraction=test_fraction)
    sizes: Any = {"image_size": image_size, "folder": files.folder, "default_size": default_size}
    if stream:
        check = ImageCheck(files)
        stream_images(files.paths, check, **sizes)
        return _make_dataset(files, _open_files(files.paths, check.image_size), content_hash=check.finish())
    images = read_images(files.paths, **sizes)
    digests = [hashlib.sha256(image.data).digest() for image in images]
    warn_of_shared_images(digests, files.paths, train_count=len(files.train), folder=files.folder)
    return _make_dataset(files, images)


def _open_files(paths: list[Path], image_size: tuple[int, int]) -> StreamedImages:
    source = ImageSource(image_size, lambda position: read_image(paths[position], image_size=image_size))
    return StreamedImages(source, np.arange(len(paths)))


def _make_dataset(files: LabelledFiles, images: Images, *, content_hash: str | None = None) -> Dataset:
    count = len(files.train)
    train = Split(select_images(images, slice(count)), files.train_labels)
    test = Split(select_images(images, slice(count, None)), files.test_labels)
    return Dataset(files.name, files.source, files.class_names, train, test, known_hash=content_hash)


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


def _list_splits(folder: Path) -> LabelledFiles:
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
    return LabelledFiles(
        folder=folder,
        source=_shown(folder),
        class_names=class_names,
        train=paths,
        train_labels=labels,
        test=test_paths,
        test_labels=test_labels,
    )


def _list_and_split(folder: Path, seed: int, test_fraction: float) -> LabelledFiles:
    class_names = read_class_names(folder)
    paths, labels = _list_classes(folder, class_names, at_least=3, needed_for="to train, validate and test")
    is_test = choose_rows(labels, test_fraction, seed=seed)
    part = "a tenth" if test_fraction == TEST_FRACTION else f"{test_fraction:.0%}"
    return LabelledFiles(
        folder=folder,
        source=f"{_shown(folder)} ({part} split off for testing, seed {seed})",
        class_names=class_names,
        train=[paths[row] for row in np.flatnonzero(~is_test)],
        train_labels=labels[~is_test],
        test=[paths[row] for row in np.flatnonzero(is_test)],
        test_labels=labels[is_test],
    )


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
