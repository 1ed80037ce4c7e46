"""Backbones of the `transfer` variant: networks of keras.applications, and the files with their weights.

Importing this module does not import TensorFlow.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from training.errors import WeightsError

if TYPE_CHECKING:
    import keras


@dataclass(frozen=True)
class Backbone:
    """A network of keras.applications without its classifier. Its preprocessing of pixels 0-255 is inside.

    Attributes:
        weights: number of them.
        channels: of its last feature map.
        values_per_pixel: feature values that are in memory at once, for each pixel of an image.
        official_file: name of Keras's file with the ImageNet weights.
    """

    weights: int
    channels: int
    values_per_pixel: int
    official_file: str


# Those that include their preprocessing, from the fastest to the most accurate on ImageNet (68, 76 and 79 %).
BACKBONES = {
    "MobileNetV3Small": Backbone(939_120, 576, 19, "weights_mobilenet_v3_small_224_1.0_float_no_top_v2.h5"),
    "MobileNetV3Large": Backbone(2_996_352, 960, 55, "weights_mobilenet_v3_large_224_1.0_float_no_top_v2.h5"),
    "EfficientNetV2B0": Backbone(5_919_312, 1280, 27, "efficientnetv2-b0_notop.h5"),
}
DEFAULT_BACKBONE = "MobileNetV3Small"
# Smaller images are enlarged in the graph: backbones halve an image five times, and learned from larger objects.
SMALLEST_SIDE = 96


def find_weights(name: str, path: Path | None) -> Path:
    """Return the resolved path of a backbone's weights: `path`, or without one the file in Keras's cache.

    Raises:
        WeightsError: there is no such file; the message says how to get it.
    """
    if path is not None:
        if not path.is_file():
            raise WeightsError(
                f"{path} with the weights of {name} is {'a folder' if path.is_dir() else 'missing'}: name the file "
                "with --weights PATH (make: WEIGHTS=PATH)"
            )
        return path.resolve()
    cache = Path(os.environ.get("KERAS_HOME") or Path.home() / ".keras") / "models"
    official = cache / BACKBONES[name].official_file
    if not official.is_file():
        raise WeightsError(
            f"the weights of {name} are not here, and are never downloaded silently: name their file with --weights "
            f"PATH (make: WEIGHTS=PATH), or put {official.name} into {cache}. Keras downloads it there with: python -c "
            f'"import keras; keras.applications.{name}(include_top=False)"'
        )
    return official.resolve()


def enlarged_size(height: int, width: int) -> tuple[int, int]:
    """Return the (height, width) that an image has in the backbone: its own, or enlarged to `SMALLEST_SIDE`."""
    factor = max(1.0, SMALLEST_SIDE / min(height, width))
    return round(height * factor), round(width * factor)


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_weights(backbone: keras.Model, name: str, path: Path, *, sha256: str | None) -> None:
    """Load the weights of a backbone from a file written by Keras.

    Args:
        backbone: built by `build_backbone`.
        name: of the backbone, a key of `BACKBONES`.
        path: `.weights.h5` from `save_weights`, or `.h5` of Keras 2, as the official files are.
        sha256: expected checksum of the file; `None` accepts any.

    Raises:
        WeightsError: the file is missing, damaged, of another network or has another checksum.
    """
    find_weights(name, path)
    if sha256 is not None and (found := hash_file(path)) != sha256:
        raise WeightsError(
            f"{path} has changed: its SHA-256 is {found}, and {sha256} was expected. Restore the file, or start a new "
            "run with the new one"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of arrays that are not needed
            backbone.load_weights(path)
    except Exception as error:  # Keras and h5py raise many kinds for a file that is not what they expect
        expected = BACKBONES[name]
        others = " or ".join(f"--backbone {other}" for other in BACKBONES if other != name)
        raise WeightsError(
            f"{path} does not have the {expected.weights:,} weights of keras.applications.{name}(include_top=False): "
            f"{_reason(error)}. Expected {expected.official_file}, or a file from save_weights that ends in "
            f".weights.h5; for the weights of another network name it: {others}"
        ) from error
    if not all(np.isfinite(weight).all() for weight in backbone.get_weights()):
        raise WeightsError(f"{path} has weights that are NaN or infinite: it is damaged. Get the file again")


def build_backbone(name: str, *, height: int, width: int) -> keras.Model:
    """Build a frozen backbone with random weights: float32 (n, height, width, 3), pixels 0-255, to its feature map."""
    import keras

    backbone = getattr(keras.applications, name)(include_top=False, weights=None, input_shape=(height, width, 3))
    backbone.trainable = False
    return backbone


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and "could not be loaded" in lines[0]:  # the first object's own message follows
        return lines[1].rstrip(".")
    return (lines or [type(error).__name__])[0].rstrip(".")
