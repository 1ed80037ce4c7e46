"""Tensors in gRPC messages (tensorflow/core/framework/tensor.proto)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from client.protos import prediction_pb2

DT_FLOAT, DT_UINT8, DT_STRING, DT_INT64 = 1, 4, 7, 9  # tensorflow/core/framework/types.proto


def make_tensor(dtype: int, *shape: int, **values: Any) -> Any:
    """Return a tensor with its values in the field that fits its type, such as `string_val`."""
    return prediction_pb2.Tensor(dtype=dtype, tensor_shape={"dim": [{"size": size} for size in shape]}, **values)


def read_numbers(tensor: Any) -> np.ndarray[Any, Any]:
    """Return the values of a float or int64 tensor.

    Raises:
        ValueError: the number of values does not match the shape.
    """
    dtype = np.dtype(np.float32 if tensor.dtype == DT_FLOAT else np.int64)
    shape = [dimension.size for dimension in tensor.tensor_shape.dim]
    values = (
        np.frombuffer(tensor.tensor_content, dtype.newbyteorder("<"))
        if tensor.tensor_content and len(tensor.tensor_content) % dtype.itemsize == 0
        else np.array(tensor.float_val if tensor.dtype == DT_FLOAT else tensor.int64_val, dtype)
    )
    if min(shape, default=0) < 0 or math.prod(shape) != len(values):
        raise ValueError(f"{len(values)} values for the shape {shape}")
    return values.reshape(shape)


def read_strings(tensor: Any) -> list[str]:
    """Return the values of a string tensor of rank 1."""
    return [value.decode("utf-8", errors="replace") for value in tensor.string_val]
