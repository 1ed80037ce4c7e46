"""Arrays from and to JSON; large ones are written in slices that let other requests run in between.

orjson holds the GIL while it writes and while it copies a Fragment: a second for ten million numbers. So a document is
written with placeholders for its large arrays, and the slices of these are joined with it. `bytes.join` copies without
the GIL.
"""

from __future__ import annotations

import json
from itertools import chain
from typing import Any

import numpy as np
import orjson

SLICE_ELEMENTS = 64 * 1024  # written within a few milliseconds
MARK = "\0"  # never in JSON text, where it is escaped
PLACEHOLDER = orjson.Fragment(MARK)


def flatten(value: Any) -> tuple[list[Any], tuple[int, ...], set[type]] | None:
    """Flatten nested lists level by level, at the speed of C functions; lists mixed with elements count as elements.

    Returns:
        The elements, their shape and their types; None if the lists of a level differ in length.

    Example:
        >>> flatten([[1, 2.5], [3, 4]])
        ([1, 2.5, 3, 4], (2, 2), {<class 'int'>, <class 'float'>})
    """
    shape: list[int] = []
    elements = [value]
    while (types := set(map(type, elements))) == {list}:
        lengths = set(map(len, elements))
        if len(lengths) > 1:
            return None
        shape.append(lengths.pop())
        elements = list(chain.from_iterable(elements))
    return elements, tuple(shape), types


def set_aside(value: Any, large: list[np.ndarray]) -> Any:
    """Return a value of a document; if it is a large array, add it to `large` and return PLACEHOLDER."""
    if not (isinstance(value, np.ndarray) and _is_large(value)):
        return value
    large.append(value)
    return PLACEHOLDER


def insert_arrays(text: bytes, large: list[np.ndarray]) -> bytes:
    """Replace the placeholders in an encoded document with the arrays that were set aside, in the same order."""
    if not large:
        return text
    first, *others = text.split(MARK.encode())
    pieces = [first]
    for array, after in zip(large, others, strict=True):
        pieces += dump_array(array)
        pieces.append(after)
    return b"".join(pieces)


def dump_array(array: np.ndarray) -> list[bytes]:
    """Encode an array of numbers as nested lists, in slices; numbers that are not finite as `NaN` and `Infinity`."""
    if not _is_large(array):
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


def to_python(value: np.ndarray | np.generic) -> object:
    """Return numbers as Python's, with no more digits than their own dtype needs."""
    if value.dtype == np.float32:
        value = np.asarray(value).astype(np.str_).astype(np.float64)  # by way of the shortest decimal form
    return value.tolist()


def _is_large(array: np.ndarray) -> bool:
    return array.ndim > 0 and array.size > SLICE_ELEMENTS


def _dump_slice(array: np.ndarray) -> bytes:
    text: bytes = orjson.dumps(np.ascontiguousarray(array), option=orjson.OPT_SERIALIZE_NUMPY)
    if b"null" not in text:  # orjson's spelling of NaN and infinities
        return text
    return json.dumps(to_python(array), separators=(",", ":")).encode()
