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


def training_batches(split: Split, *, batch_size: int, seed: int, first_epoch: int) -> tf.data.Dataset:
    """Return endless shuffled batches, epoch after epoch from `first_epoch` (counted from 0).

    Every image comes once in an epoch, in an order drawn from (seed, epoch).

    Returns:
        A dataset of (images uint8 (batch, height, width, 3), labels int64 (batch,)).
    """
    # Made outside the functions below, which then hold a reference instead of a copy inside their graph.
    images, labels = tf.constant(split.images), tf.constant(split.labels)
    positions = tf.range(len(split.labels))

    def epoch_order(epoch: tf.Tensor) -> tf.data.Dataset:
        order = tf.random.experimental.stateless_shuffle(positions, seed=tf.stack([seed, epoch]))
        return tf.data.Dataset.from_tensor_slices(order).batch(batch_size)

    def gather(rows: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        return tf.gather(images, rows), tf.gather(labels, rows)

    endless = tf.data.Dataset.range(first_epoch, np.iinfo(np.int64).max)
    return endless.flat_map(epoch_order).map(gather).prefetch(4)


def evaluation_batches(split: Split, *, batch_size: int) -> tf.data.Dataset:
    """Return `split` once, in order, in batches of (images uint8, labels int64)."""
    images, labels = tf.constant(split.images), tf.constant(split.labels)
    return tf.data.Dataset.from_tensor_slices((images, labels)).batch(batch_size).prefetch(2)
