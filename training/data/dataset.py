"""What a dataset is, whatever it was read from."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class Split:
    """Labelled images.

    Attributes:
        images: uint8 (n, height, width, 3), raw pixels 0-255.
        labels: int64 (n,), each the position of the image's class among the dataset's class names.

    Raises:
        ValueError: they are of another shape or type, or not as many labels as images.
    """

    images: np.ndarray
    labels: np.ndarray

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
            raise ValueError(f"images must be uint8 (n, height, width, 3); got {images.dtype} {images.shape}")
        if labels.dtype != np.int64 or labels.shape != images.shape[:1]:
            raise ValueError(f"labels must be int64 {images.shape[:1]}; got {labels.dtype} {labels.shape}")


@dataclass(frozen=True)
class Dataset:
    """A dataset in memory.

    Attributes:
        name: what a model trained on it is called unless told otherwise.
        source: where it came from, for people to read.
        class_names: a name for each label.
        train: the images to learn from.
        test: the images to judge by, and for nothing else.

    Raises:
        ValueError: images of two sizes, or labels that have no name.
    """

    name: str
    source: str
    class_names: tuple[str, ...]
    train: Split
    test: Split

    def __post_init__(self) -> None:
        sizes = [split.images.shape[1:3] for split in (self.train, self.test)]
        if sizes[0] != sizes[1]:
            raise ValueError(f"train and test images must be of one (height, width); got {sizes[0]} and {sizes[1]}")
        if len(set(self.class_names)) != len(self.class_names):
            raise ValueError(f"class names must differ; got {self.class_names}")
        for split in (self.train, self.test):
            if not np.isin(split.labels, np.arange(len(self.class_names))).all():
                raise ValueError(f"labels must lie from 0 to {len(self.class_names) - 1}, one for each class name")

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 over class names, pixels and labels in the order they were read, as hexadecimal digits."""
        digest = hashlib.sha256(repr(self.class_names).encode())
        for split in (self.train, self.test):
            for array in (split.images, split.labels):
                digest.update(repr((array.shape, array.dtype.str)).encode())
                digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()
