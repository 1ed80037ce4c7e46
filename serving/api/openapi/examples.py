"""Small inputs of a model's signatures, for the examples of requests."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from io import BytesIO

import numpy as np
from PIL import Image

from serving.inference.image_classifier import FILES_INPUT
from serving.inference.signatures import Signature, TensorSpec

MAX_ELEMENTS = 64  # of an input; more numbers are no example to read


def make_inputs(signatures: Mapping[str, Signature]) -> Iterator[tuple[Signature, dict[str, np.ndarray]]]:
    """Yield the signatures that have inputs of few elements, with an array for each input: one row of zeros or PNG."""
    for signature in signatures.values():
        arrays = {name: _make_array(spec) for name, spec in signature.inputs.items()}
        found = {name: array for name, array in arrays.items() if array is not None}
        if found and len(found) == len(arrays):
            yield signature, found


def _make_array(spec: TensorSpec) -> np.ndarray | None:
    if spec.shape is None or spec.numpy_dtype is None:
        return None
    shape = tuple(1 if size is None else size for size in spec.shape)
    if not 0 < math.prod(shape) <= MAX_ELEMENTS or spec.numpy_dtype.kind == "c":
        return None
    if spec.numpy_dtype.hasobject:
        return np.full(shape, _make_png() if spec.name == FILES_INPUT else b"text", np.object_)
    return np.zeros(shape, spec.numpy_dtype)


def _make_png() -> bytes:
    """Return the smallest image that every model takes: it is resized."""
    file = BytesIO()
    Image.new("RGB", (1, 1), "red").save(file, "PNG")
    return file.getvalue()
