"""Writes an image folder as shards; `training.data.shards` describes and reads them.

Everything is written into a hidden folder beside the target, which is renamed when it is complete. So a folder of
shards is either whole or not there, and a killed writer is simply run again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import io
import json
import shutil
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from typing_extensions import override

from training.data.image_folder import list_image_folder
from training.data.image_reading import DEFAULT_SIZE, stream_images
from training.data.labelled_files import ImageCheck, LabelledFiles
from training.data.shards import FORMAT, INDEX, MANIFEST, SUFFIX, Index
from training.errors import DatasetError
from training.storage import explain_full_storage, is_full, make_folder, sync, write_file

if TYPE_CHECKING:
    import tensorflow as tf

SHARD_BYTES = 128 << 20
_LOCK = "lock"
_RECORD_HEAD, _RECORD_FRAME = 12, 16  # bytes of a TFRecord before its data, and before and after it


@dataclass(frozen=True)
class ShardSummary:
    """What was written: the folder, and the number of images, shards and bytes."""

    folder: Path
    images: int
    shards: int
    bytes: int


def write_shards(
    source: Path,
    out: Path,
    *,
    image_size: tuple[int, int] | None = None,
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
) -> ShardSummary:
    """Write the images of a folder as shards, decoded, upright and resized.

    Args:
        source: an image folder; see `list_image_folder`.
        out: the folder to write, which must not exist.
        image_size: (height, width) to resize to; `None` keeps small images of equal size.
        seed: of the test split, if the folder has none.
        shard_bytes: size from which on a shard is full.

    Raises:
        DatasetError: the folder is unusable, a file is damaged, or `out` exists or cannot be written.
        StorageFullError: the disk is full.
    """
    out = out.absolute()
    if out.exists():
        raise DatasetError(f"{out} exists: name another folder, or remove it")
    files = list_image_folder(source, seed=seed)
    if out.resolve().is_relative_to(files.folder.resolve()):
        raise DatasetError(f"{out} is in {files.folder}, whose folders are classes: name a folder outside of it")
    with (
        explain_full_storage(out, "Free some space, or choose another disk; nothing was kept"),
        _partial(out) as folder,
    ):
        writer = ShardWriter(folder, files, shard_bytes=shard_bytes)
        try:
            stream_images(files.paths, writer, image_size=image_size, folder=files.folder, default_size=DEFAULT_SIZE)
            written = writer.publish()
        finally:
            writer.close()
        (folder / _LOCK).unlink()
        sync(folder)
        folder.rename(out)
        sync(out.parent)
    return ShardSummary(out, len(files.paths), len(written), sum(file["bytes"] for file in written))


@contextlib.contextmanager
def _partial(out: Path) -> Iterator[Path]:
    """Make the folder that becomes `out`; it is removed unless it was renamed.

    Raises:
        DatasetError: it cannot be made, or another process writes it.
    """
    folder = out.with_name(f".{out.name}.partial")
    try:
        make_folder(folder)
        lock = (folder / _LOCK).open("wb")
    except OSError as error:
        if is_full(error):
            raise
        raise DatasetError(f"{out} cannot be written: {error.filename}: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released when the process ends, however it ends
        except BlockingIOError:
            raise DatasetError(f"another process is writing {out}: wait for it, or choose another folder") from None
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


class ShardWriter(ImageCheck):
    """Writes the images that it takes, training images first.

    Args:
        folder: to write into; what a killed writer left there is removed.
        files: of the images.
        shard_bytes: size from which on a shard is full.
    """

    def __init__(self, folder: Path, files: LabelledFiles, *, shard_bytes: int) -> None:
        super().__init__(files)
        self._folder = folder
        self._shard_bytes = shard_bytes
        self._labels = np.concatenate([files.train_labels, files.test_labels])
        self._paths = files.paths
        self._file: tf.io.TFRecordWriter | None = None

    @override
    def begin(self, height: int, width: int) -> None:
        super().begin(height, width)
        self.close()
        for path in self._folder.iterdir():
            if path.name != _LOCK:
                path.unlink()
        self._written: list[dict[str, Any]] = []
        self._rows: list[tuple[int, int, int, int]] = []  # shard, offset, length, crc32

    @override
    def prepare(self, image: np.ndarray) -> Any:
        content = io.BytesIO()
        Image.fromarray(image).save(content, "PNG")
        return super().prepare(image), content.getvalue()

    @override
    def add(self, image: np.ndarray, prepared: Any) -> None:
        digest, encoded = prepared
        row = len(self._rows)
        record = self._make_record(row, encoded)
        split = "train" if row < len(self._files.train) else "test"
        if not self._written or self._written[-1]["split"] != split or self._written[-1]["bytes"] >= self._shard_bytes:
            self._begin_shard(split)
        shard = self._written[-1]
        offset = shard["bytes"] + _RECORD_HEAD + record.index(encoded)
        assert self._file is not None  # of `_begin_shard`
        self._file.write(record)
        shard["bytes"] += len(record) + _RECORD_FRAME
        shard["images"] += 1
        self._rows.append((len(self._written) - 1, offset, len(encoded), zlib.crc32(encoded)))
        super().add(image, digest)

    def publish(self) -> list[dict[str, Any]]:
        """Write the index and the manifest, after all images; return what the manifest has of each shard."""
        self.close()
        for shard in self._written:
            sync(self._folder / shard["name"])
        columns = zip(("shard", "offset", "length", "crc32"), np.array(self._rows, np.int64).T, strict=True)
        types = {"shard": np.int32, "offset": np.int64, "length": np.int32, "crc32": np.uint32}
        index = Index(**{name: column.astype(types[name]) for name, column in columns}, label=self._labels)
        content = io.BytesIO()
        np.savez_compressed(content, **dataclasses.asdict(index))
        write_file(self._folder / INDEX, content.getvalue())
        manifest = {
            "format": FORMAT,
            "name": self._files.name,
            "source": self._files.source,
            "class_names": self._files.class_names,
            "image_size": self.image_size,
            "splits": {"train": len(self._files.train), "test": len(self._files.test)},
            "content_hash": self.finish(),
            "files": self._written,
        }
        write_file(self._folder / MANIFEST, (json.dumps(manifest, indent=2) + "\n").encode())
        return self._written

    def close(self) -> None:
        """Close the current shard."""
        if self._file is not None:
            file, self._file = self._file, None
            file.close()

    def _begin_shard(self, split: str) -> None:
        import tensorflow as tf

        self.close()
        number = sum(shard["split"] == split for shard in self._written)
        name = f"{split}-{number:05}{SUFFIX}"
        self._written.append({"name": name, "split": split, "images": 0, "bytes": 0})
        self._file = tf.io.TFRecordWriter(str(self._folder / name))

    def _make_record(self, row: int, encoded: bytes) -> bytes:
        import tensorflow as tf

        def text(*values: bytes) -> tf.train.Feature:
            return tf.train.Feature(bytes_list=tf.train.BytesList(value=values))

        label = int(self._labels[row])
        features = {
            "image/encoded": text(encoded),
            "image/format": text(b"png"),
            "image/class/label": tf.train.Feature(int64_list=tf.train.Int64List(value=[label])),
            "image/class/text": text(self._files.class_names[label].encode()),
            "image/filename": text(bytes(self._paths[row].relative_to(self._files.folder))),
        }
        record: bytes = tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString()
        return record
