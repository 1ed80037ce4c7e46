"""The article's network as a subclass of `keras.Model`: section 2, "Sub-classing"."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf
from keras import layers

from training.models.sequential import used_size

# Sublayers are attributes, not in a list or dict: tf.train.Checkpoint silently skips those (keras-team/keras#18398).


@keras.saving.register_keras_serializable(package="training")
class ConvBlock(layers.Layer):
    """3x3 convolution without padding, then 2x2 max-pooling.

    Input shape:
        float32 (batch, height, width, channels).

    Output shape:
        float32 (batch, (height - 2) // 2, (width - 2) // 2, filters).
    """

    def __init__(self, filters: int, *, activation: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.filters = filters
        self.activation = activation
        self.conv = layers.Conv2D(filters, 3, activation=activation)
        self.pool = layers.MaxPooling2D(2)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        self.conv.build(input_shape)

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        return self.pool(self.conv(inputs))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "filters": self.filters, "activation": self.activation}


@keras.saving.register_keras_serializable(package="training")
class ClassifierHead(layers.Layer):
    """A hidden layer of 128 units, then a probability per class.

    Input shape:
        float32 (batch, height, width, channels).

    Output shape:
        float32 (batch, classes), each row summing to 1.
    """

    def __init__(self, classes: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.classes = classes
        self.flatten = layers.Flatten()
        self.hidden = layers.Dense(128, activation="relu")
        self.probabilities = layers.Dense(classes, activation="softmax")

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        features = self.flatten.compute_output_shape(input_shape)
        self.hidden.build(features)
        self.probabilities.build((features[0], 128))

    def logits(self, inputs: tf.Tensor) -> tf.Tensor:
        output = self.probabilities
        return tf.matmul(self.hidden(self.flatten(inputs)), output.kernel) + output.bias

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        return self.probabilities(self.hidden(self.flatten(inputs)))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "classes": self.classes}


@keras.saving.register_keras_serializable(package="training")
class ImageClassifier(keras.Model):
    """Rescaling, three convolution blocks, a head.

    Input shape:
        uint8 (batch, height, width, 3), raw pixels 0-255.

    Output shape:
        float32 (batch, classes), probabilities.
    """

    def __init__(self, classes: int, *, conv_activation: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.classes = classes
        self.conv_activation = conv_activation
        self.rescaling = layers.Rescaling(1 / 255)
        self.block1 = ConvBlock(64, activation=conv_activation)
        self.block2 = ConvBlock(64, activation=conv_activation)
        self.block3 = ConvBlock(64, activation=conv_activation)
        self.head = ClassifierHead(classes)

    def features(self, images: tf.Tensor) -> tf.Tensor:
        """Return the input of the head."""
        height, width = (used_size(size) for size in images.shape[1:3])
        features = self.block1(self.rescaling(images[:, :height, :width]))
        return self.block3(self.block2(features))

    def logits(self, images: tf.Tensor) -> tf.Tensor:
        return self.head.logits(self.features(images))

    def call(self, images: tf.Tensor) -> tf.Tensor:
        return self.head(self.features(images))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "classes": self.classes, "conv_activation": self.conv_activation}


def build_subclass(input_shape: tuple[int, int, int], *, classes: int, conv_activation: str) -> ImageClassifier:
    """Build the network with its variables. Arguments are those of `build_sequential`."""
    model = ImageClassifier(classes, conv_activation=conv_activation, name="subclass")
    # The call creates the variables: a checkpoint restored into an unbuilt model restores nothing.
    model(tf.zeros((1, *input_shape), tf.uint8))
    return model
