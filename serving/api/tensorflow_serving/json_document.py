"""JSON like in TensorFlow Serving: parsed and quoted in messages as RapidJSON does it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import numpy as np
import orjson
import rapidjson

from serving.errors import InvalidRequest

# TensorFlow's tensors have at most 254 dimensions. A document nested much deeper crashes recursive parsers.
MAX_DEPTH = 300
_QUOTED_DOCUMENT_BYTES = 256
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_ASCII = bytes(code if code < 128 else ord("?") for code in range(256))
_MAX_KEYS_COUNTED = 64  # parsing again is faster than counting more keys
_BASE64_KEY = b'"b64"'
_STRING_START = re.compile(rb'[ \t\r\n]*:[ \t\r\n]*"')
_OBJECT_END = re.compile(rb"[ \t\r\n]*\}")
_ESCAPED_LETTER = re.compile(rb"\\u00[2-7]")  # may be part of a key


def parse_document(body: bytes) -> Any:
    """Parse a JSON document, accepting what RapidJSON accepts with its flag for `NaN`.

    `NaN`, `Infinity`, `Inf` and their negatives are numbers. The first of repeated keys counts, in the document, in
    `inputs` and in the objects of `instances`. An object that repeats "b64" is not base64. Bytes that are not UTF-8
    become lone surrogates ("surrogateescape").

    Raises:
        InvalidRequest: the body is not JSON, with the message of RapidJSON, which TensorFlow Serving uses; or it is
            nested deeper than MAX_DEPTH.
    """
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        # Invalid JSON, or NaN/Infinity: fall back to RapidJSON, which accepts those and has the error messages.
        return _parse_with_rapidjson(body)
    return _parse_with_rapidjson(body) if _may_repeat_keys(document, body) else document


def _may_repeat_keys(document: Any, body: bytes) -> bool:
    """Return whether the body has a key of the request or of its tensors more often than the parsed document."""
    if not isinstance(document, dict):
        return False
    if _has_repeated_base64(body) or (b"\\u00" in body and _ESCAPED_LETTER.search(body)):
        return True
    counts = dict.fromkeys(document, 1)
    inputs, instances = document.get("inputs"), document.get("instances")
    if isinstance(inputs, dict):
        for key in inputs:
            counts[key] = counts.get(key, 0) + 1
    if isinstance(instances, list) and instances and isinstance(instances[0], dict):
        for key in instances[0]:
            counts[key] = counts.get(key, 0) + len(instances)
    return len(counts) > _MAX_KEYS_COUNTED or any(
        body.count(b'"%b"' % key.encode()) > count for key, count in counts.items()
    )


def _has_repeated_base64(body: bytes) -> bool:
    """Return whether an object may repeat "b64": the value after the key is not a string that ends the object."""
    start = body.find(_BASE64_KEY)
    while start >= 0:
        string = _STRING_START.match(body, start + len(_BASE64_KEY))
        end = body.find(b'"', string.end()) + 1 if string else 0
        if not end or not _OBJECT_END.match(body, end) or body.find(b"\\", start, end) >= 0:
            return True
        start = body.find(_BASE64_KEY, end)
    return False


def _parse_with_rapidjson(body: bytes) -> Any:
    if not body:
        raise InvalidRequest("JSON Parse error: The document is empty")
    text = body.removeprefix(_BYTE_ORDER_MARK)
    skipped = len(body) - len(text)
    if _depth(text) > MAX_DEPTH:
        raise InvalidRequest(f"JSON Parse error: the document is nested deeper than {MAX_DEPTH} levels")
    mode: int = rapidjson.NM_NAN
    if re.search(rb"[0-9]{309}", text):
        mode |= rapidjson.NM_NATIVE  # reports numbers too big for a double, but may round others differently
    try:
        document = _FirstKeyCounts(number_mode=mode)(text)
    except UnicodeDecodeError:
        return _parse_as_bytes(text, skipped)
    except ValueError as error:
        where, _, what = str(error).partition(": ")
        raise _parse_error(what, skipped + int(where.rsplit(" ", 1)[-1])) from error
    if b"\0" in text:  # RapidJSON stops there
        raise _parse_error("The document root must not be followed by other values.", skipped + text.index(b"\0"))
    return document


class _FirstKeyCounts(rapidjson.Decoder):
    def start_object(self) -> list[tuple[str, Any]]:
        return []

    def end_object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        return _first_of_each(pairs)


def _first_of_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    return members if len(members) == len(pairs) else RepeatedKeys(pairs)


def _parse_as_bytes(text: bytes, skipped: int) -> Any:
    """Parse a document that is not UTF-8: TensorFlow Serving does not validate it, and a string is bytes."""
    # An ASCII document of the same length and structure gives RapidJSON's syntax errors.
    _parse_with_rapidjson(b" " * skipped + text.translate(_ASCII))
    try:
        return json.loads(text.decode("utf-8", "surrogateescape"), object_pairs_hook=_first_of_each)
    except ValueError as error:  # `Inf`, which Python's parser does not accept
        raise InvalidRequest("JSON Parse error: the document is not UTF-8") from error


def _parse_error(what: str, offset: int) -> InvalidRequest:
    if what == "Invalid encoding in string.":  # a control character, for which RapidJSON 1.1 has another message
        what = "Invalid escape character in string."
    return InvalidRequest(f"JSON Parse error: {what} at offset: {offset}")


def _depth(text: bytes) -> int:
    """Return the nesting depth of the brackets. Those inside strings count too, which is good enough for a limit."""
    symbols = np.frombuffer(text, np.uint8)
    opening = ((symbols == ord("[")) | (symbols == ord("{"))).astype(np.int8)
    closing = ((symbols == ord("]")) | (symbols == ord("}"))).astype(np.int8)
    return int(np.cumsum(opening - closing, dtype=np.int64).max(initial=0))


class RepeatedKeys(dict[str, Any]):
    """An object with repeated keys. The first of equal keys counts; messages quote all members."""

    def __init__(self, members: list[tuple[str, Any]]) -> None:
        super().__init__(reversed(members))
        self.members = members


class _NotWritable(Exception):  # noqa: N818
    """A number is not finite; RapidJSON's writer stops there."""


def document_error(document: Any, why: str) -> InvalidRequest:
    """Return the error about a request document, which it quotes and truncates like TensorFlow Serving."""
    return InvalidRequest(f"JSON Value: {quote_json(document, max_bytes=_QUOTED_DOCUMENT_BYTES)} {why}")


def quote_json(value: Any, *, max_bytes: int | None = None) -> str:
    """Return a value as TensorFlow Serving's messages quote it."""
    pieces: list[str] = []
    length = 0
    try:
        for piece in _pieces(value, "\n"):
            pieces.append(piece)
            length += len(piece)
            if max_bytes is not None and length >= max_bytes:
                break
    except _NotWritable:
        pass
    except RecursionError as error:
        raise InvalidRequest("JSON Value: the objects are nested deeper than any tensor") from error
    return "".join(pieces).encode("utf-8", "replace")[:max_bytes].decode("utf-8", "ignore")


def type_name(value: Any) -> str:
    """Return RapidJSON's name for the type of a value."""
    if value is None:
        return "Null"
    if isinstance(value, bool):
        return str(value)
    names: dict[type, str] = {dict: "Object", list: "Array", str: "String"}
    return names.get(type(value), "Number")


def replace_surrogates(text: str) -> str:
    """Replace the surrogates of bytes that are not UTF-8, so that the text can be encoded in a response."""
    return text.encode("utf-8", "replace").decode()


def _pieces(value: Any, line: str) -> Iterator[str]:
    """Yield the text of a value in pieces; `line` is a line break with the current indentation."""
    if isinstance(value, dict):
        inner = line + "    "
        members = value.members if isinstance(value, RepeatedKeys) else value.items()
        for index, (key, item) in enumerate(members):
            yield ("{" if index == 0 else ",") + inner + _string(key) + ": "
            yield from _pieces(item, inner)
        yield line + "}" if value else "{}"
    elif isinstance(value, list):
        yield "["
        for index, item in enumerate(value):
            if index:
                yield ", "
            yield from _pieces(item, line)
        yield "]"
    elif isinstance(value, float) or (isinstance(value, int) and not -(2**63) <= value < 2**64):
        yield _float(float(value))
    elif isinstance(value, str):
        yield _string(value)
    else:
        yield rapidjson.dumps(value)


def _string(text: str) -> str:
    return rapidjson.dumps(replace_surrogates(text), ensure_ascii=False)


def _float(number: float) -> str:
    """Format a float like `internal/dtoa.h` of RapidJSON."""
    if not math.isfinite(number):
        raise _NotWritable
    digits = Decimal(repr(number)).normalize()
    if -6 <= digits.adjusted() < 21:
        text = f"{digits:f}"
        return text if "." in text else text + ".0"
    return f"{digits:e}".replace("e+", "e")
