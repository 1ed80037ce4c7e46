"""Datatypes of the Open Inference Protocol, and their binary data, which both forms of the protocol share.

Follows Triton's "Binary Tensor Data Extension": little-endian, row-major, without padding; each BYTES element is
preceded by its length as a 32-bit integer. This module knows nothing of requests.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from serving.errors import InvalidRequest
from serving.inference.signatures import NUMPY_DTYPES, TensorSpec

MAX_DIMENSIONS = 64  # numpy's limit
_LENGTH = struct.Struct("<I")


@dataclass(frozen=True)
class Datatype:
    """The protocol's name for a dtype, and the representation of its elements in JSON and as bytes."""

    name: str  # "FP32"
    dtype: np.dtype[Any]  # little-endian; object for BYTES
    json_types: frozenset[type]  # of an element parsed by orjson; none for FP16, like in Triton
    json_description: str  # of json_types, for error messages


WHOLE = frozenset((int,))
_WHOLE_NUMBERS = WHOLE, "whole numbers"
_NUMBER = frozenset((int, float)), "numbers"
DATATYPES: Mapping[str, Datatype] = {
    tensorflow_name: Datatype(name, NUMPY_DTYPES[tensorflow_name].newbyteorder("<"), *in_json)
    for tensorflow_name, name, in_json in (
        ("DT_BOOL", "BOOL", (frozenset((bool,)), "true and false")),
        ("DT_UINT8", "UINT8", _WHOLE_NUMBERS),
        ("DT_UINT16", "UINT16", _WHOLE_NUMBERS),
        ("DT_UINT32", "UINT32", _WHOLE_NUMBERS),
        ("DT_UINT64", "UINT64", _WHOLE_NUMBERS),
        ("DT_INT8", "INT8", _WHOLE_NUMBERS),
        ("DT_INT16", "INT16", _WHOLE_NUMBERS),
        ("DT_INT32", "INT32", _WHOLE_NUMBERS),
        ("DT_INT64", "INT64", _WHOLE_NUMBERS),
        ("DT_HALF", "FP16", (frozenset[type](), "nothing")),
        ("DT_FLOAT", "FP32", _NUMBER),
        ("DT_DOUBLE", "FP64", _NUMBER),
        ("DT_STRING", "BYTES", (frozenset((str,)), "strings")),
    )
}


def datatype_of(spec: TensorSpec) -> Datatype:
    """Return the datatype of an input or output; raises InvalidRequest if the protocol has none: complex numbers."""
    datatype = DATATYPES.get(spec.dtype)
    if datatype is None:
        raise InvalidRequest(f"tensor {spec.name}: {spec.dtype} has no datatype in this protocol")
    return datatype


def decode_binary(data: memoryview, spec: TensorSpec, shape: tuple[int, ...]) -> np.ndarray:
    """Convert binary data to an array: a read-only view of the data, except for BYTES, whose elements are copied.

    Raises:
        InvalidRequest: the length does not fit the shape, or a BOOL is neither 0 nor 1.
    """
    datatype = datatype_of(spec)
    count = math.prod(shape)
    if datatype.dtype.hasobject:
        return reshape(_split_strings(data, count, spec), spec, shape)
    needed = count * datatype.dtype.itemsize
    if len(data) != needed:
        raise refusal(spec, f"{datatype.name} of the shape {list(shape)} needs {needed} bytes, got {len(data)}")
    flat = np.frombuffer(data, datatype.dtype)
    if datatype.dtype == np.bool_ and (largest := flat.view(np.uint8).max(initial=0)) > 1:
        raise refusal(spec, f"a byte of BOOL is 0 or 1, not {largest}")
    return reshape(flat, spec, shape)


def encode_binary(array: np.ndarray, datatype: Datatype) -> tuple[Any, int]:
    """Return an output's binary data as an object that `bytes.join` accepts without another copy, and its size."""
    if array.dtype.hasobject:
        elements = array.ravel().tolist()
        joined = b"".join(chain.from_iterable((_LENGTH.pack(len(element)), element) for element in elements))
        return joined, len(joined)
    flat = np.ascontiguousarray(array.ravel(), datatype.dtype)
    return flat, flat.nbytes


def check_range(array: np.ndarray, spec: TensorSpec) -> None:
    """Raise InvalidRequest if an array of wider integers has an element beyond the input's datatype."""
    datatype = datatype_of(spec)
    limits = np.iinfo(datatype.dtype)
    if array.size and (array.min() < limits.min or array.max() > limits.max):
        odd = next(element for element in array.ravel().tolist() if not limits.min <= element <= limits.max)
        raise out_of_range(odd, spec)


def out_of_range(element: int, spec: TensorSpec) -> InvalidRequest:
    """Return the error for an integer beyond the input's datatype."""
    datatype = datatype_of(spec)
    limits = np.iinfo(datatype.dtype)
    shown = element if abs(element) <= 2**64 else float(element)  # an int may have 300 digits
    return refusal(spec, f"{datatype.name} is from {limits.min} to {limits.max}, not {shown}")


def reshape(flat: np.ndarray, spec: TensorSpec, shape: tuple[int, ...]) -> np.ndarray:
    """Give an array with the right number of elements its shape."""
    try:
        return flat.reshape(shape)
    except ValueError as error:  # no elements, but the other sizes overflow
        raise refusal(spec, f"no tensor can have the shape {list(shape)}") from error


def refusal(spec: TensorSpec, why: str) -> InvalidRequest:
    """Return the error for the data of an input."""
    return InvalidRequest(f"input {spec.name}: {why}")


def _split_strings(data: memoryview, count: int, spec: TensorSpec) -> np.ndarray:
    """Split binary data into exactly `count` elements of BYTES."""
    if count > len(data) // _LENGTH.size:
        raise refusal(spec, f"{len(data)} bytes cannot hold {count} elements with their lengths")
    elements = []
    start = 0
    for index in range(count):
        start += _LENGTH.size
        if start > len(data):
            raise refusal(spec, f"the bytes end before element {index}")
        (length,) = _LENGTH.unpack_from(data, start - _LENGTH.size)
        if length > len(data) - start:
            raise refusal(spec, f"element {index} has a length of {length} bytes, but {len(data) - start} are left")
        elements.append(bytes(data[start : start + length]))
        start += length
    if start != len(data):
        raise refusal(spec, f"{len(data) - start} bytes are left after {count} elements")
    return np.array(elements, object)
