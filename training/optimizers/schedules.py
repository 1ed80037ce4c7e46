"""Learning-rate schedules."""

from __future__ import annotations

import math
from typing import Any

import keras
import tensorflow as tf


class PlateauSchedule:
    """`keras.callbacks.ReduceLROnPlateau`, as in the article's notebook, for every loop.

    Keras's callback loses its state when training is resumed; this one can be saved (`state`) and restored.

    Args:
        factor: multiplies the learning rate.
        patience: epochs without a better validation loss before that.
    """

    MIN_DELTA = 1e-4  # smallest improvement that counts; Keras's default

    def __init__(self, *, factor: float, patience: int) -> None:
        self._factor = factor
        self._patience = patience
        self._best = math.inf
        self._epochs_without = 0

    def next_learning_rate(self, learning_rate: float, *, val_loss: float) -> float:
        """Return the learning rate for the epoch after the one that ended with `val_loss`."""
        if val_loss < self._best - self.MIN_DELTA:
            self._best = val_loss
            self._epochs_without = 0
            return learning_rate
        self._epochs_without += 1
        if self._epochs_without < self._patience:
            return learning_rate
        self._epochs_without = 0
        return learning_rate * self._factor

    @property
    def state(self) -> dict[str, float]:
        """State for `restore`, as JSON values."""
        return {"best": self._best, "epochs_without": self._epochs_without}

    def restore(self, state: dict[str, float]) -> None:
        """Restore a saved `state`."""
        self._best = state["best"]
        self._epochs_without = int(state["epochs_without"])


@keras.saving.register_keras_serializable(package="training")
class LinearDecay(keras.optimizers.schedules.LearningRateSchedule):
    """Decay from `initial` at the first step to 0 at the last."""

    def __init__(self, initial: float, *, steps: int) -> None:
        self.initial = initial
        self.steps = steps

    def __call__(self, step: Any) -> tf.Tensor:
        return self.initial * tf.maximum(0.0, 1 - tf.cast(step, tf.float32) / self.steps)

    def get_config(self) -> dict[str, Any]:
        return {"initial": self.initial, "steps": self.steps}
