"""SHA-256 of the contents of a dataset, whose images may come one by one."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np


class ContentHash:
    """Hash of class names, pixels and labels in their order.

    For each split, in the order training, test: `begin_split`, `add` for all images, `end_split`.
    """

    def __init__(self, class_names: Sequence[str]) -> None:
        self._digest = hashlib.sha256(repr(tuple(class_names)).encode())

    def begin_split(self, shape: tuple[int, ...]) -> None:
        """Begin a split with images of this shape, (n, height, width, 3)."""
        self._digest.update(repr((tuple(shape), np.dtype(np.uint8).str)).encode())

    def add(self, images: np.ndarray) -> None:
        """Add the next image or images, uint8 (..., height, width, 3)."""
        self._digest.update(np.ascontiguousarray(images).data)

    def end_split(self, labels: np.ndarray) -> None:
        """Add the labels int64 (n,) of the split."""
        self._digest.update(repr((labels.shape, labels.dtype.str)).encode())
        self._digest.update(np.ascontiguousarray(labels).data)

    def hexdigest(self) -> str:
        """Return the hash as hexadecimal digits."""
        return self._digest.hexdigest()
