"""The common case of JSON pixels, straight to an array: `{"instances": [[[[0, 255, ...` for a uint8 input.

What is left of the text without its digits is its nesting, and is compared as a whole with that of a tensor of the
right shape. So ragged and wrongly nested lists, signs, fractions and everything else are told apart exactly, and left
to the parser that knows what to say of them.
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
_MAX_ROWS = 64  # a nesting is kept for each number of rows


class _Local(threading.local):
    """A parser for each thread: it keeps its memory from one text to the next."""

    def __init__(self) -> None:
        self.parser = simdjson.Parser()


_local = _Local()


def find_pixel_input(signature: Signature | None) -> TensorSpec | None:
    """Return the one input of the default signature if it is a batch of uint8 tensors of known size, else None."""
    if signature is None or signature.name != DEFAULT_SIGNATURE or len(signature.inputs) != 1:
        return None
    (spec,) = signature.inputs.values()
    known = spec.is_batched and spec.shape is not None and None not in spec.shape[1:] and 0 not in spec.shape
    return spec if known and spec.dtype == "DT_UINT8" else None


def read_pixels(body: bytes, spec: TensorSpec) -> tuple[np.ndarray, bool] | None:
    """Read a request that holds nothing but pixels of the right shape.

    Args:
        body: the request's.
        spec: the input, as `find_pixel_input` gives it.

    Returns:
        The array, uint8 of the input's shape, and whether it came as `instances`; None where the request holds anything
        else, be it right or wrong.
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
    """Return the brackets and commas of a tensor written as JSON: `[[,],[,]]` for (2, 2)."""
    inner = _nesting(shape[1:]) if len(shape) > 1 else b""
    return b"[%b]" % b",".join([inner] * shape[0])
