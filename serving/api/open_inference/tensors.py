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
_DATATYPES: Mapping[str, Datatype] = {
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
    """Return the datatype of an input or output.

    Raises:
        InvalidRequest: the protocol has no such datatype, for example for complex numbers.
    """
    datatype = _DATATYPES.get(spec.dtype)
    if datatype is None:
        raise InvalidRequest(f"tensor {spec.name}: {spec.dtype} has no datatype in this protocol")
    return datatype


def decode_json(data: Any, spec: TensorSpec, shape: tuple[int, ...]) -> np.ndarray:
    """Convert JSON data, a flat list or one nested like the shape, to an array of the input's dtype.

    A float without a fraction (106.0) is accepted as an integer, because some clients send all numbers as floats.

    Args:
        data: the data, parsed by orjson.
        spec: the input.
        shape: the shape in the request; at most MAX_DIMENSIONS sizes.

    Raises:
        InvalidRequest: the data is not such a list, does not fit the shape, or has an element of the wrong type or out
            of range. Nothing is rounded, wrapped or turned into infinity.
    """
    datatype = datatype_of(spec)
    if not datatype.json_types:
        raise InvalidRequest(f"input {spec.name}: {datatype.name} cannot be sent as JSON; send it as binary data")
    if type(data) is not list:
        raise InvalidRequest(f"input {spec.name}: data must be a list, not {quote(data)}")
    flat = flatten(data)
    if flat is None:
        raise InvalidRequest(f"input {spec.name}: lists at one level of data differ in length")
    elements, sizes, types = flat
    if float in types and datatype.json_types == _WHOLE[0]:
        elements = list(map(_to_whole, elements))
        types = set(map(type, elements))
    if not types <= datatype.json_types:
        odd = next(element for element in elements if type(element) not in datatype.json_types)
        raise InvalidRequest(f"input {spec.name}: {datatype.name} takes {datatype.json_description}, not {quote(odd)}")
    if sizes != shape and sizes != (math.prod(shape),):
        raise InvalidRequest(
            f"input {spec.name}: the shape {list(shape)} takes {math.prod(shape)} elements, flat or nested like it; "
            f"data has {len(elements)}, nested like {list(sizes[:MAX_DIMENSIONS])}"
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
        raise InvalidRequest(
            f"input {spec.name}: {datatype.name} of the shape {list(shape)} needs {needed} bytes, got {len(data)}"
        )
    if datatype.dtype != np.bool_:
        return _reshape(np.frombuffer(data, datatype.dtype), spec, shape)
    raw = np.frombuffer(data, np.uint8)
    if raw.max(initial=0) > 1:
        raise InvalidRequest(f"input {spec.name}: a byte of BOOL is 0 or 1, not {raw.max()}")
    return _reshape(raw.view(np.bool_), spec, shape)


def encode_json(array: np.ndarray, spec: TensorSpec) -> Any:
    """Return an output's elements as a flat list, or as a one-dimensional array for orjson.

    Raises:
        InvalidRequest: JSON cannot represent an element: NaN, an infinity, or bytes that are not UTF-8.
    """
    flat = array.ravel()
    if array.dtype.hasobject:
        try:
            return [element.decode() for element in flat]
        except UnicodeDecodeError as error:
            raise InvalidRequest(
                f"output {spec.name} has bytes that are not UTF-8, which JSON cannot hold; request it as binary data"
            ) from error
    if array.dtype.kind == "f" and not np.isfinite(flat).all():
        raise InvalidRequest(
            f"output {spec.name} has NaN or infinity, which JSON cannot hold; request it as binary data"
        )
    return flat


def encode_binary(array: np.ndarray, spec: TensorSpec) -> tuple[Any, int]:
    """Return an output's binary data as an object that `bytes.join` accepts without another copy, and its size."""
    if array.dtype.hasobject:
        elements = array.ravel().tolist()
        joined = b"".join(chain.from_iterable((_LENGTH.pack(len(element)), element) for element in elements))
        return joined, len(joined)
    flat = np.ascontiguousarray(array.ravel(), datatype_of(spec).dtype)
    return flat, flat.nbytes


def _to_whole(element: Any) -> Any:
    return int(element) if type(element) is float and element.is_integer() else element


def _array_of(elements: list[Any], datatype: Datatype, spec: TensorSpec) -> np.ndarray:
    if datatype.name == "BYTES":
        array = np.empty(len(elements), datatype.dtype)
        array[:] = [element.encode() for element in elements]
        return array
    try:
        if datatype.name == "UINT8":
            return np.frombuffer(bytes(elements), np.uint8)  # pixels; several times faster than np.array of a list
        with np.errstate(over="ignore"):
            array = np.array(elements, datatype.dtype)
    except (OverflowError, ValueError) as error:
        limits = np.iinfo(datatype.dtype)
        odd = next(element for element in elements if not limits.min <= element <= limits.max)
        odd = odd if abs(odd) <= 2**64 else float(odd)  # an int may have 300 digits
        raise InvalidRequest(
            f"input {spec.name}: {datatype.name} is from {limits.min} to {limits.max}, not {odd}"
        ) from error
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        odd = elements[int(np.argmin(np.isfinite(array)))]
        raise InvalidRequest(f"input {spec.name}: {odd} is beyond the range of {datatype.name}")
    return array


def _split_strings(data: memoryview, count: int, spec: TensorSpec) -> np.ndarray:
    """Split binary data into exactly `count` elements of BYTES."""
    if count > len(data) // _LENGTH.size:
        raise InvalidRequest(f"input {spec.name}: {len(data)} bytes cannot hold {count} elements with their lengths")
    elements = []
    start = 0
    for index in range(count):
        start += _LENGTH.size
        if start > len(data):
            raise InvalidRequest(f"input {spec.name}: the bytes end before element {index}")
        (length,) = _LENGTH.unpack_from(data, start - _LENGTH.size)
        if length > len(data) - start:
            raise InvalidRequest(
                f"input {spec.name}: element {index} has a length of {length} bytes, but {len(data) - start} are left"
            )
        elements.append(bytes(data[start : start + length]))
        start += length
    if start != len(data):
        raise InvalidRequest(f"input {spec.name}: {len(data) - start} bytes are left after {count} elements")
    array = np.empty(count, object)
    array[:] = elements
    return array


def _reshape(flat: np.ndarray, spec: TensorSpec, shape: tuple[int, ...]) -> np.ndarray:
    try:
        return flat.reshape(shape)
    except ValueError as error:  # no elements, but the other sizes overflow
        raise InvalidRequest(f"input {spec.name}: no tensor can have the shape {list(shape)}") from error
