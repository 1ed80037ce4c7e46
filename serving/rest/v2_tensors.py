"""Tensors of the Open Inference Protocol to arrays and back: as JSON, and as raw bytes behind it.

After the protocol's "Tensor Data" and Triton's "Binary tensor data" extension: little-endian, row-major; of BYTES
each element behind its length as a 32-bit number.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np

from serving.errors import InvalidRequest
from serving.predictor import TensorSpec

_DATATYPES: Mapping[str, str] = {
    "DT_BOOL": "BOOL",
    "DT_UINT8": "UINT8",
    "DT_UINT16": "UINT16",
    "DT_UINT32": "UINT32",
    "DT_UINT64": "UINT64",
    "DT_INT8": "INT8",
    "DT_INT16": "INT16",
    "DT_INT32": "INT32",
    "DT_INT64": "INT64",
    "DT_HALF": "FP16",
    "DT_FLOAT": "FP32",
    "DT_DOUBLE": "FP64",
    "DT_STRING": "BYTES",
}
_MAX_DIMENSION = 2**31


def datatype_of(spec: TensorSpec) -> str:
    """Return the protocol's name of a tensor's dtype.

    Raises:
        InvalidRequest: the protocol has none for it.
    """
    datatype = _DATATYPES.get(spec.dtype)
    if datatype is None:
        raise InvalidRequest(f"tensor {spec.name}: {spec.dtype} has no datatype in this protocol")
    return datatype


def read_shape(name: str, tensor: Mapping[str, Any], spec: TensorSpec) -> tuple[int, ...]:
    """Read and check a request tensor's `datatype` and `shape`.

    Raises:
        InvalidRequest: one is missing, malformed, or not the signature's.
    """
    if tensor.get("datatype") != datatype_of(spec):
        raise InvalidRequest(f"input {name}: expected the datatype {datatype_of(spec)}, got {tensor.get('datatype')!r}")
    shape = tensor.get("shape")
    if not isinstance(shape, list) or not all(type(size) is int and 0 <= size < _MAX_DIMENSION for size in shape):
        raise InvalidRequest(f"input {name}: expected the shape as a list of whole numbers, got {str(shape)[:80]}")
    return tuple(shape)


def read_json_data(name: str, data: Any, spec: TensorSpec, shape: tuple[int, ...]) -> np.ndarray:
    """Turn `data`, a list that is flat or nested like the shape, into an array of exactly the signature's dtype.

    Raises:
        InvalidRequest: it has other elements, or another number of them.
    """
    if not isinstance(data, list):
        raise InvalidRequest(f"input {name}: expected the data as a list, got {type(data).__name__}")
    array = _read_strings(name, data) if spec.dtype == "DT_STRING" else _read_numbers(name, data, spec)
    if array.shape not in (shape, (math.prod(shape),)):
        raise InvalidRequest(
            f"input {name}: the shape {list(shape)} needs {math.prod(shape)} elements, flat or nested like it; "
            f"the data is of shape {list(array.shape)}"
        )
    return array.reshape(shape)


def read_binary_data(name: str, data: memoryview, spec: TensorSpec, shape: tuple[int, ...]) -> np.ndarray:
    """Turn raw bytes into an array, a view of them but for BYTES and BOOL.

    Raises:
        InvalidRequest: the bytes are not as many as the shape needs.
    """
    count = math.prod(shape)
    if spec.dtype == "DT_STRING":
        return _split_strings(name, data, count).reshape(shape)
    dtype = spec.numpy_dtype
    assert dtype is not None
    if len(data) != count * dtype.itemsize:
        raise InvalidRequest(
            f"input {name}: {datatype_of(spec)} {list(shape)} needs {count * dtype.itemsize} bytes, got {len(data)}"
        )
    if dtype == np.bool_:
        raw = np.frombuffer(data, np.uint8)
        if len(raw) and raw.max() > 1:
            raise InvalidRequest(f"input {name}: a BOOL is 0 or 1, got {raw.max()}")
        return raw.astype(np.bool_).reshape(shape)
    return np.frombuffer(data, dtype.newbyteorder("<")).astype(dtype, copy=False).reshape(shape)


def write_json_data(array: np.ndarray, spec: TensorSpec) -> Any:
    """Return an output's elements, flat, for JSON. NaN and infinities become null there: it has no word for them.

    Raises:
        InvalidRequest: a string is not UTF-8.
    """
    if spec.dtype == "DT_STRING":
        try:
            return [element.decode() for element in array.ravel()]
        except UnicodeDecodeError as error:
            raise InvalidRequest(f"output {spec.name} is not text: ask for it with binary_data") from error
    flat = np.ascontiguousarray(array).ravel()
    return flat.astype(np.float32) if flat.dtype == np.float16 else flat


def write_binary_data(array: np.ndarray, spec: TensorSpec) -> bytes:
    """Return an output's elements as raw bytes."""
    if spec.dtype == "DT_STRING":
        return b"".join(struct.pack("<I", len(element)) + element for element in array.ravel())
    return np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes()


def _read_strings(name: str, data: list[Any]) -> np.ndarray:
    texts = np.array(data, object) if data else np.empty(0, object)
    encoded = np.empty(texts.size, object)
    for index, text in enumerate(texts.ravel()):
        if not isinstance(text, str):
            raise InvalidRequest(f"input {name}: expected strings, got {type(text).__name__}")
        encoded[index] = text.encode()
    return encoded.reshape(texts.shape)


def _read_numbers(name: str, data: list[Any], spec: TensorSpec) -> np.ndarray:
    dtype = spec.numpy_dtype
    assert dtype is not None
    try:
        array = np.array(data)
    except ValueError as error:
        raise InvalidRequest(f"input {name}: the nested lists are not all of one length") from error
    if not array.size:
        return array.astype(dtype)
    takes = {"b": "b", "i": "iu", "u": "iu", "f": "iuf"}[dtype.kind]
    if array.dtype.kind not in takes:
        expected = {"b": "true or false", "i": "whole numbers", "u": "whole numbers", "f": "numbers"}[dtype.kind]
        raise InvalidRequest(f"input {name}: expected {expected} for {datatype_of(spec)}, got {str(data)[:80]}")
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        if int(array.min()) < limits.min or int(array.max()) > limits.max:
            raise InvalidRequest(f"input {name}: values of {datatype_of(spec)} are from {limits.min} to {limits.max}")
        return array.astype(dtype)
    with np.errstate(over="ignore"):
        converted = array.astype(dtype)
    if dtype.kind == "f" and not np.isfinite(converted).all():
        raise InvalidRequest(f"input {name}: a value is too large for {datatype_of(spec)}")
    return converted


def _split_strings(name: str, data: memoryview, count: int) -> np.ndarray:
    """Split length-prefixed strings; there have to be `count` of them and nothing else."""
    if count > len(data) // 4:
        raise InvalidRequest(f"input {name}: {len(data)} bytes cannot hold {count} strings with their lengths")
    strings = np.empty(count, object)
    position = 0
    for index in range(count):
        start = position + 4
        if start > len(data):
            raise InvalidRequest(f"input {name}: the data ends before string {index}")
        position = start + int.from_bytes(data[start - 4 : start], "little")
        if position > len(data):
            raise InvalidRequest(f"input {name}: string {index} is longer than the data")
        strings[index] = bytes(data[start:position])
    if position != len(data):
        raise InvalidRequest(f"input {name}: {len(data) - position} bytes are left after {count} strings")
    return strings
