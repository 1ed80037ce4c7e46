"""Training loops: they take the same arguments and return the same result."""

from __future__ import annotations

from training.loops.custom import train_custom
from training.loops.fit import train_fit

TRAIN_FUNCTIONS = {"fit": train_fit, "custom": train_custom}
