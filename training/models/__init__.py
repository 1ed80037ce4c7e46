"""The variants: the article's network, written in two ways, and airbench."""

from __future__ import annotations

from collections.abc import Callable

import keras
import tensorflow as tf

from training.config import PRESETS, TrainingConfig
from training.errors import DatasetError
from training.models import airbench
from training.models.folding import Logits, fold_airbench, fold_article_network, freeze
from training.models.sequential import build_sequential
from training.models.subclass import build_subclass

__all__ = ["MIN_IMAGE_SIZE", "build_model", "compute_logits", "fold_model", "freeze"]

_BUILDERS: dict[str, Callable[..., keras.Model]] = {
    "sequential": build_sequential,
    "subclass": build_subclass,
}
# Three rounds of a 3x3 convolution without padding and a halving leave one pixel of 22.
MIN_IMAGE_SIZE = 22


def build_model(
    variant: str,
    input_shape: tuple[int, int, int],
    *,
    classes: int,
    conv_activation: str = "relu",
    preset: str | None = None,
    dtype: str = "float32",
) -> keras.Model:
    """Build a variant with fresh weights: uint8 (batch, height, width, 3) in, probabilities out.

    A model that has a method `adapt` is to be shown the training images before it is trained.

    Args:
        variant: one of `VARIANTS`.
        input_shape: (height, width, 3) of the images.
        classes: number of classes.
        conv_activation: of the article's network.
        preset: of airbench, by default quick.
        dtype: of airbench, Keras's dtype policy of its blocks.

    Raises:
        DatasetError: the images are too small for the network.
    """
    smallest = airbench.MIN_SIZE if variant == "airbench" else MIN_IMAGE_SIZE
    if min(input_shape[:2]) < smallest:
        height, width, _ = input_shape
        raise DatasetError(
            f"the images are {height}x{width}, and the network needs at least {smallest}x{smallest}: choose a size "
            "with --image-size, such as --image-size 32x32 (make: IMAGE_SIZE=32x32)"
        )
    if variant == "airbench":
        blocks = PRESETS[preset or "quick"].blocks
        return airbench.build_airbench(input_shape, classes=classes, blocks=blocks, dtype=dtype)
    return _BUILDERS[variant](input_shape, classes=classes, conv_activation=conv_activation)


def compute_logits(model: keras.Model, images: tf.Tensor) -> tf.Tensor:
    """Return what the softmax of a model of `build_model` is given, float32 (n, classes)."""
    if not isinstance(model, keras.Sequential):
        return model.logits(images)
    *inner, output = model.layers
    features = images
    for layer in inner:
        features = layer(features)
    return tf.matmul(features, output.kernel) + output.bias


def fold_model(model: keras.Model, config: TrainingConfig, *, temperature: float) -> Logits:
    """Return what a trained model computes, its logits divided by `temperature`, without variables."""
    if isinstance(model, airbench.Airbench):
        return fold_airbench(model, temperature=temperature)
    return fold_article_network(model, conv_activation=config.conv_activation, temperature=temperature)
