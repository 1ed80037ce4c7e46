"""Encodes outputs as JSON, like `util/json_tensor.cc` of TensorFlow Serving."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import orjson

from serving.api.json_arrays import MARK, PLACEHOLDER, insert_arrays, set_aside, to_python
from serving.api.tensorflow_serving.json_element import dtype_name
from serving.errors import InvalidRequest
from serving.inference.signatures import Signature, TensorSpec

SLICE_BYTES = 4 * 1024 * 1024
_WRITABLE_KINDS = "iubfO"
_MARK_STRING = "\ud800"  # in no output: "surrogateescape" decodes to U+DC80 and above


def encode_outputs(outputs: Mapping[str, np.ndarray], signature: Signature, *, as_rows: bool) -> bytes:
    """Encode the response to a predict request.

    Floats have the fewest digits that their own dtype needs, whole ones end in ".0". Strings are written as they are,
    UTF-8 or not. Those of outputs whose name ends in `_bytes` become `{"b64": ...}`.

    Args:
        outputs: an array for each output of the signature.
        signature: the signature that returned them.
        as_rows: `predictions`, one element per row, split along axis 0, instead of `outputs`, one element per output.

    Raises:
        InvalidRequest: JSON cannot hold an output's dtype, or the outputs cannot be split into rows.
    """
    if as_rows:
        _check_rows(outputs)
    columns = {name: _encode(array, signature.outputs[name]) for name, array in outputs.items()}
    large: list[np.ndarray] = []
    content: Any
    if len(columns) == 1:
        [column] = columns.values()
        content = set_aside(column, large)
    elif as_rows:
        content = [
            {name: set_aside(value, large) for name, value in zip(columns, row, strict=True)}
            for row in zip(*columns.values(), strict=True)
        ]
    else:
        content = {name: set_aside(column, large) for name, column in columns.items()}
    return insert_arrays(_dump({"predictions" if as_rows else "outputs": content}), large)


def _check_rows(outputs: Mapping[str, np.ndarray]) -> None:
    advice = "use 'inputs' instead of 'instances' to get the outputs in columnar format"
    row_count = None
    for name, array in outputs.items():
        if not array.ndim:
            raise InvalidRequest(f"Tensor name: {name} has no shape information \n{advice}")
        if not len(array):
            raise InvalidRequest(f"Tensor name: {name} has invalid batch size: 0\n{advice}")
        if row_count not in (None, len(array)):
            sizes = f"{len(array)} expecting: {row_count}"
            raise InvalidRequest(f"Tensor name: {name} has inconsistent batch size: {sizes}\n{advice}")
        row_count = len(array)


def _encode(array: np.ndarray, spec: TensorSpec) -> Any:
    if array.dtype.kind not in _WRITABLE_KINDS or array.dtype == np.float16:
        raise InvalidRequest(f"Failed to write JSON value for tensor type: {dtype_name(spec.dtype)}")
    if array.dtype.kind != "O":
        return np.ascontiguousarray(array) if array.ndim else array[()]
    if spec.name.endswith("_bytes"):
        return _map_strings(array.tolist(), lambda data: {"b64": base64.b64encode(data).decode()})
    return _map_strings(array.tolist(), lambda data: data.decode("utf-8", "surrogateescape"))


def _map_strings(value: Any, function: Callable[[bytes], Any]) -> Any:
    return [_map_strings(item, function) for item in value] if isinstance(value, list) else function(value)


def _dump(document: dict[str, Any]) -> bytes:
    try:
        text: bytes = orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)
    except orjson.JSONEncodeError:
        pass  # a string is not UTF-8
    else:
        if not _has_null(text):  # orjson's spelling of NaN and infinities
            return text

    def to_plain(value: Any) -> Any:
        return _MARK_STRING if value is PLACEHOLDER else to_python(value)

    slow = json.dumps(document, ensure_ascii=False, separators=(",", ":"), default=to_plain)
    return slow.replace(f'"{_MARK_STRING}"', MARK).encode("utf-8", "surrogateescape")


def _has_null(text: bytes) -> bool:
    # In slices, so that other threads can take the GIL in between.
    return any(text.find(b"null", start, start + SLICE_BYTES + 3) >= 0 for start in range(0, len(text), SLICE_BYTES))
