"""Finds the signatures that must not be batched, because the rows of a batch influence each other.

A model with batch statistics at inference (a batch normalization in training mode, a softmax over the batch) returns
other outputs for a row when it comes in the company of others. Such requests must not share a call. It is found out by
running example rows alone and together: the warm-up records, where there are any, and rows made up from the signature.
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

TIME_LIMIT_S = 10.0  # of a version, so that a slow model does not hold up the others
ROWS = 4
MAX_EXAMPLE_BYTES = 64 * 1024 * 1024  # of one input
UNKNOWN_SIZES = (8, 32, 224)  # for axes of any size: what the model accepts first
# Part of the largest output of a row. Batches of different sizes may be computed by different algorithms, whose
# rounding differs; batches of one size are computed by the same.
ROUNDING = {np.dtype(np.float16): 2e-2}
ROUNDING_DEFAULT = 1e-3
SAME_SIZE_PART = 1e-2  # of that, where both batches have the same size
INTEGERS_PART = 0.01  # of the integers of a row that may differ: rounding flips few

_Arrays = Mapping[str, np.ndarray]
_Call = Callable[[_Arrays], _Arrays | None]


def find_dependent_signatures(path: Path, predictor: Predictor) -> frozenset[str]:
    """Return the signatures of a version for which a row's outputs depend on the other rows of its batch.

    Where no example can be made, or the model refuses all of them, its rows count as independent.
    """
    found: set[str] = set()
    deadline_s = time.monotonic() + TIME_LIMIT_S
    # In a thread, because a call of a model cannot be stopped.
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
        except Exception:  # refused
            return None

    try:
        if recorded is not None and _compare(call, recorded):
            return True
        for size in UNKNOWN_SIZES:
            verdicts = [_compare(call, inputs) for inputs in _make_examples(signature, size)]
            if any(verdicts):
                return True
            if False in verdicts:  # accepted: other sizes would tell nothing new
                break
    except TimeoutError:
        pass
    return False


def _compare(call: _Call, inputs: _Arrays) -> bool | None:
    """Whether rows have other outputs together than alone; None where that cannot be told."""
    rows = len(next(iter(inputs.values())))
    if rows < 2:
        return None
    together = call(inputs)
    alone = [call({name: array[row : row + 1] for name, array in inputs.items()}) for row in range(rows)]
    again = call(inputs)
    if together is None or again is None:
        return None  # then requests that share a call are answered one by one
    if _differ(together, again, SAME_SIZE_PART):
        return None  # it draws random numbers, or has a state
    if any(array.ndim == 0 or len(array) != rows for array in together.values()):
        return True
    for row, outputs in enumerate(alone):
        part = {name: array[row : row + 1] for name, array in together.items()}
        if outputs is None or _differ(part, outputs, 1.0):
            return True
        # Among copies of itself: finer, as the batch has the same size. All copies are compared at the same place.
        copies = call({name: np.repeat(array[row : row + 1], rows, axis=0) for name, array in inputs.items()})
        if copies is not None:
            copy = {name: array[row : row + 1] for name, array in copies.items()}
            if _differ(part, copy, SAME_SIZE_PART):
                return True
    return False


def _differ(ours: _Arrays, theirs: _Arrays, part: float) -> bool:
    return any(_differ_in(array, theirs[name], part) for name, array in ours.items())


def _differ_in(ours: np.ndarray, theirs: np.ndarray, part: float) -> bool:
    if ours.shape != theirs.shape:
        return True
    if ours.dtype == np.object_:
        return bool(np.any(ours != theirs))
    if not np.issubdtype(ours.dtype, np.inexact):
        return bool(np.mean(ours != theirs) > INTEGERS_PART) if ours.size else False
    both = np.concatenate([ours.ravel(), theirs.ravel()])
    finite = np.abs(both[np.isfinite(both)])
    largest = float(finite.max()) if finite.size else 0.0
    tolerance = ROUNDING.get(ours.dtype, ROUNDING_DEFAULT) * part * largest
    return not np.allclose(ours, theirs, rtol=0, atol=tolerance, equal_nan=True)


def _read_recorded_rows(path: Path, signatures: Mapping[str, Signature]) -> dict[str, _Arrays]:
    """Return a few rows of the warm-up records of each signature, of the shape that its first record has."""
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
    except ModelLoadError:  # reported by whoever replays them
        pass
    return {name: inputs for name, inputs in found.items() if len({len(array) for array in inputs.values()}) == 1}


def _make_examples(signature: Signature, size: int) -> Iterator[_Arrays]:
    """Make batches of different random rows, of different ranges, as a signature takes them."""
    rng = np.random.default_rng(0)
    has_strings = any(spec.dtype == "DT_STRING" for spec in signature.inputs.values())
    for variant in range(3 if has_strings else 2):
        inputs = {name: _make_rows(spec, size, rng, variant) for name, spec in signature.inputs.items()}
        made = {name: array for name, array in inputs.items() if array is not None}
        if len(made) == len(inputs):
            yield made


def _make_rows(spec: TensorSpec, size: int, rng: np.random.Generator, variant: int) -> np.ndarray | None:
    """Make rows for an input: variant 0 of a wide range (strings: images), 1 small, 2 strings of different lengths."""
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
    # Rows of different magnitudes, so that the largest of a batch is that of one row.
    magnitudes = np.arange(1, ROWS + 1).reshape(-1, *[1] * (len(shape) - 1)) / ROWS
    if np.issubdtype(dtype, np.integer):
        limit = (256 if dtype == np.uint8 else 100) if variant == 0 else 2
        return np.asarray(rng.integers(0, np.ceil(limit * magnitudes).astype(np.int64), shape)).astype(dtype)
    values = rng.random(shape) * 255 if variant == 0 else rng.normal(size=shape)
    return np.asarray(values * magnitudes).astype(dtype)


def _make_string(rng: np.random.Generator, index: int, variant: int) -> bytes:
    """Make a small PNG file, which TensorFlow's decoders of other formats read as well, or a text."""
    if variant > 0:
        return b"%06d" % index if variant == 1 else b"example " * (index + 1)
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()
