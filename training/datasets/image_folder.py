"""Any folder of images sorted by class: `train/<class>/*` and `test/<class>/*`, or one level of `<class>/*`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError
from rich.console import Console
from rich.progress import track

from training.datasets.dataset import Dataset, Split
from training.errors import DatasetError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
TEST_FRACTION = 0.1  # of a folder without a test split
_SHOWN_AT_MOST = 5
_ORIENTATION_TAG = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def is_image_folder(folder: Path) -> bool:
    """Tell whether `folder` holds images by class, in either layout."""
    return (folder / "train").is_dir() or any(_files(subfolder) for subfolder in _subfolders(folder))


def load_image_folder(folder: Path, *, image_size: tuple[int, int] | None, seed: int) -> Dataset:
    """Load every image of a folder.

    Files and folders whose names begin with a dot, and `Thumbs.db`, are no images and are passed over. Without a
    test folder, a tenth of each class is set aside for testing.

    Args:
        folder: `train/<class>/*` and `test/<class>/*`, or `<class>/*`, or a folder that holds just one such folder.
        image_size: (height, width) to resize to, antialiased bilinear; `None` if all images are alike.
        seed: which images are set aside where there is no test folder.

    Raises:
        DatasetError: no such folder, a damaged file, an empty class, a class missing in `test/`, fewer images than
            classes, or images of several sizes and no `image_size`. The message names the file or class.
    """
    root = _find_root(folder)
    name = root.resolve().name
    if not (root / "train").is_dir():
        class_names = _class_names(root)
        images, labels, _ = _read_classes(root, class_names, image_size=image_size)
        train, test = _set_test_aside(images, labels, class_names, folder=root, seed=seed)
        return Dataset(name, f"{root} (a tenth set aside for testing, seed {seed})", class_names, train, test)

    if not (root / "test").is_dir():
        raise DatasetError(
            f"{root} has train/ but no test/: make one with the same classes, or name {root / 'train'} "
            "itself, and a tenth of it is set aside for testing"
        )
    class_names = _class_names(root / "train")
    test_classes = {path.name for path in _subfolders(root / "test")}
    if missing := sorted(set(class_names) - test_classes):
        raise DatasetError(f"{root / 'test'} lacks the {_classes(missing)} that {root / 'train'} has")
    if unknown := sorted(test_classes - set(class_names)):
        raise DatasetError(f"{root / 'test'} has the {_classes(unknown)} that {root / 'train'} does not have")
    images, labels, size = _read_classes(root / "train", class_names, image_size=image_size)
    test_images, test_labels, test_size = _read_classes(root / "test", class_names, image_size=image_size)
    if size != test_size:
        raise DatasetError(
            f"the images in train/ are {_size(size)} and those in test/ {_size(test_size)}: choose one size with "
            f"--image-size, such as --image-size {_size(size)}"
        )
    return Dataset(name, str(root), class_names, Split(images, labels), Split(test_images, test_labels))


def read_image(path: Path | BinaryIO, *, image_size: tuple[int, int] | None) -> np.ndarray:
    """Read one image as the exported model would: upright, three channels, resized by antialiased bilinear.

    Args:
        path: a JPEG, PNG, WebP, BMP or GIF file, or one opened for reading; of an animation, the first picture counts.
        image_size: (height, width); `None` leaves it as it is.

    Returns:
        uint8 (height, width, 3). Alpha is dropped, grey repeated, 16-bit samples keep their high byte.

    Raises:
        DatasetError: the file is damaged, no image, or too large to be trusted.
    """
    try:
        with Image.open(path, formats=FORMATS) as file:
            image = _to_rgb(file)
            # Only the EXIF of JPEG (MPO: several in a file) and WebP counts; the exported graph reads no other.
            orientation = _orientation(file) if file.format in ("JPEG", "MPO", "WEBP") else 1
    except UnidentifiedImageError as error:
        raise DatasetError(f"{path} is not a {', '.join(FORMATS)} file, or its beginning is damaged") from error
    except Image.DecompressionBombError as error:
        raise DatasetError(f"{path} is refused: {error}") from error
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, KeyError, RuntimeError) as error:
        # What Pillow raises for damage depends on the format and on where the damage is.
        raise DatasetError(f"{path} is damaged: {error}") from error
    if orientation in _TURNS:
        image = image.transpose(_TURNS[orientation])
    if image_size is not None and image.size != image_size[::-1]:
        image = image.resize(image_size[::-1], Image.Resampling.BILINEAR)
    return np.asarray(image)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip instead of scaling
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "CMYK":
        # By the formula of TensorFlow's JPEG decoder (core/lib/jpeg/jpeg_mem.cc), which is not Pillow's.
        ink = np.asarray(image).astype(np.uint16)
        ink = 255 - ink if "adobe" in image.info else ink
        return Image.fromarray((ink[..., :3] * ink[..., 3:] // 255).astype(np.uint8))
    image.info.pop("transparency", None)  # or Pillow makes an alpha channel of it first, at some cost
    return image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    exif = Image.Exif()
    try:
        exif.load(image.info.get("exif", b""))
        orientation = exif.get(_ORIENTATION_TAG, 1)
    except Exception:  # damaged EXIF data is no reason to lose a picture; Pillow raises many things for it
        return 1
    return orientation if isinstance(orientation, int) else 1


def _find_root(folder: Path) -> Path:
    if not folder.is_dir():
        raise DatasetError(f"{folder} is no folder: name one with train/<class>/* and test/<class>/*, or <class>/*")
    if is_image_folder(folder):
        return folder
    candidates = [path for path in _subfolders(folder) if is_image_folder(path)]
    if len(candidates) != 1:
        found = f"{len(candidates)} such folders in it" if candidates else "nothing like it there"
        raise DatasetError(
            f"{folder} is no image folder: expected train/<class>/* and test/<class>/*, or <class>/*, and found {found}"
        )
    return candidates[0]


def _class_names(folder: Path) -> tuple[str, ...]:
    names = tuple(sorted(path.name for path in _subfolders(folder)))
    if len(names) < 2:
        raise DatasetError(f"{folder} has {len(names)} class folders; at least 2 are needed")
    return names


def _read_classes(
    folder: Path, class_names: Sequence[str], *, image_size: tuple[int, int] | None
) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    """Read all images under `folder`; return images, labels, and their one (height, width)."""
    by_class = [_files(folder / name) for name in class_names]
    if empty := [name for name, files in zip(class_names, by_class, strict=True) if not files]:
        raise DatasetError(f"{folder} has no images in the {_classes(empty)}")
    paths = [path for files in by_class for path in files]
    images: list[np.ndarray] = []
    damaged: list[DatasetError] = []
    for result in _read_all(paths, image_size=image_size, description=f"reading {folder.name}"):
        (damaged if isinstance(result, DatasetError) else images).append(result)  # type: ignore[arg-type]
    if damaged:
        shown = "\n".join(f"  {error}" for error in damaged[:_SHOWN_AT_MOST])
        more = f"\n  and {len(damaged) - _SHOWN_AT_MOST} more" if len(damaged) > _SHOWN_AT_MOST else ""
        raise DatasetError(
            f"{len(damaged)} of {len(paths):,} files cannot be used; mend or remove them:\n{shown}{more}"
        )
    sizes = sorted({image.shape[:2] for image in images})
    if len(sizes) > 1:
        raise DatasetError(
            f"the images in {folder} have {len(sizes)} sizes, from {_size(sizes[0])} to {_size(sizes[-1])}: "
            "choose one with --image-size, such as --image-size 32x32"
        )
    labels = np.repeat(np.arange(len(class_names), dtype=np.int64), [len(files) for files in by_class])
    return np.stack(images), labels, sizes[0]


def _read_all(
    paths: Sequence[Path], *, image_size: tuple[int, int] | None, description: str
) -> Iterable[np.ndarray | DatasetError]:
    def read(path: Path) -> np.ndarray | DatasetError:
        try:
            return read_image(path, image_size=image_size)
        except DatasetError as error:
            return error

    console = Console(stderr=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from track(
            pool.map(read, paths),
            description,
            total=len(paths),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )


def _set_test_aside(
    images: np.ndarray, labels: np.ndarray, class_names: Sequence[str], *, folder: Path, seed: int
) -> tuple[Split, Split]:
    counts = np.bincount(labels)
    # One image to train on, one to validate with, one to test.
    if (few := int(counts.argmin())) >= 0 and counts[few] < 3:
        raise DatasetError(
            f"class {class_names[few]!r} in {folder} has {counts[few]} images; at least 3 are needed, to train, "
            "validate and test"
        )
    rng = np.random.default_rng(seed)
    is_test = np.zeros(len(labels), bool)
    for class_id, count in enumerate(counts):
        members = np.flatnonzero(labels == class_id)
        is_test[rng.choice(members, max(1, round(TEST_FRACTION * count)), replace=False)] = True
    return Split(images[~is_test], labels[~is_test]), Split(images[is_test], labels[is_test])


def _subfolders(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]


def _files(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.iterdir()
        if path.is_file() and not path.name.startswith(".") and path.name != "Thumbs.db"
    )


def _classes(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:_SHOWN_AT_MOST])
    more = f" and {len(names) - _SHOWN_AT_MOST} more" if len(names) > _SHOWN_AT_MOST else ""
    return f"{'class' if len(names) == 1 else 'classes'} {shown}{more}"


def _size(size: tuple[int, ...]) -> str:
    return f"{size[0]}x{size[1]}"
