"""The files of an image folder, and a check that reads them all."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from typing_extensions import override

from training.data.content_hash import ContentHash
from training.data.image_reading import ImageSink
from training.data.shared_images import warn_of_shared_images


@dataclass(frozen=True, kw_only=True)
class LabelledFiles:
    """The files of an image folder.

    Attributes:
        folder: that all files are in.
        source: description of the folder and its test split.
        class_names: a name for each label.
        train, test: the files of both splits.
        train_labels, test_labels: int64 (n,), of these files.
    """

    folder: Path
    source: str
    class_names: tuple[str, ...]
    train: list[Path]
    train_labels: np.ndarray
    test: list[Path]
    test_labels: np.ndarray

    @property
    def name(self) -> str:
        """The default name of a model."""
        return self.folder.resolve().name

    @property
    def paths(self) -> list[Path]:
        """All files, those of the training images first."""
        return [*self.train, *self.test]


class ImageCheck(ImageSink):
    """Hashes the images of both splits, training images first, and does not keep them."""

    def __init__(self, files: LabelledFiles) -> None:
        self._files = files

    @override
    def begin(self, height: int, width: int) -> None:
        self.image_size = (height, width)
        self.digests: list[bytes] = []
        self._content = ContentHash(self._files.class_names)
        self._content.begin_split((len(self._files.train), height, width, 3))

    @override
    def prepare(self, image: np.ndarray) -> Any:
        return hashlib.sha256(np.ascontiguousarray(image).data).digest()

    @override
    def add(self, image: np.ndarray, prepared: Any) -> None:
        if len(self.digests) == len(self._files.train):
            self._content.end_split(self._files.train_labels)
            self._content.begin_split((len(self._files.test), *image.shape))
        self._content.add(image)
        self.digests.append(prepared)

    def finish(self) -> str:
        """Return the content hash; warn of test images that are training images too."""
        files = self._files
        warn_of_shared_images(self.digests, files.paths, train_count=len(files.train), folder=files.folder)
        self._content.end_split(files.test_labels)
        return self._content.hexdigest()
