"""A small network made to learn CIFAR-10 in little time, after the airbench papers.

Keller Jordan 2024, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU" (arXiv 2404.00498): a first layer that whitens
patches and is not trained (section 3.2), filters that begin as the identity (section 3.3), batch normalisation without
a scale, and a scaled head. What trains it is in `training/optimizers/muon.py`.

How many convolutions a block has is the preset's business. That channels are multiples of 16 is the CPU's: the width of
its widest vectors.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import layers

from training.models import bf16_conv
from training.models.presets import Block

PATCH = 2  # pixels on each side of what the first layer looks at
DIRECTIONS = 8  # in which such patches of 12 numbers vary the most
WHITENED_IMAGES = 5_000  # whose patches it is made from
WHITENING_EPSILON = 5e-4  # keeps patches that hardly vary from being blown up
HEAD_SCALE = 1 / 9


@keras.saving.register_keras_serializable(package="training")
class Whitening(layers.Layer):
    """2x2 filters whose outputs are uncorrelated over the training images, each with its negative. Nothing here learns.

    They are those in whose directions the patches vary the most; the paper keeps all.

    The images' own mean and deviation are in the filters too. The paper trains a bias here: that made no difference to
    the validation loss, and without it no gradient comes down to this layer, which saves a tenth of a step.

    Input shape:
        uint8 (batch, height, width, 3), raw pixels 0-255.

    Output shape:
        float32 (batch, height - 1, width - 1, 16).
    """

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Make the variables; `adapt` gives the filters their values."""
        channels = input_shape[-1] or 0
        shape = (PATCH, PATCH, channels, 2 * DIRECTIONS)
        self.kernel = self.add_weight(name="filters", shape=shape, initializer="glorot_uniform", trainable=False)
        self.offset = self.add_weight(name="offset", shape=shape[-1:], initializer="zeros", trainable=False)

    def adapt(self, images: np.ndarray) -> None:
        """Make the filters from images, uint8 (n, height, width, channels).

        They are the eigenvectors of the patches' covariance, each divided by the root of its eigenvalue.
        """
        images = images[:WHITENED_IMAGES].astype(np.float32)
        mean, deviation = images.mean(axis=(0, 1, 2)), images.std(axis=(0, 1, 2)) + 1e-6
        windows = np.lib.stride_tricks.sliding_window_view((images - mean) / deviation, (PATCH, PATCH), axis=(1, 2))
        patches = np.moveaxis(windows, 3, -1).reshape(-1, PATCH * PATCH * images.shape[-1])
        eigenvalues, eigenvectors = np.linalg.eigh(patches.T.astype(np.float64) @ patches / len(patches))
        whitening = eigenvectors / np.sqrt(np.maximum(eigenvalues, 0) + WHITENING_EPSILON)
        whitening = whitening[:, -DIRECTIONS:]  # eigh puts the largest last
        whitening = whitening.reshape(PATCH, PATCH, images.shape[-1], -1) / deviation[:, None]
        kernel = np.concatenate([whitening, -whitening], axis=-1)
        self.kernel.assign(kernel)
        self.offset.assign(-np.tensordot(mean, kernel.sum(axis=(0, 1)), 1))

    def call(self, images: tf.Tensor) -> tf.Tensor:
        """Return the whitened patches."""
        features = tf.nn.conv2d(tf.cast(images, tf.float32), self.kernel, 1, "VALID")
        return tf.nn.relu(tf.nn.bias_add(features, self.offset))


@keras.saving.register_keras_serializable(package="training")
class Identity(keras.initializers.Initializer):
    """Filters that hand the first channels on as they are; further ones are drawn, as in section 3.3 of the paper."""

    def __call__(self, shape: tuple[int, ...], dtype: Any = None) -> tf.Tensor:
        """Return a kernel (3, 3, inputs, outputs)."""
        inputs, outputs = shape[2:]
        limit = (9 * inputs) ** -0.5
        drawn = keras.initializers.RandomUniform(-limit, limit)(shape, dtype)
        handed_on = np.zeros(shape, np.float32)
        count = min(inputs, outputs)
        handed_on[1, 1, range(count), range(count)] = 1
        return tf.concat([handed_on[..., :count], drawn[..., count:]], axis=-1)


@keras.saving.register_keras_serializable(package="training")
class BatchNorm(layers.Layer):
    """Batch normalisation with a bias and without a scale, by TensorFlow's fused operation.

    Keras's own is not fused on this backend, and twice as slow on a CPU.
    """

    MOMENTUM = 0.6  # of the moving mean and variance: a short training has no time for slow ones
    EPSILON = 1e-6

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Make the variables."""
        shape = (input_shape[-1],)
        self.bias = self.add_weight(name="bias", shape=shape, initializer="zeros")
        self.mean = self.add_weight(name="mean", shape=shape, initializer="zeros", trainable=False)
        self.variance = self.add_weight(name="variance", shape=shape, initializer="ones", trainable=False)

    def call(self, inputs: tf.Tensor, training: bool = False) -> tf.Tensor:
        """Return the normalised features, and in training take note of their mean and variance."""
        ones = tf.ones_like(self.bias)
        if not training:
            moments = {"mean": tf.convert_to_tensor(self.mean), "variance": tf.convert_to_tensor(self.variance)}
            return tf.compat.v1.nn.fused_batch_norm(
                inputs, ones, self.bias, **moments, epsilon=self.EPSILON, is_training=False
            )[0]
        outputs, mean, variance, *_ = tf.compat.v1.nn.fused_batch_norm(inputs, ones, self.bias, epsilon=self.EPSILON)
        for moving, current in ((self.mean, mean), (self.variance, variance)):
            moving.assign(self.MOMENTUM * moving + (1 - self.MOMENTUM) * current)
        return outputs


@keras.saving.register_keras_serializable(package="training")
class Conv(layers.Layer):
    """A 3x3 convolution without a bias.

    Args:
        filters: its outputs.
        padding: "SAME" or "VALID".
    """

    def __init__(self, filters: int, *, padding: str = "SAME", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.filters = filters
        self.padding = padding

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Make the variables."""
        shape = (3, 3, input_shape[-1], self.filters)
        self.kernel = self.add_weight(name="kernel", shape=shape, initializer=Identity())

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        """Return the features."""
        if self.padding == "SAME" and bf16_conv.is_for(inputs):
            return bf16_conv.convolve(inputs, tf.convert_to_tensor(self.kernel))
        return tf.nn.conv2d(inputs, self.kernel, 1, self.padding)

    def get_config(self) -> dict[str, Any]:
        """Return what the constructor takes."""
        return {**super().get_config(), "filters": self.filters, "padding": self.padding}


@keras.saving.register_keras_serializable(package="training")
class AirbenchBlock(layers.Layer):
    """Convolutions, each with batch norm and ReLU; after the first of them, before its batch norm, 2x2 max-pooling.

    From the third on, what a convolution gives is added to its input. With Keras's dtype policy mixed_bfloat16 the
    convolutions and the pooling are of such numbers, and what has to add up exactly is of float32: batch norm's
    statistics and the variables.

    Args:
        filters: of every convolution.
        depth: how many there are.
        padding: of the first.

    Output shape:
        float32 (batch, height // 2, width // 2, filters); one row and column less with "VALID" padding.
    """

    def __init__(self, filters: int, *, depth: int, padding: str = "SAME", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.filters = filters
        self.depth = depth
        self.padding = padding
        paddings = [padding] + ["SAME"] * (depth - 1)
        self.convs = [Conv(filters, padding=padding, dtype=self.dtype_policy) for padding in paddings]
        self.norms = [BatchNorm() for _ in range(depth)]

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Make the variables."""
        shape = input_shape
        for conv, norm in zip(self.convs, self.norms, strict=True):
            conv.build(shape)
            shape = (*input_shape[:-1], self.filters)
            norm.build(shape)

    def call(self, inputs: tf.Tensor, training: bool = False) -> tf.Tensor:
        """Return the features."""
        features = inputs
        for number, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            new = conv(features)
            if number == 0:
                new = tf.nn.max_pool2d(new, 2, 2, "VALID")
            new = tf.nn.relu(norm(new, training=training))
            features = features + new if number >= 2 else new
        return features

    def get_config(self) -> dict[str, Any]:
        """Return what the constructor takes."""
        return {**super().get_config(), "filters": self.filters, "depth": self.depth, "padding": self.padding}


@keras.saving.register_keras_serializable(package="training")
class Airbench(keras.Model):
    """Whitening, three blocks, the maximum over the picture, a head.

    Args:
        classes: number of classes.
        blocks: what each block is like.

    Input shape:
        uint8 (batch, height, width, 3), raw pixels 0-255.

    Output shape:
        float32 (batch, classes), probabilities.
    """

    def __init__(self, classes: int, *, blocks: tuple[Block, Block, Block], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.classes = classes
        self.blocks = blocks
        self.whitening = Whitening()
        self.block1, self.block2, self.block3 = (
            AirbenchBlock(filters, depth=depth, padding=padding, dtype=self.dtype_policy)
            for filters, depth, padding in blocks
        )
        # Uniform with a deviation of 1.
        self.head = layers.Dense(
            classes, use_bias=False, kernel_initializer=keras.initializers.RandomUniform(-(3**0.5), 3**0.5)
        )

    def adapt(self, images: np.ndarray) -> None:
        """Make the filters that are not trained from images, uint8 (n, height, width, 3)."""
        self.whitening.adapt(images)

    def logits(self, images: tf.Tensor, training: bool = False) -> tf.Tensor:
        """Return what the softmax is given."""
        features = self.block1(self.whitening(crop_to_odd(images)), training=training)
        features = self.block3(self.block2(features, training=training), training=training)
        return HEAD_SCALE * self.head(tf.reduce_max(features, axis=(1, 2)))

    def call(self, images: tf.Tensor, training: bool = False) -> tf.Tensor:
        """Return the probabilities."""
        return tf.nn.softmax(self.logits(images, training=training))

    def get_config(self) -> dict[str, Any]:
        """Return what the constructor takes."""
        return {**super().get_config(), "classes": self.classes, "blocks": self.blocks}


def crop_to_odd(images: tf.Tensor) -> tf.Tensor:
    """Crop images to an odd height and width: the first pooling drops the last row and column of even sizes."""
    height, width = images.shape[1:3]
    return images[:, : height - (height + 1) % 2, : width - (width + 1) % 2]


def build_airbench(
    input_shape: tuple[int, int, int], *, classes: int, blocks: tuple[Block, Block, Block], dtype: str
) -> Airbench:
    """Build the network, its variables made and its first layer not yet adapted.

    Args:
        input_shape: (height, width, 3) of the images.
        classes: number of classes.
        blocks: what each block is like.
        dtype: Keras's dtype policy of the blocks.
    """
    model = Airbench(classes, blocks=blocks, name="airbench", dtype=dtype)
    model(tf.zeros((1, *input_shape), tf.uint8))
    return model
