"""Transfer learning: a frozen network of keras.applications, and a head that is trained on its features."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import layers

from training.models.backbones import BACKBONES, build_backbone, enlarged_size
from training.models.inference_graph import InferenceGraph


@keras.saving.register_keras_serializable(package="training")
class Standardization(layers.Layer):
    """Shifts and scales each channel to mean 0 and standard deviation 1 over the training images.

    Input and output shape:
        float32 (batch, channels).
    """

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        channels = (input_shape[-1],)
        self.mean = self.add_weight(shape=channels, initializer="zeros", trainable=False, name="mean")
        self.scale = self.add_weight(shape=channels, initializer="ones", trainable=False, name="scale")

    def adapt(self, features: np.ndarray) -> None:
        """Fit the layer to features, float32 (n, channels)."""
        mean, variance = features.mean(axis=0, dtype=np.float64), features.var(axis=0, dtype=np.float64)
        # What hardly varies is not amplified: it would be noise, or in the second term rounding errors.
        floor = 1e-2 * variance.mean() + 1e-4 * np.square(mean).mean() + np.finfo(np.float32).tiny
        self.mean.assign(mean)
        self.scale.assign(1 / np.sqrt(variance + floor))

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        return (inputs - self.mean) * self.scale


@keras.saving.register_keras_serializable(package="training")
class TransferClassifier(keras.Model):
    """A frozen backbone, global average pooling, standardization, a dense layer.

    Only `head` is trained: pooled features (batch, channels) to probabilities (batch, classes).

    Input shape:
        uint8 (batch, height, width, 3), raw pixels 0-255.

    Output shape:
        float32 (batch, classes), probabilities.
    """

    def __init__(self, classes: int, *, backbone: str, image_size: tuple[int, int], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.classes = classes
        self.backbone_name = backbone
        self.image_size = tuple(image_size)
        height, width = enlarged_size(*self.image_size)
        self.backbone = build_backbone(backbone, height=height, width=width)
        self.standardization = Standardization()
        self.probabilities = layers.Dense(classes, activation="softmax")
        self.head = keras.Sequential(
            [keras.Input((BACKBONES[backbone].channels,)), self.standardization, self.probabilities], name="head"
        )
        # Traced once, whatever calls it: that takes seconds.
        spec = tf.TensorSpec((None, *self.image_size, 3), tf.uint8)
        self._traced_features = tf.function(self._compute_features, input_signature=[spec])

    def enlarge(self, images: tf.Tensor) -> tf.Tensor:
        """Return the backbone's input, float32, of uint8 (batch, height, width, 3)."""
        pixels = tf.cast(images, tf.float32)
        size = enlarged_size(*self.image_size)
        return pixels if size == self.image_size else tf.image.resize(pixels, size)

    def pooled_features(self, images: tf.Tensor) -> tf.Tensor:
        """Return the input of the head, float32 (batch, channels)."""
        return self._traced_features(images)

    def _compute_features(self, images: tf.Tensor) -> tf.Tensor:
        return tf.reduce_mean(self.backbone(self.enlarge(images), training=False), axis=(1, 2))

    def logits(self, images: tf.Tensor) -> tf.Tensor:
        output = self.probabilities
        return tf.matmul(self.standardization(self.pooled_features(images)), output.kernel) + output.bias

    def call(self, images: tf.Tensor) -> tf.Tensor:
        return self.head(self.pooled_features(images))

    def get_config(self) -> dict[str, Any]:
        own = {"classes": self.classes, "backbone": self.backbone_name, "image_size": self.image_size}
        return {**super().get_config(), **own}


def build_transfer(input_shape: tuple[int, int, int], *, classes: int, backbone: str) -> TransferClassifier:
    """Build the network with random weights.

    Args:
        input_shape: (height, width, 3) of the images.
        classes: number of classes.
        backbone: a key of `BACKBONES`.
    """
    height, width, _ = input_shape
    model = TransferClassifier(classes, backbone=backbone, image_size=(height, width), name="transfer")
    model(tf.zeros((1, *input_shape), tf.uint8))
    return model


def fold_transfer(model: TransferClassifier, *, temperature: float) -> InferenceGraph:
    """Freeze the backbone, and fold the scales of standardization and temperature into the dense layer.

    TensorFlow itself folds frozen batch norms into convolutions when it loads a model: doing it here saves no time.
    """
    network = model.backbone
    weights = [
        [variable.numpy() for variable in variables]
        for variables in (network.trainable_variables, network.non_trainable_variables)
    ]
    spec = tf.TensorSpec((None, *enlarged_size(*model.image_size), 3), tf.float32)

    @tf.function(input_signature=[spec], autograph=False)  # one function: the signatures share its constants
    def backbone(pixels: tf.Tensor) -> tf.Tensor:
        return network.stateless_call(*weights, pixels, training=False)[0]

    scale, mean = model.standardization.scale.numpy(), model.standardization.mean.numpy()
    kernel = scale[:, None] * model.probabilities.kernel.numpy() / np.float32(temperature)
    bias = model.probabilities.bias.numpy() / np.float32(temperature)

    def features(images: tf.Tensor) -> tf.Tensor:
        return backbone(model.enlarge(images))

    def head(features: tf.Tensor) -> tf.Tensor:
        # Subtracting the mean first loses less precision than folding it into the bias.
        return tf.nn.bias_add(tf.matmul(tf.reduce_mean(features, axis=(1, 2)) - mean, kernel), bias)

    return InferenceGraph(features, head)
