"""Between JSON and arrays, by a signature: TensorFlow Serving's `util/json_tensor.cc`, its messages included.

Where TensorFlow Serving is silently wrong this refuses: integers outside their dtype's range (it wraps them), rows of
different shapes that happen to have as many elements (it takes the last one's shape).
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import orjson

from serving.errors import InvalidRequest
from serving.predictor import Signature, TensorSpec
from serving.rest.json_document import quote, quote_document, type_name

MAX_DIMENSIONS = 254
_NAMES = {"DT_INT8": "int8", "DT_INT16": "int16", "DT_INT32": "int32", "DT_INT64": "int64", "DT_UINT8": "uint8",
          "DT_UINT16": "uint16", "DT_UINT32": "uint32", "DT_UINT64": "uint64", "DT_FLOAT": "float",
          "DT_DOUBLE": "double", "DT_BOOL": "bool", "DT_STRING": "string", "DT_HALF": "half"}  # fmt: skip
_WRITABLE = frozenset(_NAMES) - {"DT_HALF"}
_BASE64_KEY = "b64"


def decode_inputs(document: Mapping[str, Any], signature: Signature) -> dict[str, np.ndarray]:
    """Make the arrays of a predict request: the row form (`instances`) or the columnar form (`inputs`).

    Args:
        document: the request, with one of the two keys.
        signature: what the arrays are for.

    Returns:
        An array for each input, of its dtype; shapes are as they came.

    Raises:
        InvalidRequest: the values do not fit; the message says which.
    """
    if "instances" in document:
        return _decode_rows(document, signature.inputs)
    return _decode_columns(document["inputs"], signature.inputs)


def encode_outputs(outputs: Mapping[str, np.ndarray], signature: Signature, *, as_rows: bool) -> bytes:
    """Make the reply to a predict request: `predictions` for the row form, `outputs` for the columnar form.

    Raises:
        InvalidRequest: an output has a dtype that JSON replies cannot hold, or no rows to reply with.
    """
    columns = {name: _encode(array, signature.outputs[name]) for name, array in outputs.items()}
    if not as_rows:
        reply = {"outputs": next(iter(columns.values())) if len(columns) == 1 else columns}
        return _dump(reply, outputs)
    row_counts = {len(array) if array.ndim else -1 for array in outputs.values()}
    if -1 in row_counts:
        raise InvalidRequest("an output has no rows to reply with: ask with 'inputs' instead of 'instances'")
    if len(row_counts) > 1:
        raise InvalidRequest("the outputs differ in their number of rows: ask with 'inputs' instead of 'instances'")
    if len(columns) == 1:
        return _dump({"predictions": next(iter(columns.values()))}, outputs)
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return _dump({"predictions": rows}, outputs)


def _decode_rows(document: Mapping[str, Any], specs: Mapping[str, TensorSpec]) -> dict[str, np.ndarray]:
    instances = document["instances"]
    if not isinstance(instances, list):
        raise InvalidRequest(f"JSON Value: {quote_document(document)} Expecting 'instances' to be an list/array")
    if not instances:
        raise InvalidRequest(f"JSON Value: {quote_document(document)} No values in 'instances' array")
    if not _is_named(instances[0]):
        if len(specs) > 1:
            raise InvalidRequest(
                "instances is a plain list, but expecting list of objects as multiple input tensors required as per "
                "tensorinfo_map"
            )
        for index, instance in enumerate(instances):
            if _is_named(instance) and _BASE64_KEY not in instance:
                raise InvalidRequest(f"Expecting value/list but got object at item {index} of input list")
        ((name, spec),) = specs.items()
        return {name: _stack(instances, spec, key=None)}
    for index, instance in enumerate(instances):
        if not _is_named(instance):
            kind = "list" if isinstance(instance, list) else "value"
            raise InvalidRequest(f"Expecting object but got {kind} at item {index} of input list")
        for key in instance:
            if key not in specs:
                raise _in_element(index, f"JSON object: does not have named input: {key}", key=key)
        if len(instance) != len(specs):
            raise InvalidRequest(
                f"Failed to process element: {index} of 'instances' list. JSON object: {quote(instance)} keys must be "
                f"equal to: {','.join(specs)}"
            )
    return {name: _stack([row[name] for row in instances], spec, key=name) for name, spec in specs.items()}


def _decode_columns(inputs: Any, specs: Mapping[str, TensorSpec]) -> dict[str, np.ndarray]:
    if not _is_named(inputs):
        if len(specs) > 1:
            raise InvalidRequest(
                "inputs is a plain value/list, but expecting an object as multiple input tensors required as per "
                "tensorinfo_map"
            )
        ((name, spec),) = specs.items()
        return {name: _to_array(inputs, spec)}
    for name in specs:
        if name not in inputs:
            raise InvalidRequest(f"Missing named input: {name} in 'inputs' object.")
    return {name: _to_array(inputs[name], spec) for name, spec in specs.items()}


def _stack(values: list[Any], spec: TensorSpec, *, key: str | None) -> np.ndarray:
    """Make one array of a row each; a row that does not fit is named by its position."""
    array = _quick_array(values, spec)
    if array is not None:
        return array
    rows: list[np.ndarray] = []
    for index, value in enumerate(values):
        try:
            row = _to_array(value, spec)
        except InvalidRequest as error:
            raise _in_element(index, str(error), key=key) from error
        if rows and row.size != rows[0].size:
            raise _in_element(index, f"Expecting tensor size: {rows[0].size} but got: {row.size}", key=key)
        if rows and row.shape != rows[0].shape:
            raise _in_element(index, f"Expecting tensor shape: {rows[0].shape} but got: {row.shape}", key=key)
        rows.append(row)
    return np.stack(rows)


def _to_array(value: Any, spec: TensorSpec) -> np.ndarray:
    array = _quick_array(value, spec)
    if array is not None:
        return array
    shape = _shape_of(value)
    if len(shape) > MAX_DIMENSIONS:
        raise InvalidRequest(f"tensor parsing error: {spec.name}")
    leaves: list[Any] = []
    _collect(value, spec, shape, 0, leaves)
    flat = np.empty(len(leaves), spec.numpy_dtype)
    flat[:] = leaves
    return flat.reshape(shape)


def _quick_array(value: Any, spec: TensorSpec) -> np.ndarray | None:
    """Convert nested lists of numbers in one go; `None` where anything about them has to be looked at closer."""
    dtype = spec.numpy_dtype
    if dtype is None or dtype.kind not in "iuf" or not isinstance(value, list):
        return None
    try:
        array = np.array(value)
    except (ValueError, OverflowError):  # ragged, or not numbers
        return None
    if array.size == 0 or array.dtype.kind not in ("iu" if dtype.kind in "iu" else "iuf") or _has_bool(value):
        return None
    if dtype.kind == "f":
        with np.errstate(over="ignore"):  # beyond the largest float32 lies Infinity, as TensorFlow Serving has it
            return array.astype(dtype)
    limits = np.iinfo(dtype)
    if array.min() < limits.min or array.max() > limits.max:
        return None
    return array.astype(dtype)


def _has_bool(value: list[Any]) -> bool:
    # numpy takes True for 1, and only a walk over all elements can tell; leaf lists are searched at C speed.
    if value and isinstance(value[0], list):
        return any(_has_bool(item) for item in value)
    return bool in set(map(type, value))


def _collect(value: Any, spec: TensorSpec, shape: tuple[int, ...], level: int, leaves: list[Any]) -> None:
    """Append the elements below `value`, checking each against the shape that the first ones have (FillTensorProto)."""
    if not isinstance(value, list):
        if level != len(shape):
            raise InvalidRequest(
                f"JSON Value: {quote(value)} found at incorrect level: {level + 1} in the JSON DOM. "
                f"Expected at level: {len(shape)}"
            )
        leaves.append(_element(value, spec))
        return
    if level >= len(shape):
        raise InvalidRequest(f"Encountered list at unexpected level: {level} expected < {len(shape)}")
    if len(value) != shape[level]:
        raise InvalidRequest(
            f"Encountered list at unexpected size: {len(value)} at level: {level} expected size: {shape[level]}"
        )
    for item in value:
        _collect(item, spec, shape, level + 1, leaves)


def _element(value: Any, spec: TensorSpec) -> Any:
    """Check and convert one element."""
    dtype = spec.numpy_dtype
    if dtype is None or spec.dtype not in _NAMES:
        raise InvalidRequest(f"JSON values cannot be made a tensor of type {spec.dtype}; ask over gRPC")
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if spec.dtype == "DT_STRING":
        if _is_base64(value):
            return _decode_base64(value[_BASE64_KEY])
        if isinstance(value, str):
            return value.encode("utf-8", "surrogatepass")
    elif dtype.kind == "b":
        if isinstance(value, bool):
            return value
    elif dtype.kind == "f":
        if is_number:
            with np.errstate(over="ignore"):
                return dtype.type(value)
    elif is_number and isinstance(value, int):
        limits = np.iinfo(dtype)
        if limits.min <= value <= limits.max:
            return value
        if dtype.itemsize < 8:
            raise InvalidRequest(
                f"JSON Value: {value} is out of range for {_NAMES[spec.dtype]}: {limits.min} to {limits.max}"
            )
    spelled = quote(float(value) if is_number and abs(value) >= 2**64 else value)
    raise InvalidRequest(
        f"JSON Value: {spelled} Type: {type_name(value)} is not of expected type: {_NAMES[spec.dtype]}"
    )


def _shape_of(value: Any) -> tuple[int, ...]:
    """Return the shape that the first element of every list promises (GetDenseTensorShape)."""
    shape = []
    while isinstance(value, list):
        shape.append(len(value))
        if not value:
            break
        value = value[0]
    return tuple(shape)


def _decode_base64(text: str) -> bytes:
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4) if len(text) % 4 != 1 else text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidRequest("Unable to base64 decode") from error


def _is_base64(value: Any) -> bool:
    return isinstance(value, dict) and len(value) == 1 and isinstance(value.get(_BASE64_KEY), str)


def _is_named(value: Any) -> bool:
    return isinstance(value, dict) and not _is_base64(value)


def _in_element(index: int, message: str, *, key: str | None) -> InvalidRequest:
    name = "" if key is None else f" key: {key}"
    return InvalidRequest(
        f"Failed to process element: {index}{name} of 'instances' list. Error: INVALID_ARGUMENT: {message}"
    )


def _encode(array: np.ndarray, spec: TensorSpec) -> Any:
    if spec.dtype not in _WRITABLE:
        raise InvalidRequest(f"Failed to write JSON value for tensor type: {_NAMES.get(spec.dtype, spec.dtype)}")
    if spec.dtype != "DT_STRING":
        return np.ascontiguousarray(array) if array.ndim else array[()]
    if spec.name.endswith("_bytes"):
        return _map_strings(array.tolist(), lambda data: {_BASE64_KEY: base64.b64encode(data).decode()})
    # What is no UTF-8 goes through JSON text as it is, as it does in TensorFlow Serving.
    return _map_strings(array.tolist(), lambda data: data.decode("utf-8", "surrogateescape"))


def _map_strings(value: Any, function: Any) -> Any:
    return [_map_strings(item, function) for item in value] if isinstance(value, list) else function(value)


def _dump(reply: dict[str, Any], outputs: Mapping[str, np.ndarray]) -> bytes:
    finite = all(array.dtype.kind != "f" or np.isfinite(array).all() for array in outputs.values())
    if finite:
        try:
            return orjson.dumps(reply, option=orjson.OPT_SERIALIZE_NUMPY)
        except orjson.JSONEncodeError:
            pass  # a string that is no UTF-8
    text = json.dumps(reply, ensure_ascii=False, default=lambda value: value.tolist())
    return text.encode("utf-8", "surrogateescape")
