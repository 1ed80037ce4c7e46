"""The airbench network: a small network that learns CIFAR-10 fast.

Keller Jordan 2024, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU" (arXiv 2404.00498): a fixed first layer that
whitens patches (section 3.2), identity initialization of filters (section 3.3), batch normalization without a scale,
and a scaled head. Channels are multiples of 16, the width of a CPU's widest vectors.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import layers

from training.data.streamed_images import Images
from training.models import bf16_conv
from training.models.presets import Block

PATCH = 2  # width and height of the patches that the first layer whitens, in pixels
DIRECTIONS = 8  # of largest variance, of the 12 values in a patch
WHITENED_IMAGES = 5_000  # used to compute the filters
WHITENING_EPSILON = 5e-4  # avoids amplifying patches that hardly vary
HEAD_SCALE = 1 / 9


@keras.saving.register_keras_serializable(package="training")
class Whitening(layers.Layer):
    """Fixed 2x2 filters with uncorrelated outputs over the training images, each with its negative.

    Only the directions of largest variance are used; the paper uses all. The filters include the normalization by the
    images' mean and standard deviation. The paper trains a bias here: without it the validation loss is the same, and
    no gradient of this layer is needed, which saves a tenth of a step.

    Input shape:
        uint8 (batch, height, width, 3), raw pixels 0-255.

    Output shape:
        float32 (batch, height - 1, width - 1, 16).
    """

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        channels = input_shape[-1] or 0
        shape = (PATCH, PATCH, channels, 2 * DIRECTIONS)
        self.kernel = self.add_weight(name="filters", shape=shape, initializer="glorot_uniform", trainable=False)
        self.offset = self.add_weight(name="offset", shape=shape[-1:], initializer="zeros", trainable=False)

    def adapt(self, images: Images) -> None:
        """Compute the filters from images, uint8 (n, height, width, channels).

        They are the eigenvectors of the patches' covariance, each divided by the root of its eigenvalue.
        """
        some = images[:WHITENED_IMAGES].astype(np.float32)
        mean, deviation = some.mean(axis=(0, 1, 2)), some.std(axis=(0, 1, 2)) + 1e-6
        windows = np.lib.stride_tricks.sliding_window_view((some - mean) / deviation, (PATCH, PATCH), axis=(1, 2))
        patches = np.moveaxis(windows, 3, -1).reshape(-1, PATCH * PATCH * images.shape[-1])
        eigenvalues, eigenvectors = np.linalg.eigh(patches.T.astype(np.float64) @ patches / len(patches))
        whitening = eigenvectors / np.sqrt(np.maximum(eigenvalues, 0) + WHITENING_EPSILON)
        whitening = whitening[:, -DIRECTIONS:]  # eigh puts the largest last
        whitening = whitening.reshape(PATCH, PATCH, images.shape[-1], -1) / deviation[:, None]
        kernel = np.concatenate([whitening, -whitening], axis=-1)
        self.kernel.assign(kernel)
        self.offset.assign(-np.tensordot(mean, kernel.sum(axis=(0, 1)), 1))

    def call(self, images: tf.Tensor) -> tf.Tensor:
        features = tf.nn.conv2d(tf.cast(images, tf.float32), self.kernel, 1, "VALID")
        return tf.nn.relu(tf.nn.bias_add(features, self.offset))


@keras.saving.register_keras_serializable(package="training")
class Identity(keras.initializers.Initializer):
    """Identity filters for the first channels, random filters for the others (section 3.3 of the paper)."""

    def __call__(self, shape: tuple[int, ...], dtype: Any = None) -> tf.Tensor:
        """Return a kernel (3, 3, inputs, outputs)."""
        inputs, outputs = shape[2:]
        limit = (9 * inputs) ** -0.5
        drawn = keras.initializers.RandomUniform(-limit, limit)(shape, dtype)
        identity = np.zeros(shape, np.float32)
        count = min(inputs, outputs)
        identity[1, 1, range(count), range(count)] = 1
        return tf.concat([identity[..., :count], drawn[..., count:]], axis=-1)


@keras.saving.register_keras_serializable(package="training")
class BatchNorm(layers.Layer):
    """Batch normalization with a bias and without a scale, as TensorFlow's fused operation.

    Keras's layer is not fused on the TensorFlow backend, and half as fast on a CPU.
    """

    MOMENTUM = 0.6  # of the moving mean and variance; low because training is short
    EPSILON = 1e-6

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        shape = (input_shape[-1],)
        self.bias = self.add_weight(name="bias", shape=shape, initializer="zeros")
        moving: dict[str, Any] = {"shape": shape, "trainable": False, "aggregation": "mean"}  # over the replicas
        self.mean = self.add_weight(name="mean", initializer="zeros", **moving)
        self.variance = self.add_weight(name="variance", initializer="ones", **moving)

    def call(self, inputs: tf.Tensor, training: bool = False) -> tf.Tensor:
        ones = tf.ones_like(self.bias)
        if not training:
            moments = {"mean": tf.convert_to_tensor(self.mean), "variance": tf.convert_to_tensor(self.variance)}
            return tf.compat.v1.nn.fused_batch_norm(
                inputs, ones, self.bias, **moments, epsilon=self.EPSILON, is_training=False
            )[0]
        if tf.distribute.get_strategy().num_replicas_in_sync > 1:
            mean, variance, count = _moments_of_all_replicas(inputs)
            outputs = (inputs - mean) * tf.math.rsqrt(variance + self.EPSILON) + self.bias
            variance *= count / (count - 1)  # as the fused operation returns it
        else:
            outputs, mean, variance, *_ = tf.compat.v1.nn.fused_batch_norm(
                inputs, ones, self.bias, epsilon=self.EPSILON
            )
        for moving, current in ((self.mean, mean), (self.variance, variance)):
            moving.assign(self.MOMENTUM * moving + (1 - self.MOMENTUM) * current)
        return outputs


def _moments_of_all_replicas(inputs: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Return mean, variance and number of values of each channel in the whole batch, of which each replica has a part.

    The gradient of a sum over replicas is the sum of their gradients, so training is that of a single replica.
    """
    values = tf.reshape(inputs, (-1, inputs.shape[-1]))
    own = tf.stack([tf.reduce_sum(values, 0), tf.reduce_sum(values**2, 0), tf.reduce_sum(tf.ones_like(values), 0)])
    sums = tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, own)
    total, squares, count = tf.unstack(sums)
    mean = total / count
    return mean, squares / count - mean**2, count


@keras.saving.register_keras_serializable(package="training")
class Conv(layers.Layer):
    """3x3 convolution without a bias; `padding` is "SAME" or "VALID"."""

    def __init__(self, filters: int, *, padding: str = "SAME", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.filters = filters
        self.padding = padding

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        shape = (3, 3, input_shape[-1], self.filters)
        self.kernel = self.add_weight(name="kernel", shape=shape, initializer=Identity())

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        if self.padding == "SAME" and bf16_conv.is_for(inputs):
            return bf16_conv.convolve(inputs, tf.convert_to_tensor(self.kernel))
        return tf.nn.conv2d(inputs, self.kernel, 1, self.padding)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "filters": self.filters, "padding": self.padding}


@keras.saving.register_keras_serializable(package="training")
class AirbenchBlock(layers.Layer):
    """Convolutions, each with batch norm and ReLU; the first has 2x2 max-pooling before its batch norm.

    From the third on, the output of a convolution is added to its input. With the dtype policy mixed_bfloat16,
    convolutions and pooling use bfloat16, variables and batch-norm statistics float32.

    Args:
        filters: output channels of every convolution.
        depth: number of convolutions.
        padding: of the first convolution.

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
        shape = input_shape
        for conv, norm in zip(self.convs, self.norms, strict=True):
            conv.build(shape)
            shape = (*input_shape[:-1], self.filters)
            norm.build(shape)

    def call(self, inputs: tf.Tensor, training: bool = False) -> tf.Tensor:
        features = inputs
        for number, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            new = conv(features)
            if number == 0:
                new = tf.nn.max_pool2d(new, 2, 2, "VALID")
            new = tf.nn.relu(norm(new, training=training))
            features = features + new if number >= 2 else new
        return features

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "filters": self.filters, "depth": self.depth, "padding": self.padding}


@keras.saving.register_keras_serializable(package="training")
class Airbench(keras.Model):
    """Whitening, three blocks, global max-pooling, a head.

    Args:
        classes: number of classes.
        blocks: the three blocks.

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
        # Uniform with a standard deviation of 1.
        self.head = layers.Dense(
            classes, use_bias=False, kernel_initializer=keras.initializers.RandomUniform(-(3**0.5), 3**0.5)
        )

    def adapt(self, images: Images) -> None:
        """Compute the fixed filters from the training images, uint8 (n, height, width, 3)."""
        self.whitening.adapt(images)

    def logits(self, images: tf.Tensor, training: bool = False) -> tf.Tensor:
        features = self.block1(self.whitening(crop_to_odd(images)), training=training)
        features = self.block3(self.block2(features, training=training), training=training)
        return HEAD_SCALE * self.head(tf.reduce_max(features, axis=(1, 2)))

    def call(self, images: tf.Tensor, training: bool = False) -> tf.Tensor:
        return tf.nn.softmax(self.logits(images, training=training))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "classes": self.classes, "blocks": self.blocks}


def crop_to_odd(images: tf.Tensor) -> tf.Tensor:
    """Crop images to an odd height and width: the first pooling drops the last row and column of even sizes."""
    height, width = images.shape[1:3]
    return images[:, : height - (height + 1) % 2, : width - (width + 1) % 2]


def build_airbench(
    input_shape: tuple[int, int, int], *, classes: int, blocks: tuple[Block, Block, Block], dtype: str
) -> Airbench:
    """Build the network with its variables; `adapt` must be called before training."""
    model = Airbench(classes, blocks=blocks, name="airbench", dtype=dtype)
    model(tf.zeros((1, *input_shape), tf.uint8))
    return model
