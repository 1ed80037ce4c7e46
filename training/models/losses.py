"""Losses that Keras does not have."""

from __future__ import annotations

import keras
import numpy as np
import tensorflow as tf

LABEL_SMOOTHING = 0.1  # half of the airbench paper's value: better on the validation images


@keras.saving.register_keras_serializable(package="training")
class SmoothedCrossentropy(keras.losses.Loss):
    """Cross-entropy of labels and probabilities, with label smoothing."""

    def call(self, y_true: tf.Tensor, y_pred: tf.Tensor) -> tf.Tensor:
        classes = y_pred.shape[-1]
        labels = tf.one_hot(tf.cast(tf.reshape(y_true, (-1,)), tf.int32), classes)
        labels = (1 - LABEL_SMOOTHING) * labels + LABEL_SMOOTHING / classes
        return -tf.reduce_sum(labels * tf.math.log(tf.maximum(y_pred, keras.config.epsilon())), axis=-1)


class ClassWeightedLoss(keras.losses.Loss):
    """A loss whose value for each image is multiplied by the weight of the image's class."""

    def __init__(self, loss: keras.losses.Loss, weights: np.ndarray) -> None:
        """Weight `loss` of (labels, probabilities) by `weights`, float (classes,)."""
        super().__init__(name=loss.name)
        self._loss = loss
        self._weights = tf.constant(weights, tf.float32)

    def call(self, y_true: tf.Tensor, y_pred: tf.Tensor) -> tf.Tensor:
        labels = tf.cast(tf.reshape(y_true, (-1,)), tf.int32)
        return self._loss.call(y_true, y_pred) * tf.gather(self._weights, labels)
