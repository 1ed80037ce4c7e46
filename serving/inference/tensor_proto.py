"""TensorProto messages to arrays and back (`tensorflow/core/framework/tensor.proto`).

Unlike `tf.make_ndarray`, nothing is believed: a message of a few bytes may announce a shape of terabytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from serving.errors import InvalidRequest, TooLarge
from serving.inference.signatures import NUMPY_DTYPES

# The field that holds the values of each dtype where they are not in `tensor_content`.
_VALUE_FIELDS: Mapping[str, str] = {
    "DT_FLOAT": "float_val",
    "DT_DOUBLE": "double_val",
    "DT_INT8": "int_val",
    "DT_INT16": "int_val",
    "DT_INT32": "int_val",
    "DT_INT64": "int64_val",
    "DT_UINT8": "int_val",
    "DT_UINT16": "int_val",
    "DT_UINT32": "uint32_val",
    "DT_UINT64": "uint64_val",
    "DT_BOOL": "bool_val",
    "DT_HALF": "half_val",
    "DT_COMPLEX64": "scomplex_val",
    "DT_COMPLEX128": "dcomplex_val",
    "DT_STRING": "string_val",
}
SLICE_ELEMENTS = 64 * 1024
MAX_DIMENSIONS = 64  # numpy's; TensorFlow's are 254
_SMALL_INTEGERS = ("DT_INT8", "DT_INT16", "DT_UINT8", "DT_UINT16")


def count_elements(tensor: Any) -> int:
    """Return how many elements the shape of a TensorProto announces."""
    return math.prod(max(0, dimension.size) for dimension in tensor.tensor_shape.dim)


def read_tensor(tensor: Any, *, name: str, max_bytes: int) -> np.ndarray:
    """Turn a TensorProto into an array; strings become an object array of bytes.

    Where fewer values than elements are given, the last is repeated, as TensorFlow has it.

    Args:
        tensor: the message.
        name: of the input, for messages.
        max_bytes: how large the array may be.

    Raises:
        InvalidRequest: the values do not fit the dtype and shape it announces.
        TooLarge: the shape announces a larger array.
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
        raise TooLarge(f"input {name} has {count:,} elements, more than {max_bytes:,} bytes, the most that is taken")
    content = tensor.tensor_content  # read once: each time it is copied
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
    """Fill a TensorProto from an array, in the typed `*_val` field of its dtype, as TensorFlow Serving replies."""
    from tensorflow.core.framework import types_pb2

    tensor.dtype = types_pb2.DataType.Value(dtype_name)
    tensor.tensor_shape.SetInParent()  # of a scalar too
    for size in array.shape:
        tensor.tensor_shape.dim.add().size = size
    field = getattr(tensor, _VALUE_FIELDS[dtype_name])
    if dtype_name == "DT_HALF":
        array = array.view(np.uint16)
    elif dtype_name in ("DT_COMPLEX64", "DT_COMPLEX128"):
        array = np.ascontiguousarray(array).view(array.real.dtype)
    flat = array.ravel()
    for start in range(0, flat.size, SLICE_ELEMENTS):  # between two slices other requests have their turn
        field.extend(flat[start : start + SLICE_ELEMENTS].tolist())


def _read_values(values: Any, dtype_name: str, dtype: np.dtype[Any], *, name: str) -> np.ndarray:
    if dtype_name == "DT_STRING":
        array = np.empty(len(values), object)
        array[:] = list(values)
        return array
    if dtype_name == "DT_HALF":  # the 16 bits, in an int32
        return np.array(values, np.int32).astype(np.uint16).view(np.float16)
    if dtype_name in ("DT_COMPLEX64", "DT_COMPLEX128"):  # real and imaginary parts in turn
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
