"""Converts tensors of the Open Inference Protocol to arrays and back, as JSON or as binary data.

Follows the protocol's "Tensor Data" and Triton's "Binary Tensor Data Extension": little-endian, row-major, without
padding; each BYTES element is preceded by its length as a 32-bit integer. This module knows nothing of requests.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from serving.api.json_arrays import flatten
from serving.errors import InvalidRequest
from serving.inference.signatures import NUMPY_DTYPES, TensorSpec
from serving.quoting import quote

MAX_DIMENSIONS = 64  # numpy's limit
_LENGTH = struct.Struct("<I")


@dataclass(frozen=True)
class Datatype:
    """The protocol's name for a dtype, and the representation of its elements in JSON and as bytes."""

    name: str  # "FP32"
    dtype: np.dtype[Any]  # little-endian; object for BYTES
    json_types: frozenset[type]  # of an element parsed by orjson; none for FP16, like in Triton
    json_description: str  # of json_types, for error messages


_WHOLE = frozenset((int,)), "whole numbers"
_NUMBER = frozenset((int, float)), "numbers"
DATATYPES: Mapping[str, Datatype] = {
    tensorflow_name: Datatype(name, NUMPY_DTYPES[tensorflow_name].newbyteorder("<"), *in_json)
    for tensorflow_name, name, in_json in (
        ("DT_BOOL", "BOOL", (frozenset((bool,)), "true and false")),
        ("DT_UINT8", "UINT8", _WHOLE),
        ("DT_UINT16", "UINT16", _WHOLE),
        ("DT_UINT32", "UINT32", _WHOLE),
        ("DT_UINT64", "UINT64", _WHOLE),
        ("DT_INT8", "INT8", _WHOLE),
        ("DT_INT16", "INT16", _WHOLE),
        ("DT_INT32", "INT32", _WHOLE),
        ("DT_INT64", "INT64", _WHOLE),
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


def decode_json(data: Any, spec: TensorSpec, shape: tuple[int, ...]) -> np.ndarray:
    """Convert JSON data, a flat list or one nested like the shape, to an array of the input's dtype.

    A float without a fraction (106.0) is accepted as an integer, because some clients send all numbers as floats.

    Raises:
        InvalidRequest: the data is not such a list, does not fit the shape, or has an element of the wrong type or out
            of range. Nothing is rounded, wrapped or turned into infinity.
    """
    datatype = datatype_of(spec)
    if not datatype.json_types:
        raise _refusal(spec, f"{datatype.name} cannot be sent as JSON; send it as binary data")
    if type(data) is not list:
        raise _refusal(spec, f"data must be a list, not {quote(data)}")
    flat = flatten(data)
    if flat is None:
        raise _refusal(spec, "lists at one level of data differ in length")
    elements, sizes, types = flat
    if float in types and datatype.json_types == _WHOLE[0]:
        elements = [int(n) if type(n) is float and n.is_integer() else n for n in elements]
        types = set(map(type, elements))
    if not types <= datatype.json_types:
        odd = next(element for element in elements if type(element) not in datatype.json_types)
        raise _refusal(spec, f"{datatype.name} takes {datatype.json_description}, not {quote(odd)}")
    if sizes != shape and sizes != (math.prod(shape),):
        raise _refusal(
            spec,
            f"the shape {list(shape)} takes {math.prod(shape)} elements, flat or nested like it; "
            f"data has {len(elements)}, nested like {list(sizes[:MAX_DIMENSIONS])}",
        )
    return _reshape(_array_of(elements, datatype, spec), spec, shape)


def decode_binary(data: memoryview, spec: TensorSpec, shape: tuple[int, ...]) -> np.ndarray:
    """Convert binary data to an array: a read-only view of the data, except for BYTES, whose elements are copied.

    Raises:
        InvalidRequest: the length does not fit the shape, or a BOOL is neither 0 nor 1.
    """
    datatype = datatype_of(spec)
    count = math.prod(shape)
    if datatype.dtype.hasobject:
        return _reshape(_split_strings(data, count, spec), spec, shape)
    needed = count * datatype.dtype.itemsize
    if len(data) != needed:
        raise _refusal(spec, f"{datatype.name} of the shape {list(shape)} needs {needed} bytes, got {len(data)}")
    flat = np.frombuffer(data, datatype.dtype)
    if datatype.dtype == np.bool_ and (largest := flat.view(np.uint8).max(initial=0)) > 1:
        raise _refusal(spec, f"a byte of BOOL is 0 or 1, not {largest}")
    return _reshape(flat, spec, shape)


def encode_json(array: np.ndarray, spec: TensorSpec) -> Any:
    """Return an output's elements as a flat list or one-dimensional array; raises InvalidRequest if JSON cannot."""
    flat, odd = array.ravel(), "NaN or infinity"
    if array.dtype.hasobject:
        try:
            return [element.decode() for element in flat]
        except UnicodeDecodeError:
            odd = "bytes that are not UTF-8"
    elif array.dtype.kind != "f" or np.isfinite(flat).all():
        return flat
    raise InvalidRequest(f"output {spec.name} has {odd}, which JSON cannot hold; request it as binary data")


def encode_binary(array: np.ndarray, spec: TensorSpec) -> tuple[Any, int]:
    """Return an output's binary data as an object that `bytes.join` accepts without another copy, and its size."""
    if array.dtype.hasobject:
        elements = array.ravel().tolist()
        joined = b"".join(chain.from_iterable((_LENGTH.pack(len(element)), element) for element in elements))
        return joined, len(joined)
    flat = np.ascontiguousarray(array.ravel(), datatype_of(spec).dtype)
    return flat, flat.nbytes


def _array_of(elements: list[Any], datatype: Datatype, spec: TensorSpec) -> np.ndarray:
    if datatype.name == "BYTES":
        return np.array([element.encode() for element in elements], object)
    try:
        if datatype.name == "UINT8":
            return np.frombuffer(bytes(elements), np.uint8)  # pixels; several times faster than np.array of a list
        with np.errstate(over="ignore"):
            array = np.array(elements, datatype.dtype)
    except (OverflowError, ValueError) as error:
        limits = np.iinfo(datatype.dtype)
        odd = next(element for element in elements if not limits.min <= element <= limits.max)
        odd = odd if abs(odd) <= 2**64 else float(odd)  # an int may have 300 digits
        raise _refusal(spec, f"{datatype.name} is from {limits.min} to {limits.max}, not {odd}") from error
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        odd = elements[int(np.argmin(np.isfinite(array)))]
        raise _refusal(spec, f"{odd} is beyond the range of {datatype.name}")
    return array


def _split_strings(data: memoryview, count: int, spec: TensorSpec) -> np.ndarray:
    """Split binary data into exactly `count` elements of BYTES."""
    if count > len(data) // _LENGTH.size:
        raise _refusal(spec, f"{len(data)} bytes cannot hold {count} elements with their lengths")
    elements = []
    start = 0
    for index in range(count):
        start += _LENGTH.size
        if start > len(data):
            raise _refusal(spec, f"the bytes end before element {index}")
        (length,) = _LENGTH.unpack_from(data, start - _LENGTH.size)
        if length > len(data) - start:
            raise _refusal(spec, f"element {index} has a length of {length} bytes, but {len(data) - start} are left")
        elements.append(bytes(data[start : start + length]))
        start += length
    if start != len(data):
        raise _refusal(spec, f"{len(data) - start} bytes are left after {count} elements")
    return np.array(elements, object)


def _reshape(flat: np.ndarray, spec: TensorSpec, shape: tuple[int, ...]) -> np.ndarray:
    try:
        return flat.reshape(shape)
    except ValueError as error:  # no elements, but the other sizes overflow
        raise _refusal(spec, f"no tensor can have the shape {list(shape)}") from error


def _refusal(spec: TensorSpec, why: str) -> InvalidRequest:
    return InvalidRequest(f"input {spec.name}: {why}")
