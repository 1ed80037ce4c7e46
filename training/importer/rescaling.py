"""Whether a model rescales pixels itself, and which input scale its own rescaling shows.

All that comes before the first convolution or matrix product is computed for a black and a white image of each scale:
layers such as `Rescaling` and `Normalization`, `preprocess_input`, or plain arithmetic. The scale for which white
and black become what networks are trained on is the model's own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import tensorflow as tf

from training.importer.inspection import ImageInput
from training.importer.network import Network
from training.importer.scaling import RANGES

# What black and white become in usual networks; within a fiftieth of the difference.
_USUAL = ((0.0, 1.0), (-1.0, 1.0), (-0.5, 0.5), (0.0, 255.0), (-127.5, 127.5))
_USUAL_TOLERANCE = 0.02
# Otherwise means are subtracted, and the values divided by a standard deviation or not.
_STANDARDIZED_SPAN, _STANDARDIZED_LARGEST = (0.9, 10.0), 5.0
_CENTRED_SPAN, _CENTRED_LARGEST = (200.0, 300.0), 300.0


@dataclass(frozen=True)
class Rescaling:
    """What a model does with pixels before its first weights.

    Attributes:
        scale: the input scale that it shows; `None` if it shows none.
        black, white: what its first weights see of a black and a white image in that scale.
    """

    scale: str | None
    black: float = 0.0
    white: float = 0.0


def read_rescaling(network: Network, image_input: ImageInput) -> Rescaling:
    """Return the input scale that a model's own rescaling shows."""
    tensor = network.before_weights()
    if tensor is None:
        return Rescaling(None)
    compute = network.compute(tensor)

    def see(value: float) -> np.ndarray:
        """Return what the first weights see in the middle of an even image; they may pad its border."""
        image = tf.fill((1, *image_input.spec.shape[1:]), tf.cast(value, image_input.dtype))
        values: np.ndarray = compute(image).numpy()[0].astype(np.float64)
        return values[values.shape[0] // 2, values.shape[1] // 2] if values.ndim == 3 else values

    seen = {}
    for scale, ends in RANGES.items():
        dark, bright = (see(end) for end in ends)
        seen[scale] = float(min(dark.min(), bright.min())), float(max(dark.max(), bright.max()))
    for fits in (_is_usual, _is_standardized):
        if fitting := [scale for scale, (low, high) in seen.items() if fits(low, high)]:
            return Rescaling(fitting[0], *seen[fitting[0]]) if len(fitting) == 1 else Rescaling(None)
    return Rescaling(None)


def _is_usual(low: float, high: float) -> bool:
    return any(
        abs(low - usual_low) + abs(high - usual_high) <= 2 * _USUAL_TOLERANCE * (usual_high - usual_low)
        for usual_low, usual_high in _USUAL
    )


def _is_standardized(low: float, high: float) -> bool:
    span, largest = high - low, max(abs(low), abs(high))
    return (_STANDARDIZED_SPAN[0] <= span <= _STANDARDIZED_SPAN[1] and largest <= _STANDARDIZED_LARGEST) or (
        _CENTRED_SPAN[0] <= span <= _CENTRED_SPAN[1] and largest <= _CENTRED_LARGEST
    )
