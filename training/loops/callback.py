"""The interface between the training loops and what follows a run."""

from __future__ import annotations

import math
from typing import Protocol

from training.errors import DivergedError
from training.history import EpochResult


class TrainingCallback(Protocol):
    """Called by every loop; shows progress, saves checkpoints, changes the learning rate.

    Its methods may raise `KeyboardInterrupt`, which ends the loop.
    """

    def on_epoch_begin(self, epoch: int) -> None:
        """Handle the start of `epoch`, counted from 1."""

    def on_batch_end(self, step: int, *, loss: float, accuracy: float) -> None:
        """Handle the end of a batch. `step` counts from 1; loss and accuracy are means over the epoch so far."""

    def on_validation_batch_end(self) -> None:
        """Handle the end of a batch of validation images."""

    def on_epoch_end(self, result: EpochResult) -> None:
        """Handle the end of an epoch, after validation. May change the optimizer's learning rate."""


def check_finite(loss: float, *, epoch: int, step: int) -> None:
    """Raise `DivergedError` if the loss is NaN or infinite."""
    if not math.isfinite(loss):
        raise DivergedError(
            f"the loss became {loss} in epoch {epoch}, batch {step}: the run has diverged. "
            "Train with a lower --learning-rate"
        )
