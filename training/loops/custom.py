"""Custom training loop with `tf.GradientTape`: the article's section 3, for one replica of the model or several."""

from __future__ import annotations

import time
from typing import Any

import keras
import numpy as np
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
    """Train with a `tf.GradientTape`. Arguments, result and errors are those of `train_fit`.

    Called in the scope of a `tf.distribute.Strategy`, each of its replicas takes a part of every batch. The loss is
    summed and divided by the size of the whole batch, so several replicas compute what a single one would.
    """
    strategy = tf.distribute.get_strategy()

    def all_sums(losses: tf.Tensor, labels: tf.Tensor, probabilities: tf.Tensor) -> tf.Tensor:
        """Return the sum of the losses, the correct predictions and the images of all replicas."""
        is_image = tf.cast(labels >= 0, tf.float32)  # other rows fill up the last validation batch
        is_correct = tf.cast(tf.argmax(probabilities, axis=1) == labels, tf.float32)
        own = [tf.reduce_sum(tf.cast(values, tf.float32) * is_image) for values in (losses, is_correct)]
        sums = tf.stack([*own, tf.reduce_sum(is_image)])
        return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, sums)

    def train_replica(images: tf.Tensor, labels: tf.Tensor, batch_size: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            probabilities = model(images, training=True)
            losses = loss.call(labels, probabilities)
            part = tf.reduce_sum(losses) / tf.cast(batch_size, losses.dtype)
        gradients = tape.gradient(part, model.trainable_variables)
        # Sums the gradients of all replicas.
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return all_sums(losses, labels, probabilities)

    def validate_replica(images: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        probabilities = model(images, training=False)
        return all_sums(loss.call(tf.maximum(labels, 0), probabilities), labels, probabilities)

    @tf.function(reduce_retracing=True)
    def train_step(images: tf.Tensor, labels: tf.Tensor, batch_size: tf.Tensor) -> Any:
        return strategy.run(train_replica, args=(images, labels, batch_size))

    @tf.function(reduce_retracing=True)
    def validation_step(images: tf.Tensor, labels: tf.Tensor) -> Any:
        return strategy.run(validate_replica, args=(images, labels))

    def read(sums: Any) -> np.ndarray:
        """Return the sums, which are the same in every replica, as float64 (3,)."""
        value: np.ndarray = strategy.experimental_local_results(sums)[0].numpy()
        return value.astype(np.float64)

    results: list[EpochResult] = []
    batches = iter(data.train)
    for epoch in epochs:
        started = time.perf_counter()
        callback.on_epoch_begin(epoch)
        totals = np.zeros(3)
        for step in range(1, data.steps_per_epoch + 1):
            batch_size = min(data.batch_size, data.images_per_epoch - (step - 1) * data.batch_size)
            totals += read(train_step(*next(batches), tf.constant(batch_size)))
            train_loss, train_accuracy = totals[:2] / totals[2]
            check_finite(train_loss, epoch=epoch, step=step)
            callback.on_batch_end(step, loss=train_loss, accuracy=train_accuracy)
        trained = time.perf_counter()
        totals = np.zeros(3)
        for batch in data.validation:
            totals += read(validation_step(*batch))
            callback.on_validation_batch_end()
        val_loss, val_accuracy = totals[:2] / totals[2]
        check_finite(val_loss, epoch=epoch, step=data.steps_per_epoch)
        result = EpochResult(
            epoch=epoch,
            loss=float(train_loss),
            accuracy=float(train_accuracy),
            val_loss=float(val_loss),
            val_accuracy=float(val_accuracy),
            learning_rate=float(optimizer.learning_rate.numpy()),
            seconds=time.perf_counter() - started,
            images_per_s=data.images_per_epoch / (trained - started),
        )
        results.append(result)
        callback.on_epoch_end(result)
    return results
