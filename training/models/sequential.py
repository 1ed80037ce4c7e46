"""The article's network as a `keras.Sequential`: section 1, "Sequential API"."""

from __future__ import annotations

import keras
from keras import layers


def used_size(size: int) -> int:
    """Return how many of `size` rows (or columns) of pixels influence the output: 30 of 32.

    Pooling drops an odd last row. Cropping the unused rows first changes no output and no gradient, and saves a seventh
    of the computation.
    """
    for _ in range(3):
        size = (size - 2) // 2
    for _ in range(3):
        size = 2 * size + 2
    return size


def build_sequential(input_shape: tuple[int, int, int], *, classes: int, conv_activation: str) -> keras.Sequential:
    """Build the network.

    Args:
        input_shape: (height, width, 3) of the images.
        classes: number of classes.
        conv_activation: activation after each convolution; "linear" is the article's listing.

    Input shape:
        uint8 (batch, height, width, 3), raw pixels 0-255.

    Output shape:
        float32 (batch, classes), probabilities.
    """
    height, width, _ = input_shape
    return keras.Sequential(
        [
            keras.Input(input_shape, dtype="uint8", name="images"),
            layers.Cropping2D(((0, height - used_size(height)), (0, width - used_size(width)))),
            layers.Rescaling(1 / 255),
            layers.Conv2D(64, 3, activation=conv_activation),
            layers.MaxPooling2D(2),
            layers.Conv2D(64, 3, activation=conv_activation),
            layers.MaxPooling2D(2),
            layers.Conv2D(64, 3, activation=conv_activation),
            layers.MaxPooling2D(2),
            layers.Flatten(),
            layers.Dense(128, activation="relu"),
            layers.Dense(classes, activation="softmax"),
        ],
        name="sequential",
    )
