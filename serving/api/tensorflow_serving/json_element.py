"""Converts one JSON value to a tensor element, with TensorFlow Serving's error messages (AddValueToTensor)."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from serving.api.tensorflow_serving.json_document import RepeatedKeys, quote_json, type_name
from serving.errors import InvalidRequest
from serving.inference.signatures import TensorSpec

# JSON types by kind of numpy dtype.
JSON_TYPES: Mapping[str, frozenset[type]] = {
    "f": frozenset((int, float)),
    "i": frozenset((int,)),
    "u": frozenset((int,)),
    "b": frozenset((bool,)),
    "O": frozenset((str, dict, RepeatedKeys)),  # dict: base64
}
# The TensorProto field that carries narrow integers. TensorFlow Serving reports a number that exceeds this field as of
# the wrong type, not as out of range.
_CARRIERS = {"DT_INT8": np.int32, "DT_INT16": np.int32, "DT_UINT8": np.int32, "DT_UINT16": np.int32}
_BASE64 = re.compile(rb"([A-Za-z0-9+/]*)([=.]*)")


def decode_element(value: Any, spec: TensorSpec) -> Any:
    """Convert one element; raises InvalidRequest if it does not have the input's dtype, or is out of its range."""
    dtype = spec.numpy_dtype
    if dtype is None or dtype.kind not in JSON_TYPES:
        raise InvalidRequest(f"Conversion of JSON Value: {quote_json(value)} to type: {dtype_name(spec.dtype)}")
    if type(value) not in JSON_TYPES[dtype.kind]:
        raise _type_error(value, spec)
    if dtype.kind == "O":
        return decode_string(value)
    if dtype.kind == "f":
        with np.errstate(over="ignore"):
            return np.float64(value).astype(dtype)
    if dtype.kind in "iu":
        carrier, limits = np.iinfo(_CARRIERS.get(spec.dtype, dtype)), np.iinfo(dtype)
        if not carrier.min <= value <= carrier.max:
            raise _type_error(value, spec)
        if not limits.min <= value <= limits.max:
            name = dtype_name(spec.dtype)
            raise InvalidRequest(f"JSON Value: {value} is out of range for {name}: {limits.min} to {limits.max}")
    return value


def decode_string(value: str | dict[str, Any]) -> bytes:
    """Return the bytes of a string or a base64 object; raises InvalidRequest if an object is not base64."""
    if isinstance(value, str):
        return value.encode("utf-8", "surrogateescape")
    if not is_base64(value):
        raise InvalidRequest(f"JSON Value: {quote_json(value)} not formatted correctly for base64 data")
    # Like absl::Base64Unescape: white space anywhere, padding complete or absent.
    symbols = b"".join(value["b64"].encode("utf-8", "surrogateescape").split())
    match = _BASE64.fullmatch(symbols)
    missing = -len(match[1]) % 4 if match else 3
    if match is None or missing == 3 or len(match[2]) not in (0, missing):
        raise InvalidRequest("Unable to base64 decode")
    return base64.b64decode(match[1] + b"=" * missing)


def is_base64(value: dict[str, Any]) -> bool:
    """Return whether an object is base64 data: "b64" is its only key, not repeated, and its value is a string."""
    return len(value) == 1 and isinstance(value.get("b64"), str) and not isinstance(value, RepeatedKeys)


def dtype_name(dtype: str) -> str:
    """Return the name of a dtype in TensorFlow's messages: "uint8" for "DT_UINT8"."""
    return dtype.removeprefix("DT_").lower()


def _type_error(value: Any, spec: TensorSpec) -> InvalidRequest:
    return InvalidRequest(
        f"JSON Value: {quote_json(value)} Type: {type_name(value)} is not of expected type: {dtype_name(spec.dtype)}"
    )
