"""From a dataset in memory to batches: the validation split, the order of every epoch, batching.

The order is a pure function of the seed and the epoch. That is what makes an exact resume simple: nothing about
the data has to be saved.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import tensorflow as tf

from training.data import Split
from training.errors import DatasetError
from training.models.presets import Augmentation

VALIDATION_FRACTION = 0.1


@dataclass(frozen=True, kw_only=True)
class LoopData:
    """Input of a training loop. Batches are (images uint8 (n, height, width, 3), labels int64 (n,)).

    Attributes:
        train: endless training batches, beginning with the first epoch to train.
        validation: the validation images once.
        steps_per_epoch: batches of an epoch.
        images_per_epoch: training images of an epoch.
    """

    train: tf.data.Dataset
    validation: tf.data.Dataset
    steps_per_epoch: int
    images_per_epoch: int


def split_validation(train: Split, *, seed: int) -> tuple[Split, Split]:
    """Set a tenth of each class of the training images aside for validation.

    Args:
        train: the training images, at least two of each class.
        seed: which images are set aside.

    Returns:
        The images left to train on, and the validation images; both in the order they had.

    Raises:
        DatasetError: a class has a single image.
    """
    rng = np.random.default_rng(seed)
    held_out = np.zeros(len(train.labels), bool)
    for class_id in np.unique(train.labels):
        members = np.flatnonzero(train.labels == class_id)
        if len(members) < 2:
            raise DatasetError(
                f"class {class_id} has one training image; at least 2 are needed, one of them for validation"
            )
        count = max(1, round(VALIDATION_FRACTION * len(members)))
        held_out[rng.choice(members, count, replace=False)] = True
    return (
        Split(train.images[~held_out], train.labels[~held_out]),
        Split(train.images[held_out], train.labels[held_out]),
    )


def steps_per_epoch(split: Split, batch_size: int) -> int:
    """Return how many batches one pass over `split` takes, the last of which may be smaller."""
    return -(-len(split.labels) // batch_size)


def training_batches(
    split: Split, *, batch_size: int, seed: int, first_epoch: int, augmentation: Augmentation | None = None
) -> tf.data.Dataset:
    """Return endless shuffled batches, epoch after epoch from `first_epoch` (counted from 0).

    Every image comes once in an epoch, in an order drawn from (seed, epoch).

    Args:
        split: the images and labels.
        batch_size: images in a batch; the last of an epoch may have fewer.
        seed: of the order.
        first_epoch: where to begin.
        augmentation: mirror every image in every other epoch, and do this to it.

    Returns:
        A dataset of (images uint8 (batch, height, width, 3), labels int64 (batch,)).
    """
    # Made outside the functions below, which then hold a reference instead of a copy inside their graph.
    images, labels = tf.constant(split.images), tf.constant(split.labels)
    positions = tf.range(len(split.labels))
    # Which images are mirrored first. In later epochs they take turns (arXiv 2404.00498, section 3.6): two epochs show
    # each image both ways, where a coin tossed each time would show half of them one way twice.
    turns = tf.random.stateless_uniform([len(split.labels)], (seed, -1), maxval=2, dtype=tf.int64)

    def epoch_order(epoch: tf.Tensor) -> tf.data.Dataset:
        order = tf.random.experimental.stateless_shuffle(positions, seed=tf.stack([seed, epoch]))
        return tf.data.Dataset.from_tensor_slices(order).batch(batch_size).map(lambda rows: (rows, epoch))

    height, width = split.images.shape[1:3]
    if augmentation:
        sources = tf.constant(_augmented_sources(height, width, max_shift=augmentation.max_shift))
        if augmentation.cutout:
            mean = tf.constant(split.images.mean(axis=(0, 1, 2)).round().astype(np.uint8))

    def gather(rows: tf.Tensor, epoch: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        batch = tf.gather(images, rows)
        if augmentation:
            mirrored = tf.cast((tf.gather(turns, rows) + epoch) % 2, tf.int32)
            # Every shift as often as any other; where the batch begins among them is drawn with its first row.
            shifts = (tf.range(tf.size(rows)) + rows[0]) % sources.shape[1]
            batch = _take_pixels(batch, tf.gather_nd(sources, tf.stack([mirrored, shifts], axis=1)))
            if augmentation.cutout:
                draw = tf.stack([epoch + (seed << 32), tf.cast(rows[0], tf.int64)])
                covered = _squares(tf.size(rows), height, width, side=augmentation.cutout, seed=draw)
                batch = tf.where(covered[..., None], mean, batch)
        return batch, tf.gather(labels, rows)

    endless = tf.data.Dataset.range(first_epoch, np.iinfo(np.int64).max)
    return endless.flat_map(epoch_order).map(gather).prefetch(4)


def _augmented_sources(height: int, width: int, *, max_shift: int) -> np.ndarray:
    """Return where in an image each pixel of its every augmented form comes from.

    A form is a shift by up to `max_shift` pixels each way, what comes in at the edges being mirrored.

    Returns:
        int32 (2, shifts, height * width): of the image as it is, then of the image mirrored; each pixel's place counted
        along the rows.
    """
    places = np.arange(height * width, dtype=np.int32).reshape(height, width)
    sides = range(2 * max_shift + 1)
    forms = []
    for image in (places, places[:, ::-1]):
        padded = np.pad(image, max_shift, "reflect")
        forms.append([padded[down : down + height, right : right + width] for down in sides for right in sides])
    return np.array(forms).reshape(2, len(sides) ** 2, -1)


def _take_pixels(batch: tf.Tensor, places: tf.Tensor) -> tf.Tensor:
    """Rearrange a whole batch in one operation: flipping, padding and slicing it cost nine times as much.

    Args:
        batch: (batch, height, width, channels).
        places: int32 (batch, height * width), where in the image each pixel comes from.
    """
    height, width, channels = batch.shape[1:]
    pixels = places + tf.range(tf.shape(batch)[0])[:, None] * (height * width)
    return tf.reshape(tf.gather(tf.reshape(batch, [-1, channels]), pixels), tf.shape(batch))


def _squares(count: tf.Tensor, height: int, width: int, *, side: int, seed: tf.Tensor) -> tf.Tensor:
    """Return bool (count, height, width), true in one square of each picture: cutout (arXiv 1708.04552).

    Its middle is any pixel, so part of it may lie outside.

    Args:
        count: how many pictures, int32.
        height: of each.
        width: of each.
        side: of the squares.
        seed: int64 (2,), of where they lie.
    """
    corners = tf.cast(tf.random.stateless_uniform([count, 1, 2], seed) * (height, width), tf.int32) - side // 2
    down = tf.range(height) - corners[..., 0]
    right = tf.range(width) - corners[..., 1]
    is_row, is_column = (down >= 0) & (down < side), (right >= 0) & (right < side)
    return is_row[:, :, None] & is_column[:, None, :]


def evaluation_batches(split: Split, *, batch_size: int) -> tf.data.Dataset:
    """Return `split` once, in order, in batches of (images uint8, labels int64)."""
    images, labels = tf.constant(split.images), tf.constant(split.labels)
    return tf.data.Dataset.from_tensor_slices((images, labels)).batch(batch_size).prefetch(2)
