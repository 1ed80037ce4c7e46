"""Rejects models that cannot be served honestly: NaN, random or batch-dependent outputs."""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from training.errors import ModelError
from training.exporter.comparison import ABSOLUTE_TOLERANCE, RELATIVE_TOLERANCE
from training.importer.loading import Source
from training.importer.network import Network

# Deep networks amplify the rounding of float32; half precision rounds by itself.
_TOLERANCE, _HALF_TOLERANCE = 1e-3, 2e-2
_RANDOM_LAYERS = ("Dropout", "Noise", "Random")


def sample_images(input_shape: tuple[int, int, int]) -> np.ndarray:
    """Return uint8 (8, height, width, 3): noise of growing brightness, so that the rows' statistics differ."""
    noise = np.random.default_rng(0).random((8, *input_shape))
    return (noise * np.linspace(32, 256, 8)[:, np.newaxis, np.newaxis, np.newaxis]).astype(np.uint8)


def check_outputs(network: Network, inputs: np.ndarray, *, source: Source) -> None:
    """Check that a model's outputs are finite, repeatable, and independent of the other rows of the batch.

    Args:
        network: the model.
        inputs: a batch as the model takes it, (n, ...), at least two rows.
        source: for messages.

    Raises:
        ModelError: they are not.
    """
    together = network.original(inputs)
    if not np.isfinite(together).all():
        raise ModelError(_explain_nan(network, together, source))
    tolerance = max(ABSOLUTE_TOLERANCE, RELATIVE_TOLERANCE * float(np.abs(together).max()))
    again = float(np.abs(network.original(inputs) - together).max())
    if not again <= tolerance:
        raise ModelError(
            f"{source.description} returns other values for the same images, different by up to {again:.2g}"
            f"{_name_layers(source, _RANDOM_LAYERS)}: dropout or noise is active at inference. Do not call them with "
            "training=True; build the model again without it, and load the weights"
        )
    alone = np.concatenate([network.original(inputs[row : row + 1]) for row in range(len(inputs))])
    influence = float(np.abs(alone - together).max())
    if not influence <= tolerance:
        raise ModelError(
            f"{source.description} returns other values for an image alone than in a batch, different by up to "
            f"{influence:.2g}{_name_layers(source, ('BatchNormalization',))}: the rows influence each other, as by "
            "batch statistics at inference. Call batch normalisation with training=False"
        )


def check_frozen(network: Network, probabilities: np.ndarray, expected: np.ndarray, *, source: Source) -> None:
    """Check that a frozen model returns the probabilities of the model itself.

    Args:
        network: the model.
        probabilities: (n, classes), of the frozen graph.
        expected: (n, classes), from the model's own output.
        source: for messages.

    Raises:
        ModelError: they differ.
    """
    difference = float(np.abs(probabilities - expected).max())
    if not difference <= (_TOLERANCE if network.output.dtype == tf.float32 else _HALF_TOLERANCE):
        raise ModelError(
            f"{source.description} returns other probabilities once its variables are constants, different by up to "
            f"{difference:.2g}: it keeps state that changes with each batch, which a server cannot keep"
        )


def _explain_nan(network: Network, outputs: np.ndarray, source: Source) -> str:
    rows = int((~np.isfinite(outputs)).any(axis=1).sum())
    broken = [
        weight.path
        for layer in source.layers[:1]
        for weight in getattr(layer, "weights", ())
        if not np.isfinite(np.asarray(weight.numpy(), np.float32)).all()
    ]
    where = (
        f"its weights {', '.join(broken[:3])}{' and others' * (len(broken) > 3)} contain NaN or infinite values: the "
        "training diverged. Save an earlier checkpoint, or train with a smaller learning rate"
        if broken
        else f"its {network.weights:,} weights are finite, so the values overflow: check --input-scale"
    )
    return f"{source.description} returns NaN or infinite values for {rows} of {len(outputs)} images, and {where}"


def _name_layers(source: Source, kinds: tuple[str, ...]) -> str:
    names = [layer.name for layer in source.layers if any(kind in type(layer).__name__ for kind in kinds)]
    return f" (its layers {', '.join(names[:3])}{' and others' * (len(names) > 3)})" if names else ""
