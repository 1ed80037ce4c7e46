"""Metrics of the epochs of a run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class EpochResult:
    """Metrics of one epoch, averaged over images: a smaller last batch has less weight.

    Attributes:
        epoch: counted from 1.
        loss, accuracy: on the training images, measured while the weights changed.
        val_loss, val_accuracy: on the validation images, with the weights at the end of the epoch.
        learning_rate: used in this epoch.
        seconds: training and validation together.
        images_per_s: training only.
    """

    epoch: int
    loss: float
    accuracy: float
    val_loss: float
    val_accuracy: float
    learning_rate: float
    seconds: float
    images_per_s: float
