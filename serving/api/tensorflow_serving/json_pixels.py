"""Fast path for JSON pixels: `{"instances": [[[[0, 255, ...` for a uint8 input.

Strip digits and whitespace. If the remaining brackets and commas are those of a tensor of the expected shape, parse the
numbers with simdjson. Otherwise (ragged lists, signs, fractions, other keys) fall back to the general parser, which has
the error messages.
"""

from __future__ import annotations

import math
import re
import threading
from functools import lru_cache
from typing import cast

import numpy as np
import simdjson

from serving.inference.signatures import DEFAULT_SIGNATURE, Signature, TensorSpec

_HEAD = re.compile(rb'[ \t\r\n]*\{[ \t\r\n]*"(instances|inputs)"[ \t\r\n]*:[ \t\r\n]*(?=\[)')
_TAIL = re.compile(rb"[ \t\r\n]*\}[ \t\r\n]*")
_DIGITS_AND_SPACE = b"0123456789 \t\r\n"
_MAX_ROWS = 64  # `_nesting` caches the text for each number of rows


class _Local(threading.local):
    """One parser per thread; a parser reuses its buffers."""

    def __init__(self) -> None:
        self.parser = simdjson.Parser()


_local = _Local()


def find_pixel_input(signature: Signature | None) -> TensorSpec | None:
    """Return the only input of the default signature if it is a batch of uint8 tensors of known shape, else None."""
    if signature is None or signature.name != DEFAULT_SIGNATURE or len(signature.inputs) != 1:
        return None
    (spec,) = signature.inputs.values()
    known = spec.is_batched and spec.shape is not None and None not in spec.shape[1:] and 0 not in spec.shape
    return spec if known and spec.dtype == "DT_UINT8" else None


def read_pixels(body: bytes, spec: TensorSpec) -> tuple[np.ndarray, bool] | None:
    """Parse a request that holds only pixels of the expected shape, for an input from `find_pixel_input`.

    Returns:
        The uint8 array, and whether its key was `instances`; None for any other request, valid or not.
    """
    head = _HEAD.match(body)
    end = body.rfind(b"]") + 1
    if not head or not _TAIL.fullmatch(body, end):
        return None
    tensor = body[head.end() : end]
    assert spec.shape is not None
    shape = tuple(size or 0 for size in spec.shape[1:])
    nesting = tensor.translate(None, _DIGITS_AND_SPACE)
    rows, rest = divmod(len(nesting) - 1, len(_nesting(shape)) + 1)
    if rest or not 0 < rows <= _MAX_ROWS or nesting != _nesting((rows, *shape)):
        return None
    try:
        array = cast(simdjson.Array, _local.parser.parse(tensor))
        numbers = np.frombuffer(array.as_buffer(of_type="u"), np.uint64)
    except ValueError:  # "1 2", "007", 2**64
        return None
    if len(numbers) != rows * math.prod(shape) or np.maximum.reduce(numbers) > 255:
        return None
    return numbers.astype(np.uint8).reshape(rows, *shape), head[1] == b"instances"


@lru_cache(maxsize=256)
def _nesting(shape: tuple[int, ...]) -> bytes:
    """Return the brackets and commas of a tensor in JSON: `[[,],[,]]` for (2, 2)."""
    inner = _nesting(shape[1:]) if len(shape) > 1 else b""
    return b"[%b]" % b",".join([inner] * shape[0])
