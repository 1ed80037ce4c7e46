"""One element of a tensor, from JSON: what each dtype takes, and what is said of the rest (AddValueToTensor)."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from serving.api.tensorflow_serving.json_quoting import RepeatedKeys, quote_json, type_name
from serving.errors import InvalidRequest
from serving.inference.signatures import TensorSpec

# By the kind of the numpy dtype.
JSON_TYPES: Mapping[str, frozenset[type]] = {
    "f": frozenset((int, float)),
    "i": frozenset((int,)),
    "u": frozenset((int,)),
    "b": frozenset((bool,)),
    "O": frozenset((str, dict, RepeatedKeys)),  # a dict: base64
}
# The field of TensorProto that narrow integers travel in: what does not fit it is of the wrong type, as TensorFlow
# Serving has it, and not only out of range.
_CARRIERS = {"DT_INT8": np.int32, "DT_INT16": np.int32, "DT_UINT8": np.int32, "DT_UINT16": np.int32}
_BASE64 = re.compile(rb"([A-Za-z0-9+/]*)([=.]*)")


def decode_element(value: Any, spec: TensorSpec) -> Any:
    """Check and convert one element.

    Raises:
        InvalidRequest: it is not of the input's dtype, or out of its range.
    """
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
    """Return the bytes of a string, or of an object with the one key "b64".

    Raises:
        InvalidRequest: it is another object, or what it holds is not base64.
    """
    if isinstance(value, str):
        return value.encode("utf-8", "surrogateescape")
    if not is_base64(value):
        raise InvalidRequest(f"JSON Value: {quote_json(value)} not formatted correctly for base64 data")
    # As absl::Base64Unescape: white space anywhere, padding all there or not at all.
    symbols = b"".join(value["b64"].encode("utf-8", "surrogateescape").split())
    match = _BASE64.fullmatch(symbols)
    missing = -len(match[1]) % 4 if match else 3
    if match is None or missing == 3 or len(match[2]) not in (0, missing):
        raise InvalidRequest("Unable to base64 decode")
    return base64.b64decode(match[1] + b"=" * missing)


def is_base64(value: dict[str, Any]) -> bool:
    """Whether an object stands for bytes: "b64" is its only key, there once, and holds a string."""
    return len(value) == 1 and isinstance(value.get("b64"), str) and not isinstance(value, RepeatedKeys)


def dtype_name(dtype: str) -> str:
    """Return a dtype as TensorFlow's messages name it: "uint8" for "DT_UINT8"."""
    return dtype.removeprefix("DT_").lower()


def _type_error(value: Any, spec: TensorSpec) -> InvalidRequest:
    return InvalidRequest(
        f"JSON Value: {quote_json(value)} Type: {type_name(value)} is not of expected type: {dtype_name(spec.dtype)}"
    )
