"""Model variants. `RECIPES` describes each of them. Importing this package does not import TensorFlow."""

from __future__ import annotations

from typing import TYPE_CHECKING

from training.errors import DatasetError
from training.models.recipes import RECIPES

if TYPE_CHECKING:
    import keras

__all__ = ["RECIPES", "build_model"]


def build_model(
    variant: str,
    input_shape: tuple[int, int, int],
    *,
    classes: int,
    conv_activation: str = "relu",
    preset: str | None = None,
    backbone: str | None = None,
    dtype: str = "float32",
) -> keras.Model:
    """Build a model with random weights: uint8 (batch, height, width, 3) in, probabilities (batch, classes) out.

    `Recipe.prepare` must prepare it before it is trained.

    Args:
        variant: a key of `RECIPES`.
        input_shape: (height, width, 3) of the images.
        classes: number of classes.
        conv_activation: activation after each convolution of the article's network.
        preset: size of the airbench network; "quick" by default.
        backbone: of the transfer variant; "MobileNetV3Small" by default.
        dtype: Keras dtype policy of airbench's blocks.

    Raises:
        DatasetError: the images are too small for the network.
    """
    recipe = RECIPES[variant]
    if min(input_shape[:2]) < recipe.min_image_size:
        height, width, _ = input_shape
        size = f"{recipe.min_image_size}x{recipe.min_image_size}"
        raise DatasetError(
            f"the images are {height}x{width}, but the network needs at least {size}: choose a size with --image-size, "
            "such as --image-size 32x32 (make: IMAGE_SIZE=32x32)"
        )
    return recipe.build(
        input_shape, classes=classes, conv_activation=conv_activation, preset=preset, backbone=backbone, dtype=dtype
    )
