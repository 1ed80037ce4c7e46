"""The graph that is exported: an image classifier without variables, cut at its last features."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import tensorflow as tf

TensorFunction = Callable[[tf.Tensor], tf.Tensor]


@dataclass(frozen=True)
class InferenceGraph:
    """An image classifier without variables.

    The cut serves what looks at the features: out-of-distribution detection, and heat maps that explain a prediction.

    Attributes:
        features: uint8 (n, height, width, 3) to float32 (n, rows, columns, channels), the last feature map, in the
            image's orientation; or (n, channels) where a network has none.
        head: these features to logits, float32 (n, classes).
    """

    features: TensorFunction
    head: TensorFunction

    def logits(self, images: tf.Tensor) -> tf.Tensor:
        """Return the logits, float32 (n, classes), of uint8 (n, height, width, 3)."""
        return self.head(self.features(images))

    def average_flips(self) -> InferenceGraph:
        """Return the graph with horizontal-flip test-time augmentation: the mean logits of each image and its flip."""

        def features(images: tf.Tensor) -> tf.Tensor:
            original, flipped = tf.split(self.features(tf.concat([images, tf.reverse(images, [2])], axis=0)), 2)
            return tf.concat([original, _flip_map(flipped)], axis=-1)

        def head(features: tf.Tensor) -> tf.Tensor:
            original, flipped = tf.split(features, 2, axis=-1)
            original, flipped = tf.split(self.head(tf.concat([original, _flip_map(flipped)], axis=0)), 2)
            return (original + flipped) / 2

        return InferenceGraph(features, head)


def _flip_map(features: tf.Tensor) -> tf.Tensor:
    return tf.reverse(features, [2]) if features.shape.rank == 4 else features
