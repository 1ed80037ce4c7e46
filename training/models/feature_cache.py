"""Features of the training images, computed once, and kept in the run directory in parts of a few thousand images.

A part is named by the hash of its images and of the weights, so that a stale one is never read. Parts are written
durably: an interrupted run continues after the last one, and a resumed run computes none.
"""

from __future__ import annotations

import hashlib
import io
import logging
from pathlib import Path

import numpy as np
import tensorflow as tf
from rich.console import Console
from rich.progress import Progress

from training.data.streamed_images import Images
from training.models.transfer import TransferClassifier
from training.storage import make_folder, write_file

PART_IMAGES = 4096

logger = logging.getLogger(__name__)


def compute_features(model: TransferClassifier, images: Images, *, cache: Path, batch_size: int) -> np.ndarray:
    """Return the pooled features of the backbone, float32 (n, channels); read from `cache` as far as they are there.

    Args:
        model: with the weights of its backbone.
        images: uint8 (n, height, width, 3).
        cache: folder of the parts; it is created.
        batch_size: images in one call of the backbone.
    """
    weights = hashlib.sha256()
    for weight in model.backbone.get_weights():
        weights.update(weight.data)
    features = np.empty((len(images), model.backbone.output_shape[-1]), np.float32)
    missing: list[tuple[int, Path]] = []
    for start in range(0, len(images), PART_IMAGES):
        stop = min(start + PART_IMAGES, len(images))
        key = hashlib.sha256(weights.digest() + repr((stop - start, *images.shape[1:])).encode())
        for row in range(start, stop, batch_size):
            key.update(np.ascontiguousarray(images[row : min(row + batch_size, stop)]).data)
        path = cache / f"{key.hexdigest()}.npy"
        if not _read_part(path, features[start:stop]):
            missing.append((start, path))
    if not missing:
        return features
    count = sum(len(images[start : start + PART_IMAGES]) for start, _ in missing)
    logger.info("computing the features of %s images with %s", f"{count:,}", model.backbone_name)
    make_folder(cache)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("computing features", total=count)
        for start, path in missing:
            stop = min(start + PART_IMAGES, len(images))
            for row in range(start, stop, batch_size):
                batch = images[row : min(row + batch_size, stop)]
                features[row : row + len(batch)] = model.pooled_features(tf.constant(batch)).numpy()
                progress.advance(task, len(batch))
            content = io.BytesIO()
            np.save(content, features[start:stop])
            write_file(path, content.getvalue())
    return features


def _read_part(path: Path, into: np.ndarray) -> bool:
    """Read a part into an array of its size; return whether it was there and complete."""
    try:
        part = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return False
    if part.shape != into.shape or part.dtype != into.dtype:
        return False
    into[:] = part
    return True
