"""Small networks to import, and images to compare them on."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import layers

from training.importer.importer import ImportedModel, read_model

LABELS = ("cat", "dog", "größe")


def make_images(height: int, width: int, count: int = 5) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def convolutional(*first: Any, shape: tuple[int | None, ...] = (12, 14, 3), last: Any = None) -> keras.Sequential:
    """Return a network with `first` before its first convolution, and `last` as its last layer."""
    keras.utils.set_random_seed(0)
    middle = [layers.Conv2D(4, 3, activation="relu"), layers.GlobalAveragePooling2D()]
    return keras.Sequential([keras.Input(shape), *first, *middle, last or layers.Dense(3, activation="softmax")])


@keras.saving.register_keras_serializable("tests")
class Subclassed(keras.Model):
    """A subclass whose dropout or batch normalisation can be left active at inference."""

    def __init__(self, *, dropout: bool = False, batch_statistics: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.dropout, self.batch_statistics = dropout, batch_statistics
        self.conv = layers.Conv2D(4, 3, activation="relu")
        self.norm = layers.BatchNormalization()
        self.drop = layers.Dropout(0.5)
        self.pool = layers.GlobalAveragePooling2D()
        self.out = layers.Dense(3)

    def call(self, images: Any, training: bool = False) -> Any:
        features = self.norm(self.conv(images), training=training or self.batch_statistics)
        return self.out(self.drop(self.pool(features), training=training or self.dropout))


def subclassed(**options: bool) -> Subclassed:
    keras.utils.set_random_seed(0)
    model = Subclassed(**options)
    model(np.zeros((1, 12, 14, 3), np.float32))
    return model


def adapt(model: keras.Model, inputs: np.ndarray) -> keras.Model:
    """Give batch normalisation the statistics of `inputs`, as training does, so that an output depends on its input."""
    for layer in model.layers:
        if isinstance(layer, layers.BatchNormalization):
            layer.momentum = 0.0
    model(inputs, training=True)
    return model


def read(given: Any, *, labels: Any = LABELS, told: dict[str, str] | None = None, **options: Any) -> ImportedModel:
    """Read a model without publishing it; what is inferred goes into `told`."""
    told = {} if told is None else told
    return read_model(given, labels=labels, tell=told.__setitem__, **options)


def probabilities(imported: ImportedModel, images: np.ndarray) -> np.ndarray:
    """Return what an import would serve for uint8 images."""
    result: np.ndarray = tf.nn.softmax(imported.graph.logits(tf.constant(images))).numpy()
    return result


def softmax(logits: np.ndarray) -> np.ndarray:
    result: np.ndarray = tf.nn.softmax(logits).numpy()
    return result
