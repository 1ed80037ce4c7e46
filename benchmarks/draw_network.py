"""Exports a network of keras.applications with random weights: speed does not depend on them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

import training

SIDE = 224
LABELS = "abcdefghij"
# The network of each name, and the pixel values that its preprocessing makes; None where the model does that itself.
NETWORKS = {"mobilenetv2": ("MobileNetV2", "-1..1"), "efficientnetb0": ("EfficientNetB0", None)}


def draw_network(name: str, models: Path) -> Path:
    """Export a network for images of 224x224 pixels as the next version of a model; returns the version's folder."""
    build, scale = NETWORKS[name]
    model = getattr(keras.applications, build)(weights=None, classes=len(LABELS), input_shape=(SIDE, SIDE, 3))
    images = np.random.default_rng(0).uniform(-1, 1, (8, SIDE, SIDE, 3)).astype(np.float32)
    for _ in range(3):
        model(images if scale else 127.5 + 127.5 * images, training=True)  # gives the batch norms means and variances
    return training.export(model, models, name=name, labels=list(LABELS), input_scale=scale)


if __name__ == "__main__":
    draw_network(sys.argv[1], Path(sys.argv[2]))
