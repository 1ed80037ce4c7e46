"""Custom training loop with `tf.GradientTape`: the article's section 3."""

from __future__ import annotations

import time
from collections.abc import Iterable

import keras
import tensorflow as tf

from training.data.input_pipeline import LoopData
from training.history import EpochResult
from training.loops.callback import TrainingCallback, check_finite


class _Means:
    """Loss and accuracy averaged over images, inside the graph of a step."""

    def __init__(self) -> None:
        self.loss = keras.metrics.Mean()
        self.accuracy = keras.metrics.SparseCategoricalAccuracy()

    def reset(self) -> None:
        self.loss.reset_state()
        self.accuracy.reset_state()

    def update(self, loss: tf.Tensor, labels: tf.Tensor, probabilities: tf.Tensor) -> None:
        # Weighted by the batch: the last one of an epoch is usually smaller.
        self.loss.update_state(loss, sample_weight=tf.shape(labels)[0])
        self.accuracy.update_state(labels, probabilities)

    def result(self) -> tuple[tf.Tensor, tf.Tensor]:
        return self.loss.result(), self.accuracy.result()


def train_custom(
    model: keras.Model,
    optimizer: keras.optimizers.Optimizer,
    loss: keras.losses.Loss,
    data: LoopData,
    *,
    epochs: range,
    callback: TrainingCallback,
) -> list[EpochResult]:
    """Train with a `tf.GradientTape`. Arguments, result and errors are those of `train_fit`."""
    means = _Means()

    @tf.function(reduce_retracing=True)
    def train_step(images: tf.Tensor, labels: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        with tf.GradientTape() as tape:
            probabilities = model(images, training=True)
            batch_loss = loss(labels, probabilities)
        gradients = tape.gradient(batch_loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        means.update(batch_loss, labels, probabilities)
        return means.result()

    @tf.function(reduce_retracing=True)
    def validation_step(images: tf.Tensor, labels: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        probabilities = model(images, training=False)
        means.update(loss(labels, probabilities), labels, probabilities)
        return means.result()

    def validate(batches: Iterable[tuple[tf.Tensor, tf.Tensor]]) -> tuple[float, float]:
        means.reset()
        for images, labels in batches:
            mean_loss, accuracy = validation_step(images, labels)
        return float(mean_loss), float(accuracy)

    results: list[EpochResult] = []
    batches = iter(data.train)
    for epoch in epochs:
        started = time.perf_counter()
        callback.on_epoch_begin(epoch)
        means.reset()
        for step in range(1, data.steps_per_epoch + 1):
            mean_loss, accuracy = map(float, train_step(*next(batches)))
            check_finite(mean_loss, epoch=epoch, step=step)
            callback.on_batch_end(step, loss=mean_loss, accuracy=accuracy)
        trained = time.perf_counter()

        val_loss, val_accuracy = validate(data.validation)
        check_finite(val_loss, epoch=epoch, step=data.steps_per_epoch)
        result = EpochResult(
            epoch=epoch,
            loss=mean_loss,
            accuracy=accuracy,
            val_loss=val_loss,
            val_accuracy=val_accuracy,
            learning_rate=float(optimizer.learning_rate.numpy()),
            seconds=time.perf_counter() - started,
            images_per_s=data.images_per_epoch / (trained - started),
        )
        results.append(result)
        callback.on_epoch_end(result)
    return results
