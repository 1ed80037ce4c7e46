"""Tensors of the Open Inference Protocol to arrays and back: as JSON, and as the bytes behind it.

After the protocol's "Tensor Data" and the "Binary Tensor Data Extension" that Triton added: little-endian, row-major,
without padding; an element of BYTES behind its length as a 32-bit number. Knows nothing of requests.
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
from serving.quoting import quote

MAX_DIMENSIONS = 64  # numpy's
_LENGTH = struct.Struct("<I")


@dataclass(frozen=True)
class Datatype:
    """What the protocol calls a dtype, and how its elements look in JSON and as bytes."""

    name: str  # "FP32"
    dtype: np.dtype[Any]  # little-endian; object for BYTES
    json_types: frozenset[type]  # what orjson makes of an element; none for FP16, as in Triton
    json_words: str  # the same for people


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
        InvalidRequest: the protocol has none for it, complex numbers for example.
    """
    datatype = _DATATYPES.get(spec.dtype)
    if datatype is None:
        raise InvalidRequest(f"tensor {spec.name}: {spec.dtype} has no datatype in this protocol")
    return datatype


def decode_json(data: Any, spec: TensorSpec, shape: tuple[int, ...]) -> np.ndarray:
    """Make an array of exactly an input's dtype from the list that JSON holds, flat or nested like the shape.

    Args:
        data: as orjson parsed it.
        spec: the input.
        shape: what the request says; at most MAX_DIMENSIONS sizes.

    Raises:
        InvalidRequest: it is not such a list, there are more or fewer elements than the shape has, or one is of another
            type or out of range: nothing is rounded to whole numbers, wrapped or made infinite. A float that is whole
            (106.0) is a whole number: some clients have no other numbers.
    """
    datatype = datatype_of(spec)
    if not datatype.json_types:
        raise InvalidRequest(f"input {spec.name}: {datatype.name} cannot be sent as JSON; send it as binary data")
    if type(data) is not list:
        raise InvalidRequest(f"input {spec.name}: data must be a list, not {quote(data)}")
    elements, sizes = _flatten(data, spec)
    types = set(map(type, elements))
    if float in types and datatype.json_types == _WHOLE[0]:
        elements = list(map(_to_whole, elements))
        types = set(map(type, elements))
    if not types <= datatype.json_types:
        odd = next(element for element in elements if type(element) not in datatype.json_types)
        raise InvalidRequest(f"input {spec.name}: {datatype.name} takes {datatype.json_words}, not {quote(odd)}")
    if sizes != shape and sizes != (math.prod(shape),):
        raise InvalidRequest(
            f"input {spec.name}: the shape {list(shape)} takes {math.prod(shape)} elements, flat or nested like it; "
            f"data has {len(elements)}, nested like {list(sizes[:MAX_DIMENSIONS])}"
        )
    return _reshape(_array_of(elements, datatype, spec), spec, shape)


def decode_binary(data: memoryview, spec: TensorSpec, shape: tuple[int, ...]) -> np.ndarray:
    """Make an array of an input's raw bytes: a read-only view of them, except for BYTES, whose elements are copied.

    Raises:
        InvalidRequest: the bytes are more or fewer than the shape needs, or a BOOL is neither 0 nor 1.
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
    """Return an output's elements as a flat list, or as an array of one dimension that orjson writes.

    Raises:
        InvalidRequest: JSON has no way to say what it holds: NaN, an infinity, or bytes that are not UTF-8.
    """
    flat = array.ravel()
    if array.dtype.hasobject:
        try:
            return [element.decode() for element in flat]
        except UnicodeDecodeError as error:
            raise InvalidRequest(
                f"output {spec.name} holds bytes that are not UTF-8, which JSON cannot carry; ask for it as binary data"
            ) from error
    if array.dtype.kind == "f" and not np.isfinite(flat).all():
        raise InvalidRequest(
            f"output {spec.name} holds NaN or infinity, which JSON cannot carry; ask for it as binary data"
        )
    return flat


def encode_binary(array: np.ndarray, spec: TensorSpec) -> tuple[Any, int]:
    """Return an output's raw bytes, as something that `bytes.join` takes without a copy before, and their number."""
    if array.dtype.hasobject:
        elements = array.ravel().tolist()
        joined = b"".join(chain.from_iterable((_LENGTH.pack(len(element)), element) for element in elements))
        return joined, len(joined)
    flat = np.ascontiguousarray(array.ravel(), datatype_of(spec).dtype)
    return flat, flat.nbytes


def _flatten(data: list[Any], spec: TensorSpec) -> tuple[list[Any], tuple[int, ...]]:
    """Return the elements of nested lists and the sizes of the lists; level by level, at the speed of C."""
    sizes = [len(data)]
    while data and type(data[0]) is list and set(map(type, data)) == {list}:
        lengths = set(map(len, data))
        if len(lengths) > 1:
            raise InvalidRequest(f"input {spec.name}: lists at one level of data differ in length")
        sizes.append(lengths.pop())
        data = list(chain.from_iterable(data))
    return data, tuple(sizes)


def _to_whole(element: Any) -> Any:
    return int(element) if type(element) is float and element.is_integer() else element


def _array_of(elements: list[Any], datatype: Datatype, spec: TensorSpec) -> np.ndarray:
    if datatype.name == "BYTES":
        array = np.empty(len(elements), datatype.dtype)
        array[:] = [element.encode() for element in elements]
        return array
    try:
        if datatype.name == "UINT8":
            return np.frombuffer(bytes(elements), np.uint8)  # pixels; several times faster than from a list
        with np.errstate(over="ignore"):
            array = np.array(elements, datatype.dtype)
    except (OverflowError, ValueError) as error:
        limits = np.iinfo(datatype.dtype)
        odd = next(element for element in elements if not limits.min <= element <= limits.max)
        odd = odd if abs(odd) <= 2**64 else float(odd)  # of which there may be 300 digits
        raise InvalidRequest(
            f"input {spec.name}: {datatype.name} is from {limits.min} to {limits.max}, not {odd}"
        ) from error
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        odd = elements[int(np.argmin(np.isfinite(array)))]
        raise InvalidRequest(f"input {spec.name}: {odd} is beyond the range of {datatype.name}")
    return array


def _split_strings(data: memoryview, count: int, spec: TensorSpec) -> np.ndarray:
    """Split elements of BYTES; there have to be `count` of them and nothing behind them."""
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
                f"input {spec.name}: element {index} says it has {length} bytes, but {len(data) - start} are left"
            )
        elements.append(bytes(data[start : start + length]))
        start += length
    if start != len(data):
        raise InvalidRequest(f"input {spec.name}: {len(data) - start} bytes are left behind {count} elements")
    array = np.empty(count, object)
    array[:] = elements
    return array


def _reshape(flat: np.ndarray, spec: TensorSpec, shape: tuple[int, ...]) -> np.ndarray:
    try:
        return flat.reshape(shape)
    except ValueError as error:  # no elements, and the other sizes are beyond what can be addressed
        raise InvalidRequest(f"input {spec.name}: no tensor can have the shape {list(shape)}") from error
