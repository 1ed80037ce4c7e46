"""From a dataset in memory to batches: the validation split, the order of every epoch, batching.

The order is a pure function of the seed and the epoch. That is what makes an exact resume simple: nothing about
the data has to be saved.
"""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from training.datasets import Split
from training.errors import DatasetError

VALIDATION_FRACTION = 0.1
MAX_SHIFT = 2  # pixels


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
    split: Split, *, batch_size: int, seed: int, first_epoch: int, augment: bool = False
) -> tf.data.Dataset:
    """Return endless shuffled batches, epoch after epoch from `first_epoch` (counted from 0).

    Every image comes once in an epoch, in an order drawn from (seed, epoch).

    Args:
        split: the images and labels.
        batch_size: images in a batch; the last of an epoch may have fewer.
        seed: of the order.
        first_epoch: where to begin.
        augment: mirror every image in every other epoch, and shift it by up to `MAX_SHIFT` pixels.

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

    def gather(rows: tf.Tensor, epoch: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        batch, batch_labels = tf.gather(images, rows), tf.gather(labels, rows)
        if not augment:
            return batch, batch_labels
        mirrored = (tf.gather(turns, rows) + epoch) % 2 == 1
        batch = tf.where(mirrored[:, None, None, None], tf.reverse(batch, [2]), batch)
        return shift_images(batch), shift_images(batch_labels)

    endless = tf.data.Dataset.range(first_epoch, np.iinfo(np.int64).max)
    return endless.flat_map(epoch_order).map(gather).prefetch(4)


def shift_images(batch: tf.Tensor) -> tf.Tensor:
    """Shift images by up to `MAX_SHIFT` pixels each way, what comes in at the edges being mirrored.

    The shift follows from an image's place in the batch, which is drawn already: so whole slices of the batch are
    shifted at once. The batch comes back in another order; labels given here come back in the same.

    Args:
        batch: (batch, height, width, channels), or (batch,).
    """
    sides = range(2 * MAX_SHIFT + 1)
    shifts = [(down, right) for down in sides for right in sides]
    if batch.shape.rank == 1:
        return tf.concat([batch[place :: len(shifts)] for place in range(len(shifts))], axis=0)
    height, width = batch.shape[1:3]
    edge = [MAX_SHIFT, MAX_SHIFT]
    padded = tf.pad(batch, [[0, 0], edge, edge, [0, 0]], "REFLECT")
    return tf.concat(
        [
            padded[place :: len(shifts), down : down + height, right : right + width]
            for place, (down, right) in enumerate(shifts)
        ],
        axis=0,
    )


def evaluation_batches(split: Split, *, batch_size: int) -> tf.data.Dataset:
    """Return `split` once, in order, in batches of (images uint8, labels int64)."""
    images, labels = tf.constant(split.images), tf.constant(split.labels)
    return tf.data.Dataset.from_tensor_slices((images, labels)).batch(batch_size).prefetch(2)
