"""From raw pixels to a model's input: colour order, scale, layout and dtype."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import tensorflow as tf
from PIL import Image

from training.importer.scaling import SCALES

# Pillow's grey, in 65536ths: luma of ITU-R 601 with integer weights.
_GREY_WEIGHTS = (19595, 38470, 7471)
_GREY_ROUNDING, _GREY_SHIFT = 0x8000, 16


@dataclass(frozen=True)
class Preprocessing:
    """What is done to images before a model sees them.

    Attributes:
        scale: one of `SCALES`.
        color: "rgb" or "bgr", the order of the channels; "grey" for one channel.
        layout: "nhwc", "nchw", or "nhw" for images without an axis for the channel.
        dtype: of the model's input, such as "float32".
    """

    scale: str
    color: str
    layout: str
    dtype: str

    def apply(self, images: tf.Tensor) -> tf.Tensor:
        """Return the model's input for uint8 (n, height, width, 3), in the graph."""
        if self.color == "grey":
            images = _to_grey(images)
        elif self.color == "bgr":
            images = images[..., ::-1]
        values = SCALES[self.scale](tf.cast(images, tf.float32)) if self.scale != "0..255" else images
        if self.layout == "nchw":
            values = tf.transpose(values, (0, 3, 1, 2))
        elif self.layout == "nhw":
            values = tf.squeeze(values, 3)
        return tf.cast(values, self.dtype)

    def apply_numpy(self, images: np.ndarray) -> np.ndarray:
        """Return the same as `apply`, computed without TensorFlow: what the export is compared with."""
        if self.color == "grey":
            grey = [np.asarray(Image.fromarray(image).convert("L")) for image in images]
            images = np.stack(grey)[..., np.newaxis]
        elif self.color == "bgr":
            images = images[..., ::-1]
        values: np.ndarray = SCALES[self.scale](images.astype(np.float32))
        if self.layout == "nchw":
            values = values.transpose(0, 3, 1, 2)
        elif self.layout == "nhw":
            values = values[..., 0]
        return values.astype(tf.as_dtype(self.dtype).as_numpy_dtype)


def _to_grey(images: tf.Tensor) -> tf.Tensor:
    """Return uint8 (n, height, width, 1), bit for bit as Pillow converts an image to "L"."""
    weighted = tf.reduce_sum(tf.cast(images, tf.int32) * tf.constant(_GREY_WEIGHTS), axis=3, keepdims=True)
    return tf.cast(tf.bitwise.right_shift(weighted + _GREY_ROUNDING, _GREY_SHIFT), tf.uint8)
