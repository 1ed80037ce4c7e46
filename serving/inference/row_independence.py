"""Finds the signatures that must not be batched, because the rows of a batch influence each other.

With batch statistics at inference (batch normalization in training mode, a softmax over the batch), the outputs of a
row depend on the other rows, so requests must not share a model call. The check runs example rows alone and together:
rows of the warm-up records, and random rows that fit the signature.
"""

from __future__ import annotations

import io
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from serving.errors import ModelLoadError
from serving.inference.signatures import Predictor, Signature, TensorSpec
from serving.inference.warmup import read_warmup_records

logger = logging.getLogger(__name__)

TIME_LIMIT_S = 10.0  # per version, so that a slow model does not delay others
ROWS = 4
MAX_EXAMPLE_BYTES = 64 * 1024 * 1024  # per input
UNKNOWN_SIZES = (8, 32, 224)  # tried in this order for axes of any size
# Tolerance relative to the largest output. TensorFlow may use different algorithms, with different rounding, for
# batches of different sizes.
TOLERANCE = {np.dtype(np.float16): 2e-2}
DEFAULT_TOLERANCE = 1e-3
SAME_SIZE_SCALE = 1e-2  # scales the tolerance if both batches have the same size
MAX_DIFFERENT_INTEGERS = 0.01  # fraction of integer outputs that rounding may change

_Arrays = Mapping[str, np.ndarray]
_Call = Callable[[_Arrays], _Arrays | None]


def find_dependent_signatures(path: Path, predictor: Predictor) -> frozenset[str]:
    """Return the signatures of a version whose outputs for a row depend on the other rows of the batch.

    Rows count as independent if no example can be made or the model rejects all examples.
    """
    found: set[str] = set()
    deadline_s = time.monotonic() + TIME_LIMIT_S
    # In a thread, because a model call cannot be cancelled.
    thread = threading.Thread(
        target=_check_signatures, args=(path, predictor, deadline_s, found), name="check-rows", daemon=True
    )
    thread.start()
    thread.join(TIME_LIMIT_S)
    if thread.is_alive() or time.monotonic() >= deadline_s:
        logger.warning("%s: whether rows influence each other could not be checked in %.0f s", path, TIME_LIMIT_S)
    return frozenset(found)


def _check_signatures(path: Path, predictor: Predictor, deadline_s: float, found: set[str]) -> None:
    try:
        recorded = _read_recorded_rows(path, predictor.signatures)
        for name, signature in predictor.signatures.items():
            if signature.is_batched and _is_dependent(predictor, signature, recorded.get(name), deadline_s):
                found.add(name)
    except Exception:
        logger.warning("%s: whether rows influence each other could not be checked", path, exc_info=True)


def _is_dependent(predictor: Predictor, signature: Signature, recorded: _Arrays | None, deadline_s: float) -> bool:
    def call(inputs: _Arrays) -> _Arrays | None:
        if time.monotonic() >= deadline_s:
            raise TimeoutError
        try:
            return predictor.predict(signature.name, inputs)
        except Exception:  # the model rejects the inputs
            return None

    try:
        if recorded is not None and _compare(call, recorded):
            return True
        for size in UNKNOWN_SIZES:
            results = [_compare(call, inputs) for inputs in _make_examples(signature, size)]
            if any(results):
                return True
            if False in results:  # the model accepts this size, so other sizes are not needed
                break
    except TimeoutError:
        pass
    return False


def _compare(call: _Call, inputs: _Arrays) -> bool | None:
    """Return True if rows have different outputs together than alone, None if that is unknown."""
    rows = len(next(iter(inputs.values())))
    if rows < 2:
        return None
    together = call(inputs)
    alone = [call({name: array[row : row + 1] for name, array in inputs.items()}) for row in range(rows)]
    again = call(inputs)
    if together is None or again is None:
        return None  # the batcher also runs requests one by one if their batch fails
    if _differ(together, again, SAME_SIZE_SCALE):
        return None  # the model is random or stateful
    if any(array.ndim == 0 or len(array) != rows for array in together.values()):
        return True
    for row, outputs in enumerate(alone):
        part = {name: array[row : row + 1] for name, array in together.items()}
        if outputs is None or _differ(part, outputs, 1.0):
            return True
        # A batch of copies of the row has the same size, so a smaller tolerance applies.
        copies = call({name: np.repeat(array[row : row + 1], rows, axis=0) for name, array in inputs.items()})
        if copies is not None:
            copy = {name: array[row : row + 1] for name, array in copies.items()}
            if _differ(part, copy, SAME_SIZE_SCALE):
                return True
    return False


def _differ(ours: _Arrays, theirs: _Arrays, scale: float) -> bool:
    return any(_arrays_differ(array, theirs[name], scale) for name, array in ours.items())


def _arrays_differ(ours: np.ndarray, theirs: np.ndarray, scale: float) -> bool:
    if ours.shape != theirs.shape:
        return True
    if ours.dtype == np.object_:
        return bool(np.any(ours != theirs))
    if not np.issubdtype(ours.dtype, np.inexact):
        return bool(np.mean(ours != theirs) > MAX_DIFFERENT_INTEGERS) if ours.size else False
    both = np.concatenate([ours.ravel(), theirs.ravel()])
    finite = np.abs(both[np.isfinite(both)])
    largest = float(finite.max()) if finite.size else 0.0
    tolerance = TOLERANCE.get(ours.dtype, DEFAULT_TOLERANCE) * scale * largest
    return not np.allclose(ours, theirs, rtol=0, atol=tolerance, equal_nan=True)


def _read_recorded_rows(path: Path, signatures: Mapping[str, Signature]) -> dict[str, _Arrays]:
    """Return a few rows of each signature's warm-up records, all of the shape of its first record."""
    found: dict[str, dict[str, np.ndarray]] = {}
    try:
        for name, inputs in read_warmup_records(path, signatures):
            if any(array.ndim == 0 for array in inputs.values()):
                continue
            before = found.get(name)
            if before is None:
                found[name] = {key: array[:ROWS] for key, array in inputs.items()}
            elif before.keys() == inputs.keys() and all(
                before[key].shape[1:] == array.shape[1:] for key, array in inputs.items()
            ):
                found[name] = {key: np.concatenate([before[key], array])[:ROWS] for key, array in inputs.items()}
    except ModelLoadError:  # `replay_warmup_records` reports it
        pass
    return {name: inputs for name, inputs in found.items() if len({len(array) for array in inputs.values()}) == 1}


def _make_examples(signature: Signature, size: int) -> Iterator[_Arrays]:
    """Make batches of random rows, with different value ranges, that fit a signature."""
    rng = np.random.default_rng(0)
    has_strings = any(spec.dtype == "DT_STRING" for spec in signature.inputs.values())
    for variant in range(3 if has_strings else 2):
        inputs = {name: _make_rows(spec, size, rng, variant) for name, spec in signature.inputs.items()}
        made = {name: array for name, array in inputs.items() if array is not None}
        if len(made) == len(inputs):
            yield made


def _make_rows(spec: TensorSpec, size: int, rng: np.random.Generator, variant: int) -> np.ndarray | None:
    """Make rows for an input: variant 0 has a wide range (or images), 1 a small one, 2 strings of different lengths."""
    dtype = spec.numpy_dtype
    if dtype is None or spec.shape is None:
        return None
    shape = (ROWS, *(size if axis is None else axis for axis in spec.shape[1:]))
    if math.prod(shape) * dtype.itemsize > MAX_EXAMPLE_BYTES:
        return None
    if dtype == np.object_:
        strings = np.empty(math.prod(shape), object)
        strings[:] = [_make_string(rng, index, variant) for index in range(len(strings))]
        return strings.reshape(shape)
    if dtype == np.bool_:
        return rng.random(shape) < 0.5
    # Rows differ in magnitude, so that the maximum over the batch is not the maximum of each row.
    magnitudes = np.arange(1, ROWS + 1).reshape(-1, *[1] * (len(shape) - 1)) / ROWS
    if np.issubdtype(dtype, np.integer):
        limit = (256 if dtype == np.uint8 else 100) if variant == 0 else 2
        return np.asarray(rng.integers(0, np.ceil(limit * magnitudes).astype(np.int64), shape)).astype(dtype)
    values = rng.random(shape) * 255 if variant == 0 else rng.normal(size=shape)
    return np.asarray(values * magnitudes).astype(dtype)


def _make_string(rng: np.random.Generator, index: int, variant: int) -> bytes:
    """Make a text, or a small PNG file, which TensorFlow's decoders accept for any format."""
    if variant > 0:
        return b"%06d" % index if variant == 1 else b"example " * (index + 1)
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()
