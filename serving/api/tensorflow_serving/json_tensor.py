"""Converts JSON to arrays by a signature, like `util/json_tensor.cc` of TensorFlow Serving, error messages included.

Fast path: valid nested lists are flattened level by level with C functions. Fallback: anything else is walked element
by element in TensorFlow Serving's order, so that the same error is reported first.

One intended difference: TensorFlow Serving silently wraps integers out of their dtype's range, and this refuses them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from serving.api.json_arrays import flatten
from serving.api.tensorflow_serving.json_document import document_error, quote_json, replace_surrogates
from serving.api.tensorflow_serving.json_element import JSON_TYPES, decode_element, decode_string, is_base64
from serving.errors import InvalidRequest
from serving.inference.signatures import Signature, TensorSpec

MAX_DIMENSIONS = 254  # TensorFlow's limit; numpy's is lower
_MAX_ARRAY_DIMENSIONS = 63  # of a row: numpy's 64, minus the batch dimension

_SEVERAL_INPUTS = "as multiple input tensors required as per tensorinfo_map"


class _TooManyDimensions(InvalidRequest):
    """Lists are nested deeper than any tensor; reported for the request as a whole, not for a row."""


def decode_inputs(document: Mapping[str, Any], signature: Signature) -> dict[str, np.ndarray]:
    """Return the arrays of a predict request, in row format (`instances`) or columnar format (`inputs`).

    Returns:
        An array of each input's dtype. The shapes are those of the JSON lists, and not yet validated.

    Raises:
        InvalidRequest: a value does not fit its input; the message quotes it.
    """
    if "instances" in document:
        return _decode_rows(document, signature.inputs)
    return _decode_columns(document["inputs"], signature.inputs)


def _decode_rows(document: Mapping[str, Any], specs: Mapping[str, TensorSpec]) -> dict[str, np.ndarray]:
    instances = document["instances"]
    if not isinstance(instances, list):
        raise document_error(document, "Expecting 'instances' to be an list/array")
    if not instances:
        raise document_error(document, "No values in 'instances' array")
    are_named = _is_named(instances[0])
    if not are_named:
        if len(specs) > 1:
            raise InvalidRequest(f"instances is a plain list, but expecting list of objects {_SEVERAL_INPUTS}")
        ((name, spec),) = specs.items()
        array = _convert(instances, spec)
        return _walk_rows(instances, specs) if array is None else {name: array}
    arrays = {}
    if all(isinstance(instance, dict) and instance.keys() == specs.keys() for instance in instances):
        for name, spec in specs.items():
            array = _convert([instance[name] for instance in instances], spec)
            if array is None:
                break
            arrays[name] = array
    return arrays if len(arrays) == len(specs) else _walk_rows(instances, specs)


def _walk_rows(instances: list[Any], specs: Mapping[str, TensorSpec]) -> dict[str, np.ndarray]:
    """Convert row by row; errors name the row by its position (FillTensorMapFromInstancesList)."""
    are_named = _is_named(instances[0])
    rows: dict[str, list[np.ndarray]] = {name: [] for name in specs}
    for index, instance in enumerate(instances):
        if _is_named(instance) != are_named:
            kinds = "object but got list" if are_named else "value/list but got object"
            raise InvalidRequest(f"Expecting {kinds} at item {index} of input list")
        element = f"Failed to process element: {index}"
        for key, value in instance.items() if are_named else [(next(iter(specs)), instance)]:
            where = f"{element} key: {replace_surrogates(key)}" if are_named else element
            if key not in specs:
                raise _row_error(where, f"JSON object: does not have named input: {replace_surrogates(key)}")
            _append_row(rows[key], value, specs[key], where=where)
        if are_named and len(instance) != len(specs):
            raise InvalidRequest(
                f"{element} of 'instances' list. JSON object: {quote_json(instance)} "
                f"keys must be equal to: {','.join(specs)}"
            )
    return {name: np.stack(arrays) for name, arrays in rows.items()}


def _append_row(rows: list[np.ndarray], value: Any, spec: TensorSpec, *, where: str) -> None:
    try:
        row = _to_array(value, spec)
    except _TooManyDimensions:
        raise
    except InvalidRequest as error:
        raise _row_error(where, str(error)) from error
    if rows and row.size != rows[0].size:
        raise _row_error(where, f"Expecting tensor size: {rows[0].size} but got: {row.size}")
    if rows and row.shape != rows[0].shape:
        expected, got = (",".join(map(str, array.shape)) for array in (rows[0], row))
        raise _row_error(where, f"Expecting shape [{expected}] but got: [{got}]")
    rows.append(row)


def _decode_columns(inputs: Any, specs: Mapping[str, TensorSpec]) -> dict[str, np.ndarray]:
    if not _is_named(inputs):
        if len(specs) > 1:
            raise InvalidRequest(f"inputs is a plain value/list, but expecting an object {_SEVERAL_INPUTS}")
        ((name, spec),) = specs.items()
        return {name: _to_array(inputs, spec)}
    arrays = {}
    for name, spec in specs.items():
        if name not in inputs:
            raise InvalidRequest(f"Missing named input: {name} in 'inputs' object.")
        arrays[name] = _to_array(inputs[name], spec)
    return arrays


def _to_array(value: Any, spec: TensorSpec) -> np.ndarray:
    array = _convert(value, spec)
    return _walk(value, spec) if array is None else array


def _convert(value: Any, spec: TensorSpec) -> np.ndarray | None:
    """Convert nested lists at once; None if they are ragged or an element does not fit."""
    dtype = spec.numpy_dtype
    if dtype is None or dtype.kind not in JSON_TYPES:
        return None
    flat = flatten(value)
    if flat is None:
        return None
    elements, shape, types = flat
    if not types <= JSON_TYPES[dtype.kind] or len(shape) > _MAX_ARRAY_DIMENSIONS:
        return None
    try:
        return _array_of(elements, dtype).reshape(shape)
    except (InvalidRequest, OverflowError, ValueError):  # an element is out of range, or not base64
        return None


def _array_of(elements: list[Any], dtype: np.dtype[Any]) -> np.ndarray:
    if dtype.kind == "f":
        with np.errstate(over="ignore"):  # overflow gives Infinity, like in TensorFlow Serving
            return np.array(elements, np.float64).astype(dtype)
    if dtype == np.uint8:
        return np.frombuffer(bytes(elements), dtype)  # pixels; several times faster than np.array of a list
    if dtype.kind == "O":
        elements = [decode_string(element) for element in elements]
    return np.array(elements, dtype)


def _walk(value: Any, spec: TensorSpec) -> np.ndarray:
    """Convert element by element, checking each against the shape of the first ones (FillTensorProto)."""
    shape = _first_shape(value)
    if len(shape) > MAX_DIMENSIONS:
        raise _TooManyDimensions(f"tensor parsing error: {spec.name}")
    elements: list[Any] = []
    _collect(value, spec, shape, 0, elements)
    if len(shape) > _MAX_ARRAY_DIMENSIONS:
        raise _TooManyDimensions(f"input {spec.name}: expected {spec}, got {len(shape)} dimensions")
    if spec.numpy_dtype is None:  # an empty list, so no element was refused
        raise InvalidRequest(f"input {spec.name}: JSON cannot hold {spec}")
    return np.array(elements, spec.numpy_dtype).reshape(shape)


def _first_shape(value: Any) -> tuple[int, ...]:
    """Return the shape that the first element of every list has (GetDenseTensorShape)."""
    shape = []
    while isinstance(value, list):
        shape.append(len(value))
        value = value[0] if value else None
    return tuple(shape)


def _collect(value: Any, spec: TensorSpec, shape: tuple[int, ...], level: int, elements: list[Any]) -> None:
    if not isinstance(value, list):
        if level != len(shape):
            raise InvalidRequest(
                f"JSON Value: {quote_json(value)} found at incorrect level: {level + 1} in the JSON DOM. "
                f"Expected at level: {len(shape)}"
            )
        elements.append(decode_element(value, spec))
        return
    if level >= len(shape):
        raise InvalidRequest(f"Encountered list at unexpected level: {level} expected < {len(shape)}")
    if len(value) != shape[level]:
        raise InvalidRequest(
            f"Encountered list at unexpected size: {len(value)} at level: {level} expected size: {shape[level]}"
        )
    for item in value:
        _collect(item, spec, shape, level + 1, elements)


def _is_named(value: Any) -> bool:
    return isinstance(value, dict) and not is_base64(value)


def _row_error(where: str, message: str) -> InvalidRequest:
    return InvalidRequest(f"{where} of 'instances' list. Error: INVALID_ARGUMENT: {message}")
