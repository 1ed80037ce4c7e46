"""Arrays to JSON: the replies of TensorFlow Serving's `util/json_tensor.cc`."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import orjson

from serving.api.json_arrays import dump_array, is_large, to_python, write_large
from serving.api.tensorflow_serving.json_element import dtype_name
from serving.errors import InvalidRequest
from serving.inference.signatures import Signature, TensorSpec

SLICE_BYTES = 4 * 1024 * 1024
_WRITABLE_KINDS = "iubfO"


def encode_outputs(outputs: Mapping[str, np.ndarray], signature: Signature, *, as_rows: bool) -> bytes:
    """Make the reply to a predict request: `predictions` for the row form, `outputs` for the columnar form.

    Floats are written with the fewest digits that their own dtype needs, whole ones with ".0". Strings are written as
    they are, be they UTF-8 or not; those of outputs whose name ends in `_bytes` as `{"b64": ...}`.

    Args:
        outputs: an array for each output of the signature.
        signature: what they came from.
        as_rows: an element per row, the batch along axis 0, rather than an element per output.

    Raises:
        InvalidRequest: an output has a dtype that JSON replies cannot hold, or no rows to reply with.
    """
    if as_rows:
        _check_rows(outputs)
    columns = {name: _encode(array, signature.outputs[name]) for name, array in outputs.items()}
    key = "predictions" if as_rows else "outputs"
    if len(columns) == 1:
        [column] = columns.values()
        if isinstance(column, np.ndarray) and is_large(column):
            # Joined without the interpreter's lock, which orjson holds while it copies: 80 ms for 150 MB.
            return b"".join([f'{{"{key}":'.encode(), *dump_array(column), b"}"])
        return _dump({key: column})
    if not as_rows:
        return _dump({key: {name: _write(column) for name, column in columns.items()}})
    rows = [dict(zip(columns, map(_write, row), strict=True)) for row in zip(*columns.values(), strict=True)]
    return _dump({key: rows})


def _check_rows(outputs: Mapping[str, np.ndarray]) -> None:
    advice = "ask with 'inputs' instead of 'instances' for the outputs as they are"
    row_count = None
    for name, array in outputs.items():
        if not array.ndim:
            raise InvalidRequest(f"Tensor name: {name} has no shape information \n{advice}")
        if not len(array):
            raise InvalidRequest(f"Tensor name: {name} has invalid batch size: 0\n{advice}")
        if row_count is not None and len(array) != row_count:
            raise InvalidRequest(
                f"Tensor name: {name} has inconsistent batch size: {len(array)} expecting: {row_count}\n{advice}"
            )
        row_count = len(array)


def _encode(array: np.ndarray, spec: TensorSpec) -> Any:
    if array.dtype.kind not in _WRITABLE_KINDS or array.dtype == np.float16:
        raise InvalidRequest(f"Failed to write JSON value for tensor type: {dtype_name(spec.dtype)}")
    if array.dtype.kind != "O":
        return np.ascontiguousarray(array) if array.ndim else array[()]
    if spec.name.endswith("_bytes"):
        return _map_strings(array.tolist(), lambda data: {"b64": base64.b64encode(data).decode()})
    return _map_strings(array.tolist(), lambda data: data.decode("utf-8", "surrogateescape"))


def _write(value: Any) -> Any:
    return write_large(value) if isinstance(value, np.ndarray) else value


def _map_strings(value: Any, function: Callable[[bytes], Any]) -> Any:
    return [_map_strings(item, function) for item in value] if isinstance(value, list) else function(value)


def _dump(reply: dict[str, Any]) -> bytes:
    try:
        text: bytes = orjson.dumps(reply, option=orjson.OPT_SERIALIZE_NUMPY)
    except orjson.JSONEncodeError:
        pass  # a string that is not UTF-8
    else:
        if not _has_null(text):  # what orjson makes of a number that is not finite
            return text
    slow = json.dumps(reply, ensure_ascii=False, separators=(",", ":"), default=_to_plain)
    return slow.encode("utf-8", "surrogateescape")


def _has_null(text: bytes) -> bool:
    # In slices, between which other requests have their turn.
    return any(text.find(b"null", start, start + SLICE_BYTES + 3) >= 0 for start in range(0, len(text), SLICE_BYTES))


def _to_plain(value: Any) -> Any:
    return json.loads(value.contents) if isinstance(value, orjson.Fragment) else to_python(value)
