"""Custom training loop with `tf.GradientTape`: the article's section 3."""

from __future__ import annotations

import time

import keras
import tensorflow as tf

from training.data.input_pipeline import LoopData
from training.history import EpochResult
from training.loops.callback import TrainingCallback, check_finite


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
    mean_loss, accuracy = keras.metrics.Mean(), keras.metrics.SparseCategoricalAccuracy()

    def update_metrics(
        batch_loss: tf.Tensor, labels: tf.Tensor, probabilities: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        # Weighted by the batch size: the last batch of an epoch is usually smaller.
        mean_loss.update_state(batch_loss, sample_weight=tf.shape(labels)[0])
        accuracy.update_state(labels, probabilities)
        return mean_loss.result(), accuracy.result()

    def reset_metrics() -> None:
        mean_loss.reset_state()
        accuracy.reset_state()

    @tf.function(reduce_retracing=True)
    def train_step(images: tf.Tensor, labels: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        with tf.GradientTape() as tape:
            probabilities = model(images, training=True)
            batch_loss = loss(labels, probabilities)
        gradients = tape.gradient(batch_loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return update_metrics(batch_loss, labels, probabilities)

    @tf.function(reduce_retracing=True)
    def validation_step(images: tf.Tensor, labels: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        probabilities = model(images, training=False)
        return update_metrics(loss(labels, probabilities), labels, probabilities)

    results: list[EpochResult] = []
    batches = iter(data.train)
    for epoch in epochs:
        started = time.perf_counter()
        callback.on_epoch_begin(epoch)
        reset_metrics()
        for step in range(1, data.steps_per_epoch + 1):
            train_loss, train_accuracy = map(float, train_step(*next(batches)))
            check_finite(train_loss, epoch=epoch, step=step)
            callback.on_batch_end(step, loss=train_loss, accuracy=train_accuracy)
        trained = time.perf_counter()
        reset_metrics()
        for batch in data.validation:
            metrics = validation_step(*batch)
        val_loss, val_accuracy = map(float, metrics)
        check_finite(val_loss, epoch=epoch, step=data.steps_per_epoch)
        result = EpochResult(
            epoch=epoch,
            loss=train_loss,
            accuracy=train_accuracy,
            val_loss=val_loss,
            val_accuracy=val_accuracy,
            learning_rate=float(optimizer.learning_rate.numpy()),
            seconds=time.perf_counter() - started,
            images_per_s=data.images_per_epoch / (trained - started),
        )
        results.append(result)
        callback.on_epoch_end(result)
    return results
