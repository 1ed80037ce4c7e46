"""Training by `compile` and `fit`: the article's sections 1 and 2."""

from __future__ import annotations

import time
from typing import Any

import keras
import tensorflow as tf

from training.callbacks import EpochResult, Monitor, check_finite


class _MonitorCallback(keras.callbacks.Callback):
    """Tell a `Monitor` what Keras tells its callbacks, and collect the results."""

    def __init__(self, monitor: Monitor, *, images_per_epoch: int) -> None:
        super().__init__()
        self.results: list[EpochResult] = []
        self._monitor = monitor
        self._images_per_epoch = images_per_epoch
        self._epoch = 0
        self._started = self._trained = 0.0

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:  # noqa: ARG002
        self._epoch = epoch + 1
        self._started = time.perf_counter()
        self._monitor.on_epoch_start(self._epoch)

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        assert logs is not None
        loss, accuracy = float(logs["loss"]), float(logs["accuracy"])
        check_finite(loss, epoch=self._epoch, step=batch + 1)
        self._monitor.on_batch_end(batch + 1, loss=loss, accuracy=accuracy)

    def on_test_begin(self, logs: dict[str, Any] | None = None) -> None:  # noqa: ARG002
        self._trained = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:  # noqa: ARG002
        assert logs is not None
        check_finite(logs["val_loss"], epoch=self._epoch, step=self.params["steps"])
        result = EpochResult(
            epoch=self._epoch,
            loss=logs["loss"],
            accuracy=logs["accuracy"],
            val_loss=logs["val_loss"],
            val_accuracy=logs["val_accuracy"],
            learning_rate=float(self.model.optimizer.learning_rate.numpy()),
            seconds=time.perf_counter() - self._started,
            images_per_s=self._images_per_epoch / (self._trained - self._started),
        )
        self.results.append(result)
        self._monitor.on_epoch_end(result)


def train_fit(
    model: keras.Model,
    optimizer: keras.optimizers.Optimizer,
    loss: keras.losses.Loss,
    *,
    train: tf.data.Dataset,
    validation: tf.data.Dataset,
    steps_per_epoch: int,
    images_per_epoch: int,
    first_epoch: int,
    epochs: int,
    monitor: Monitor,
) -> list[EpochResult]:
    """Train with Keras's own loop.

    Args:
        model: uint8 (batch, height, width, 3) in, probabilities (batch, classes) out.
        optimizer: built for the model's variables.
        loss: of class numbers and probabilities.
        train: endless batches of (images, labels), beginning with those of `first_epoch`.
        validation: the validation images once, in batches.
        steps_per_epoch: batches an epoch.
        images_per_epoch: training images an epoch.
        first_epoch: epochs already done.
        epochs: epochs in all.
        monitor: is told of every batch and epoch.

    Returns:
        The result of each epoch trained here.

    Raises:
        DivergedError: the loss became NaN or infinite.
    """
    model.compile(
        optimizer,
        loss=loss,
        metrics=[keras.metrics.SparseCategoricalAccuracy(name="accuracy")],
    )
    callback = _MonitorCallback(monitor, images_per_epoch=images_per_epoch)
    model.fit(
        train,
        validation_data=validation,
        steps_per_epoch=steps_per_epoch,
        initial_epoch=first_epoch,
        epochs=epochs,
        callbacks=[callback],
        verbose=0,
        shuffle=False,  # the dataset comes in the order of the seed
    )
    return callback.results
