"""Losses that Keras does not have."""

from __future__ import annotations

import keras
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
