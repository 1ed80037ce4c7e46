"""Shards: a dataset in few large files, whose images have been decoded and resized once.

FOLDER/train-00000.tfrecord ...   images of the training split, in their order
FOLDER/test-00000.tfrecord ...    the same of the test split
FOLDER/index.npz                  the place, label and checksum of every image
FOLDER/manifest.json              names, counts, content hash; the sizes of all files

A record is a `tf.train.Example` with the features `image/encoded` (PNG, the pixels that are trained on),
`image/format`, `image/class/label`, `image/class/text` and `image/filename`. Here images are read by the index, in any
order: all images are shuffled, a resumed run reads nothing twice, and a worker reads only its part.

Importing this module does not import TensorFlow.
"""

from __future__ import annotations

import io
import json
import os
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from training.data.dataset import Dataset, Split
from training.data.image_reading import allocate_images, format_size, read_image
from training.data.streamed_images import ImageSource, StreamedImages, read_batches
from training.errors import DatasetError
from training.image_progress import ImageProgress
from training.shell_command import format_command

MANIFEST, INDEX, SUFFIX = "manifest.json", "index.npz", ".tfrecord"
FORMAT = "image shards, 1"


@dataclass(frozen=True, kw_only=True, eq=False)
class Index:
    """Where each image is; the training images come first.

    Attributes:
        shard: int32 (n,), number of the file in the manifest.
        offset: int64 (n,), of the encoded image in that file, in bytes.
        length: int32 (n,), of the encoded image, in bytes.
        crc32: uint32 (n,), of the encoded image.
        label: int64 (n,).
    """

    shard: np.ndarray
    offset: np.ndarray
    length: np.ndarray
    crc32: np.ndarray
    label: np.ndarray


def is_shard_folder(folder: Path) -> bool:
    """Return whether a folder has shards, whole or not."""
    return any(folder.glob(f"*{SUFFIX}"))


def load_shards(folder: Path, *, image_size: tuple[int, int] | None, stream: bool) -> Dataset:
    """Load a dataset from shards.

    Args:
        folder: of the shards.
        image_size: (height, width) that the images must have; `None` accepts any.
        stream: do not keep the images in memory, but read them whenever they are needed.

    Raises:
        DatasetError: a file is missing, damaged or cut off, or the images have another size.
        MemoryTooSmallError: the images do not fit into memory.
    """
    manifest, index = _read_manifest(folder)
    size = manifest["image_size"]
    if image_size not in (None, size):
        raise DatasetError(
            f"the images in {folder} have {format_size(size)} pixels, not {format_size(image_size or ())}: leave out "
            "--image-size, or write shards of that size"
        )
    paths = [folder / file["name"] for file in manifest["files"]]
    images: Any = StreamedImages(ImageSource(size, _reader(paths, index)), np.arange(len(index.label)))
    count = manifest["splits"]["train"]
    if stream:
        train, test = images.select(slice(count)), images.select(slice(count, None))
    else:
        images = _read_into_memory(images, title=f"reading {folder}")
        train, test = images[:count], images[count:]
    splits = Split(train, index.label[:count]), Split(test, index.label[count:])
    source = f"{folder}, written from {manifest['source']}"
    return Dataset(manifest["name"], source, manifest["class_names"], *splits, known_hash=manifest["content_hash"])


def _reader(paths: list[Path], index: Index) -> Any:
    def read_one(row: int) -> np.ndarray:
        path, offset, length = paths[index.shard[row]], int(index.offset[row]), int(index.length[row])
        try:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                data = os.pread(descriptor, length, offset)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise DatasetError(f"{path} cannot be read: {error.strerror or error}") from error
        if len(data) != length or zlib.crc32(data) != index.crc32[row]:
            record = row - int(np.searchsorted(index.shard, index.shard[row]))
            raise DatasetError(
                f"{path} is damaged: record {record}, at byte {offset:,}, has another checksum than when it was "
                "written. Copy the file again, or write the shards again"
            )
        return read_image(io.BytesIO(data), image_size=None)

    return read_one


def _read_into_memory(images: StreamedImages, *, title: str) -> np.ndarray:
    array = allocate_images(*images.shape[:3])
    done = 0
    with ImageProgress(total=len(images), title=title) as progress:
        for batch in read_batches(images):
            array[done : done + len(batch)] = batch
            done += len(batch)
            progress.update(len(batch))
    return array


def _read_manifest(folder: Path) -> tuple[dict[str, Any], Index]:
    again = f"copy the folder again, or write it again with {format_command('shard', 'SOURCE', '--out', 'FOLDER')}"
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest.get("format") != FORMAT:
            raise DatasetError(f"{folder} has shards of another format, {manifest.get('format')}: expected {FORMAT}")
        manifest["image_size"] = tuple(manifest["image_size"])
        manifest["class_names"] = tuple(manifest["class_names"])
        counts = manifest["splits"]["train"] + manifest["splits"]["test"]
        for file in manifest["files"]:
            path = folder / file["name"]
            if (size := path.stat().st_size) != file["bytes"]:
                raise DatasetError(
                    f"{path} is cut off or altered: it has {size:,} bytes, not {file['bytes']:,}: {again}"
                )
        with np.load(folder / INDEX) as arrays:
            index = Index(**arrays)
        if len(index.label) != counts:
            raise DatasetError(f"{folder / INDEX} has {len(index.label):,} images, {MANIFEST} {counts:,}: {again}")
    except OSError as error:
        raise DatasetError(f"{error.filename} cannot be read: {error.strerror}: {again}") from error
    except (ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DatasetError(f"{folder} has a damaged {MANIFEST} or {INDEX} ({error!r}): {again}") from error
    return manifest, index
