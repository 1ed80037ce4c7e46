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
    """

    images: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Dataset:
    """A dataset in memory.

    Attributes:
        name: what a model trained on it is called unless told otherwise.
        source: where it came from, for people to read.
        class_names: a name for each label.
        train: the images to learn from.
        test: the images to judge by, and for nothing else.
    """

    name: str
    source: str
    class_names: tuple[str, ...]
    train: Split
    test: Split

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 over class names, pixels and labels in the order they were read, as hexadecimal digits."""
        digest = hashlib.sha256(repr(self.class_names).encode())
        for split in (self.train, self.test):
            for array in (split.images, split.labels):
                digest.update(repr((array.shape, array.dtype.str)).encode())
                digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()
