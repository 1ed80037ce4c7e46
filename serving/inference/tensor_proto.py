"""Converts TensorProto messages (`tensorflow/core/framework/tensor.proto`) to arrays and back.

Unlike `tf.make_ndarray`, it validates them: a message of a few bytes may declare a shape of terabytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from serving.errors import InvalidRequest, TooLarge
from serving.inference.signatures import NUMPY_DTYPES

# The field with the values of each dtype, unless they are in `tensor_content`.
_SMALL_INTEGERS = ("DT_INT8", "DT_INT16", "DT_UINT8", "DT_UINT16")
_NAMESAKES = ("int64", "uint32", "uint64", "half", "float", "double", "bool", "string")
_VALUE_FIELDS: Mapping[str, str] = {
    **dict.fromkeys((*_SMALL_INTEGERS, "DT_INT32"), "int_val"),
    **{f"DT_{name.upper()}": f"{name}_val" for name in _NAMESAKES},
    "DT_COMPLEX64": "scomplex_val",
    "DT_COMPLEX128": "dcomplex_val",
}
SLICE_ELEMENTS = 64 * 1024
MAX_DIMENSIONS = 64  # numpy's limit; TensorFlow's is 254


def count_elements(tensor: Any) -> int:
    """Return the number of elements that the shape of a TensorProto declares."""
    return math.prod(max(0, dimension.size) for dimension in tensor.tensor_shape.dim)


def read_tensor(tensor: Any, *, name: str, max_bytes: int) -> np.ndarray:
    """Convert a TensorProto to an array; strings become an object array of bytes.

    If it has fewer values than elements, the last value is repeated, as in TensorFlow. `name` is for error messages.

    Raises:
        InvalidRequest: the values do not fit the declared dtype and shape.
        TooLarge: the declared shape exceeds `max_bytes`.
    """
    from tensorflow.core.framework import types_pb2

    try:
        dtype_name = types_pb2.DataType.Name(tensor.dtype)
    except ValueError as error:
        raise InvalidRequest(f"tensor parsing error: {name}: {tensor.dtype} is not a dtype") from error
    dtype = NUMPY_DTYPES.get(dtype_name)
    if dtype is None:
        raise InvalidRequest(f"tensor parsing error: {name}: {dtype_name} cannot be sent")
    if len(tensor.tensor_shape.dim) > MAX_DIMENSIONS:
        raise InvalidRequest(
            f"tensor parsing error: {name}: expected at most {MAX_DIMENSIONS} dimensions, got "
            f"{len(tensor.tensor_shape.dim)}"
        )
    shape = tuple(dimension.size for dimension in tensor.tensor_shape.dim)
    if tensor.tensor_shape.unknown_rank or any(size < 0 for size in shape):
        raise InvalidRequest(f"tensor parsing error: {name}: its shape is not fully given")
    count = math.prod(shape)
    if count * dtype.itemsize > max_bytes:
        raise TooLarge(f"input {name} has {count:,} elements, which exceed the limit of {max_bytes:,} bytes")
    content = tensor.tensor_content  # every access copies it
    if content and dtype_name != "DT_STRING":
        if len(content) != count * dtype.itemsize:
            raise InvalidRequest(
                f"tensor parsing error: {name}: tensor_content has {len(content)} bytes, "
                f"{dtype_name} {list(shape)} needs {count * dtype.itemsize}"
            )
        return np.frombuffer(content, dtype.newbyteorder("<")).astype(dtype, copy=False).reshape(shape)
    values = _read_values(getattr(tensor, _VALUE_FIELDS[dtype_name]), dtype_name, dtype, name=name)
    if len(values) > count or (count and not len(values)):
        raise InvalidRequest(
            f"tensor parsing error: {name}: {len(values)} values in {_VALUE_FIELDS[dtype_name]}, "
            f"{dtype_name} {list(shape)} needs {count}"
        )
    if len(values) < count:
        values = np.concatenate([values, np.full(count - len(values), values[-1], dtype)])
    return values.reshape(shape)


def write_tensor(tensor: Any, array: np.ndarray, *, dtype_name: str) -> None:
    """Fill a TensorProto from an array, with the `*_val` field of its dtype, as TensorFlow Serving does."""
    from tensorflow.core.framework import types_pb2

    tensor.dtype = types_pb2.DataType.Value(dtype_name)
    tensor.tensor_shape.SetInParent()  # even for a scalar
    for size in array.shape:
        tensor.tensor_shape.dim.add().size = size
    field = getattr(tensor, _VALUE_FIELDS[dtype_name])
    if dtype_name == "DT_HALF":
        array = array.view(np.uint16)
    elif dtype_name in ("DT_COMPLEX64", "DT_COMPLEX128"):
        array = np.ascontiguousarray(array).view(array.real.dtype)
    flat = array.ravel()
    for start in range(0, flat.size, SLICE_ELEMENTS):  # other threads can run between two slices
        field.extend(flat[start : start + SLICE_ELEMENTS].tolist())


def _read_values(values: Any, dtype_name: str, dtype: np.dtype[Any], *, name: str) -> np.ndarray:
    if dtype_name == "DT_STRING":
        array = np.empty(len(values), object)
        array[:] = list(values)
        return array
    if dtype_name == "DT_HALF":  # 16 bits in an int32
        return np.array(values, np.int32).astype(np.uint16).view(np.float16)
    if dtype_name in ("DT_COMPLEX64", "DT_COMPLEX128"):  # alternating real and imaginary parts
        if len(values) % 2:
            raise InvalidRequest(f"tensor parsing error: {name}: an odd number of parts of complex numbers")
        return np.array(values, dtype.type(0).real.dtype).view(dtype)
    if dtype_name in _SMALL_INTEGERS:
        array = np.array(values, np.int32)
        limits = np.iinfo(dtype)
        if len(array) and (array.min() < limits.min or array.max() > limits.max):
            raise InvalidRequest(f"input {name}: values of {dtype} must be from {limits.min} to {limits.max}")
        return array.astype(dtype)
    return np.array(values, dtype)
