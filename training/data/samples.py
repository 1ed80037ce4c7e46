"""Writes test images of a dataset to files, to try a served model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from training.data.dataset import Dataset


def write_samples(dataset: Dataset, folder: Path, *, per_class: int) -> list[Path]:
    """Write the first `per_class` test images of each class as `folder/<class>-<number>.png`; return the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for class_id, name in enumerate(dataset.class_names):
        for number, row in enumerate(np.flatnonzero(dataset.test.labels == class_id)[:per_class], start=1):
            paths.append(folder / f"{name}-{number}.png")
            Image.fromarray(dataset.test.images[row]).save(paths[-1])
    return paths
