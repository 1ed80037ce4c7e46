"""The network as a list of layers: the article's section 1, "Sequential API"."""

from __future__ import annotations

import keras
from keras import layers


def used_size(size: int) -> int:
    """Return how many of `size` rows (or columns) of pixels the three rounds of convolution and pooling make use of.

    A halving drops an odd last row, so the convolutions before need not have made it: of 32 rows, 30 are used. To
    leave the others out changes no answer and no gradient, and saves a seventh of the work.
    """
    for _ in range(3):
        size = (size - 2) // 2
    for _ in range(3):
        size = 2 * size + 2
    return size


def build_sequential(input_shape: tuple[int, int, int], *, classes: int, conv_activation: str) -> keras.Sequential:
    """Build the network of three convolutions as a `keras.Sequential`.

    Args:
        input_shape: (height, width, 3) of the images.
        classes: number of classes.
        conv_activation: activation after each convolution; "linear" is the article's own listing.

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
