"""Input scales: how pixels become the values that a model was trained on. Imports no TensorFlow.

The three of ImageNet's models compute what `preprocess_input` of `keras.applications` does, in its modes "tf", "caffe"
and "torch".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

# Float32 pixels 0 to 255, in RGB on the last axis, to values of the same shape. A NumPy array or a tensor.
Scale = Callable[[Any], Any]

COLORS = ("rgb", "bgr", "grey")

_CAFFE_MEANS = np.array([103.939, 116.779, 123.68], np.float32)  # blue, green, red
_TORCH_MEANS = np.array([0.485, 0.456, 0.406], np.float32)
_TORCH_DEVIATIONS = np.array([0.229, 0.224, 0.225], np.float32)


def _bytes(pixels: Any) -> Any:
    return pixels


def _unit(pixels: Any) -> Any:
    return pixels / np.float32(255)


def _symmetric(pixels: Any) -> Any:
    return pixels / np.float32(127.5) - np.float32(1)


def _caffe(pixels: Any) -> Any:
    return pixels[..., ::-1] - _CAFFE_MEANS


def _torch(pixels: Any) -> Any:
    return (pixels / np.float32(255) - _TORCH_MEANS) / _TORCH_DEVIATIONS


SCALES: Mapping[str, Scale] = MappingProxyType(
    {"0..255": _bytes, "0..1": _unit, "-1..1": _symmetric, "imagenet-caffe": _caffe, "imagenet-torch": _torch}
)
# The scales that are the same for each channel, with their values of black and white.
RANGES: Mapping[str, tuple[float, float]] = MappingProxyType(
    {"0..255": (0.0, 255.0), "0..1": (0.0, 1.0), "-1..1": (-1.0, 1.0)}
)


def plausible_scales(*, channels: int, is_float: bool) -> tuple[str, ...]:
    """Return the scales that a model may have been trained with.

    Args:
        channels: of the model's input, 1 or 3.
        is_float: whether the input has a floating-point type; whole numbers are pixels as they are.
    """
    if not is_float:
        return ("0..255",)
    return tuple(SCALES) if channels == 3 else tuple(RANGES)
