"""Keras training loop, `compile` and `fit`: the article's sections 1 and 2."""

from __future__ import annotations

import time
from typing import Any

import keras

from training.data.input_pipeline import LoopData
from training.history import EpochResult
from training.loops.callback import TrainingCallback, check_finite


class _KerasCallback(keras.callbacks.Callback):
    """Forwards Keras's events to a `TrainingCallback`, and collects the results."""

    def __init__(self, callback: TrainingCallback, *, images_per_epoch: int) -> None:
        super().__init__()
        self.results: list[EpochResult] = []
        self._callback = callback
        self._images_per_epoch = images_per_epoch
        self._epoch = 0
        self._started = self._trained = 0.0

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:  # noqa: ARG002
        self._epoch = epoch + 1
        self._started = time.perf_counter()
        self._callback.on_epoch_begin(self._epoch)

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        assert logs is not None
        loss, accuracy = float(logs["loss"]), float(logs["accuracy"])
        check_finite(loss, epoch=self._epoch, step=batch + 1)
        self._callback.on_batch_end(batch + 1, loss=loss, accuracy=accuracy)

    def on_test_begin(self, logs: dict[str, Any] | None = None) -> None:  # noqa: ARG002
        self._trained = time.perf_counter()

    def on_test_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:  # noqa: ARG002
        self._callback.on_validation_batch_end()

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
        self._callback.on_epoch_end(result)


def train_fit(
    model: keras.Model,
    optimizer: keras.optimizers.Optimizer,
    loss: keras.losses.Loss,
    data: LoopData,
    *,
    epochs: range,
    callback: TrainingCallback,
) -> list[EpochResult]:
    """Train with `Model.compile` and `Model.fit`.

    Args:
        model: uint8 (batch, height, width, 3) in, probabilities (batch, classes) out.
        optimizer: built for the model's variables.
        loss: of labels and probabilities.
        data: training and validation batches.
        epochs: to train, counted from 1.
        callback: called after every batch and epoch.

    Returns:
        The metrics of each epoch.

    Raises:
        DivergedError: the loss became NaN or infinite.
    """
    model.compile(optimizer, loss=loss, metrics=[keras.metrics.SparseCategoricalAccuracy(name="accuracy")])
    keras_callback = _KerasCallback(callback, images_per_epoch=data.images_per_epoch)
    model.fit(
        data.train,
        validation_data=data.validation,
        steps_per_epoch=data.steps_per_epoch,
        initial_epoch=epochs.start - 1,
        epochs=epochs.stop - 1,
        callbacks=[keras_callback],
        verbose=0,
        shuffle=False,  # the dataset is already shuffled by the seed
    )
    return keras_callback.results
