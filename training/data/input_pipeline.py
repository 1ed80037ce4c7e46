"""Input pipeline: validation split, shuffling, augmentation, batching.

The order is a function of seed and epoch, so resuming needs no saved state of the data.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import tensorflow as tf

from training.data import Split
from training.data.streamed_images import Images, StreamedImages, read_batches
from training.errors import DatasetError
from training.models.presets import Augmentation

VALIDATION_FRACTION = 0.1


@dataclass(frozen=True)
class Parts:
    """Parts of each batch, one for each replica of the model: their `count`, and those of this process."""

    count: int = 1
    own: range = range(1)

    def rows(self, size: tf.Tensor) -> tf.data.Dataset:
        """Return the positions int32 (n,) of each part in a batch of `size` images."""
        edges = tf.range(self.own.start, self.own.stop + 1) * size // self.count
        pairs = tf.data.Dataset.from_tensor_slices((edges[:-1], edges[1:]))
        return pairs.map(lambda start, stop: tf.range(start, stop))


@dataclass(frozen=True, kw_only=True)
class LoopData:
    """Input of a training loop. Batches are (the model's inputs (n, ...), labels int64 (n,)).

    Attributes:
        train: endless training batches, beginning with the first epoch to train.
        validation: the validation images once.
        steps_per_epoch: batches of an epoch.
        images_per_epoch: training images of an epoch.
        batch_size: images of a training batch; the last of an epoch may have fewer.
    """

    train: tf.data.Dataset
    validation: tf.data.Dataset
    steps_per_epoch: int
    images_per_epoch: int
    batch_size: int


def split_validation(train: Split, *, seed: int) -> tuple[Split, Split]:
    """Return the images for training and validation, a random tenth of each class; both in their original order.

    Raises:
        DatasetError: a class has a single image.
    """
    classes, counts = np.unique(train.labels, return_counts=True)
    if (counts < 2).any():
        raise DatasetError(
            f"class {classes[counts.argmin()]} has one training image; at least 2 are needed, one for validation"
        )
    return train.split_off(VALIDATION_FRACTION, seed=seed)


def steps_per_epoch(split: Split, batch_size: int) -> int:
    """Return the number of batches of an epoch, including a smaller last one."""
    return -(-len(split.labels) // batch_size)


def training_batches(
    split: Split,
    *,
    batch_size: int,
    seed: int,
    first_epoch: int,
    augmentation: Augmentation | None = None,
    inputs: Images | None = None,
    parts: Parts = Parts(),
) -> tf.data.Dataset:
    """Return endless shuffled batches of (images uint8 (batch, height, width, 3), labels int64 (batch,)).

    Each image occurs once in an epoch, whose last batch may be smaller. Epochs are counted from 0. With augmentation,
    every image is also flipped horizontally in every other epoch. `inputs` (n, ...) take the place of the images.
    Four batches wait to be taken; two more of streamed images are read meanwhile.
    With several `parts`, those of this process follow each other; together they are the batches of a single replica.
    """
    # Outside the functions below, whose graphs would otherwise contain copies.
    source = split.images if inputs is None else inputs
    read_images = _make_reader(source)
    labels = tf.constant(split.labels)
    positions = tf.range(len(split.labels))
    # The images that are flipped first; in later epochs they alternate (arXiv 2404.00498, section 3.6). So two epochs
    # show each image both ways; independent random flips would show half of the images the same way twice.
    flips = tf.random.stateless_uniform([len(split.labels)], (seed, -1), maxval=2, dtype=tf.int64)

    def epoch_order(epoch: tf.Tensor) -> tf.data.Dataset:
        order = tf.random.experimental.stateless_shuffle(positions, seed=tf.stack([seed, epoch]))
        batches = tf.data.Dataset.from_tensor_slices(order).batch(batch_size)
        return batches.flat_map(lambda rows: parts.rows(tf.size(rows)).map(lambda own: (rows, own, epoch)))

    height, width = split.images.shape[1:3]
    if augmentation:
        sources = tf.constant(_augmented_sources(height, width, max_shift=augmentation.max_shift))
        if augmentation.cutout:
            mean = tf.constant(_mean_colour(split.images))

    def gather(all_rows: tf.Tensor, own: tf.Tensor, epoch: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        rows = tf.gather(all_rows, own)
        batch = read_images(rows)
        if augmentation:
            mirrored = tf.cast((tf.gather(flips, rows) + epoch) % 2, tf.int32)
            # All shifts are equally frequent; the first shift of a batch is random, as its first row is.
            shifts = (own + all_rows[0]) % sources.shape[1]
            batch = _take_pixels(batch, tf.gather_nd(sources, tf.stack([mirrored, shifts], axis=1)))
            if augmentation.cutout:
                draw = tf.stack([epoch + (seed << 32), tf.cast(all_rows[0], tf.int64)])
                covered = _squares(tf.size(all_rows), height, width, side=augmentation.cutout, seed=draw)
                batch = tf.where(tf.gather(covered, own)[..., None], mean, batch)
        return batch, tf.gather(labels, rows)

    endless = tf.data.Dataset.range(first_epoch, np.iinfo(np.int64).max)
    # Of streamed images two batches at a time: by default TensorFlow takes as many as there are cores.
    parallel = 2 if isinstance(source, StreamedImages) else None
    return endless.flat_map(epoch_order).map(gather, num_parallel_calls=parallel).prefetch(4)


def _make_reader(images: Images) -> Callable[[tf.Tensor], tf.Tensor]:
    """Return a function from row numbers int32 (batch,) to those images, or other inputs of the model."""
    if not isinstance(images, StreamedImages):
        constant = tf.constant(images)
        return lambda rows: tf.gather(constant, rows)
    # Not stateful: the same rows are the same images, so op determinism does not turn off reading ahead.
    return lambda rows: tf.ensure_shape(
        tf.numpy_function(images.__getitem__, [rows], tf.uint8, stateful=False), [None, *images.shape[1:]]
    )


def _mean_colour(images: Images) -> np.ndarray:
    """Return the mean of all pixels, uint8 (3,); streamed images are all read."""
    sums = sum(batch.sum(axis=(0, 1, 2), dtype=np.int64) for batch in read_batches(images))
    mean: np.ndarray = (sums / np.prod(images.shape[:3])).round().astype(np.uint8)
    return mean


def _augmented_sources(height: int, width: int, *, max_shift: int) -> np.ndarray:
    """Return the source of each pixel in an image shifted by up to `max_shift` pixels, with reflected edges.

    Returns:
        int32 (2, shifts, height * width): flat pixel indices, for the original and the flipped image.
    """
    places = np.arange(height * width, dtype=np.int32).reshape(height, width)
    sides = range(2 * max_shift + 1)
    forms = []
    for image in (places, places[:, ::-1]):
        padded = np.pad(image, max_shift, "reflect")
        forms.append([padded[down : down + height, right : right + width] for down in sides for right in sides])
    return np.array(forms).reshape(2, len(sides) ** 2, -1)


def _take_pixels(batch: tf.Tensor, places: tf.Tensor) -> tf.Tensor:
    """Rearrange the pixels of a batch in one operation: flip, pad and slice take nine times as long.

    Args:
        batch: (batch, height, width, channels).
        places: int32 (batch, height * width), flat index of each pixel's source.
    """
    height, width, channels = batch.shape[1:]
    pixels = places + tf.range(tf.shape(batch)[0])[:, None] * (height * width)
    return tf.reshape(tf.gather(tf.reshape(batch, [-1, channels]), pixels), tf.shape(batch))


def _squares(count: tf.Tensor, height: int, width: int, *, side: int, seed: tf.Tensor) -> tf.Tensor:
    """Return bool (count, height, width), true in a random square of each image: cutout (arXiv 1708.04552).

    The centre is any pixel, so part of the square may be outside the image.
    """
    corners = tf.cast(tf.random.stateless_uniform([count, 1, 2], seed) * (height, width), tf.int32) - side // 2
    down = tf.range(height) - corners[..., 0]
    right = tf.range(width) - corners[..., 1]
    is_row, is_column = (down >= 0) & (down < side), (right >= 0) & (right < side)
    return is_row[:, :, None] & is_column[:, None, :]


def evaluation_batches(
    split: Split,
    *,
    batch_size: int,
    inputs: Images | None = None,
    parts: Parts = Parts(),
) -> tf.data.Dataset:
    """Return `split` once, in order, in batches of (images uint8 or `inputs`, labels int64).

    With several `parts`, the last batch is filled up with copies whose label is -1, so that no part is empty.
    """
    read_images = _make_reader(split.images if inputs is None else inputs)
    count = len(split.labels)
    labels = tf.constant(np.pad(split.labels, (0, -count % parts.count), constant_values=-1))
    batch_size -= batch_size % parts.count

    def take(start: tf.Tensor) -> tf.data.Dataset:
        size = tf.minimum(batch_size, tf.cast(len(labels) - start, tf.int32))
        rows = parts.rows(size).map(lambda part: tf.cast(start, tf.int32) + part)
        return rows.map(lambda own: (read_images(tf.minimum(own, count - 1)), tf.gather(labels, own)))

    starts = tf.data.Dataset.range(0, len(labels), batch_size)
    # With a known number of batches, Keras does not warn at their end that data are missing.
    counted = tf.data.experimental.assert_cardinality(len(starts) * len(parts.own))
    return starts.flat_map(take).apply(counted).prefetch(2)
