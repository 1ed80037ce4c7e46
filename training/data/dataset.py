"""Datasets, in memory or streamed from files, and files of their test images."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from training.data.content_hash import ContentHash
from training.data.streamed_images import Images, read_batches, select_images


def choose_rows(labels: np.ndarray, fraction: float, *, seed: int) -> np.ndarray:
    """Return bool (n,), true for a random `fraction` of each class of labels int64 (n,), at least one image."""
    rng = np.random.default_rng(seed)
    chosen = np.zeros(len(labels), bool)
    for class_id in np.unique(labels):
        members = np.flatnonzero(labels == class_id)
        chosen[rng.choice(members, max(1, round(fraction * len(members))), replace=False)] = True
    return chosen


@dataclass(frozen=True)
class Split:
    """Labelled images.

    Attributes:
        images: uint8 (n, height, width, 3), raw pixels 0-255, in memory or streamed.
        labels: int64 (n,), indices into the dataset's class names.

    Raises:
        ValueError: wrong shape or dtype.
    """

    images: Images
    labels: np.ndarray

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
            raise ValueError(f"images must be uint8 (n, height, width, 3); got {images.dtype} {images.shape}")
        if labels.dtype != np.int64 or labels.shape != images.shape[:1]:
            raise ValueError(f"labels must be int64 {images.shape[:1]}; got {labels.dtype} {labels.shape}")

    def divide(self, chosen: np.ndarray) -> tuple[Split, Split]:
        """Return the other images, and the chosen ones, bool (n,); both in their order."""
        first, second = (Split(select_images(self.images, rows), self.labels[rows]) for rows in (~chosen, chosen))
        return first, second

    def split_off(self, fraction: float, *, seed: int) -> tuple[Split, Split]:
        """Return the other images, and a random `fraction` of each class, at least one image; both in their order."""
        return self.divide(choose_rows(self.labels, fraction, seed=seed))


@dataclass(frozen=True)
class Dataset:
    """Labelled images of one size.

    Attributes:
        name: default name of a model trained on it.
        source: description of its origin.
        class_names: a name for each label.
        train: training images; a tenth of each class is split off for validation.
        test: test images.
        known_hash: the content hash, if it was computed before.

    Raises:
        ValueError: images differ in size, class names are not unique, or a label has no class name.
    """

    name: str
    source: str
    class_names: tuple[str, ...]
    train: Split
    test: Split
    known_hash: str | None = None

    def __post_init__(self) -> None:
        sizes = [split.images.shape[1:3] for split in (self.train, self.test)]
        if sizes[0] != sizes[1]:
            raise ValueError(f"train and test images must have the same (height, width); got {sizes[0]} and {sizes[1]}")
        if len(set(self.class_names)) != len(self.class_names):
            raise ValueError(f"class names must be unique; got {self.class_names}")
        for split in (self.train, self.test):
            if not np.isin(split.labels, np.arange(len(self.class_names))).all():
                raise ValueError(f"labels must be from 0 to {len(self.class_names) - 1}, one for each class name")

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 of class names, pixels and labels in their order, as hexadecimal digits."""
        if self.known_hash is not None:
            return self.known_hash
        content = ContentHash(self.class_names)
        for split in (self.train, self.test):
            content.begin_split(split.images.shape)
            for batch in read_batches(split.images):
                content.add(batch)
            content.end_split(split.labels)
        return content.hexdigest()


def write_samples(dataset: Dataset, folder: Path, *, per_class: int) -> list[Path]:
    """Write the first `per_class` test images of each class as `folder/<class>-<number>.png`; return the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for class_id, name in enumerate(dataset.class_names):
        for number, row in enumerate(np.flatnonzero(dataset.test.labels == class_id)[:per_class], start=1):
            paths.append(folder / f"{name}-{number}.png")
            Image.fromarray(dataset.test.images[row]).save(paths[-1])
    return paths
