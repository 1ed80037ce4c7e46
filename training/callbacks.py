"""What a loop reports, and to whom: the same for every loop."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from training.errors import DivergedError


@dataclass(frozen=True, kw_only=True)
class EpochResult:
    """The figures of one epoch, each a mean over images (a smaller last batch counts for less).

    Attributes:
        epoch: counted from 1.
        loss, accuracy: over the training images, as the weights changed under them.
        val_loss, val_accuracy: over the validation images, with the weights at the end of the epoch.
        learning_rate: the one this epoch was trained with.
        seconds: training and validation together.
        images_per_s: training alone.
    """

    epoch: int
    loss: float
    accuracy: float
    val_loss: float
    val_accuracy: float
    learning_rate: float
    seconds: float
    images_per_s: float


class Monitor(Protocol):
    """What follows a loop: shows progress, saves checkpoints, lowers the learning rate."""

    def on_epoch_start(self, epoch: int) -> None:
        """`epoch` (counted from 1) begins."""

    def on_batch_end(self, step: int, *, loss: float, accuracy: float) -> None:
        """`step` batches of this epoch are done; the figures are means over the epoch so far."""

    def on_epoch_end(self, result: EpochResult) -> None:
        """Take note of a whole epoch, validation included. May change the optimizer's learning rate."""


def check_finite(loss: float, *, epoch: int, step: int) -> None:
    """Raise `DivergedError` when `loss` is NaN or infinite: nothing after it could be of use."""
    if not math.isfinite(loss):
        raise DivergedError(
            f"the loss became {loss} in epoch {epoch}, batch {step}: the run has diverged. "
            "Train with a lower --learning-rate"
        )
