"""Large arrays to JSON, slice by slice: between two slices other requests have their turn.

orjson holds the interpreter's lock while it writes, which for ten million numbers is a second.
"""

from __future__ import annotations

import json

import numpy as np
import orjson

SLICE_ELEMENTS = 64 * 1024  # written within a few milliseconds


def write_large(array: np.ndarray) -> np.ndarray | orjson.Fragment:
    """Return an array of numbers as it is, for orjson to write; a large one as JSON that is written already."""
    return orjson.Fragment(b"".join(dump_array(array))) if is_large(array) else array


def is_large(array: np.ndarray) -> bool:
    """Whether an array is written in slices."""
    return array.ndim > 0 and array.size > SLICE_ELEMENTS


def dump_array(array: np.ndarray) -> list[bytes]:
    """Write an array of numbers as nested lists, in slices; numbers that are not finite as `NaN` and `Infinity`."""
    if not is_large(array):
        return [_dump_slice(array)]
    row_size = array.size // len(array)
    if row_size > SLICE_ELEMENTS:
        lists = [dump_array(row) for row in array]
    else:
        step = SLICE_ELEMENTS // max(1, row_size)
        lists = [[_dump_slice(array[start : start + step])[1:-1]] for start in range(0, len(array), step)]
    slices = [b"["]
    for part in lists:
        slices += part
        slices.append(b",")
    slices[-1] = b"]"
    return slices


def _dump_slice(array: np.ndarray) -> bytes:
    text: bytes = orjson.dumps(np.ascontiguousarray(array), option=orjson.OPT_SERIALIZE_NUMPY)
    if b"null" not in text:  # what orjson makes of a number that is not finite
        return text
    return json.dumps(to_python(array), separators=(",", ":")).encode()


def to_python(value: np.ndarray | np.generic) -> object:
    """Return numbers as Python's, with no more digits than their own dtype needs."""
    if value.dtype == np.float32:
        value = np.asarray(value).astype(np.str_).astype(np.float64)  # by way of its own fewest digits
    return value.tolist()
