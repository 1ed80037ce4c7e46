"""JSON as TensorFlow Serving reads it: the same parser's leniency, the same parser's errors."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import orjson
import rapidjson

from serving.api.tensorflow_serving.json_quoting import RepeatedKeys
from serving.errors import InvalidRequest

# TensorFlow's tensors have at most 254 dimensions; a document nested much deeper than that crashes recursive parsers.
MAX_DEPTH = 300
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_ASCII = bytes(code if code < 128 else ord("?") for code in range(256))
_MAX_KEYS_COUNTED = 64
_BASE64_KEY = b'"b64"'
_STRING_START = re.compile(rb'[ \t\r\n]*:[ \t\r\n]*"')
_OBJECT_END = re.compile(rb"[ \t\r\n]*\}")
_ESCAPED_LETTER = re.compile(rb"\\u00[2-7]")  # keys may be spelled with them
_CONTROL_CHARACTER = "Invalid encoding in string."


def parse_document(body: bytes) -> Any:
    """Parse a JSON document, taking what RapidJSON takes with its flag for `NaN`, and nothing after the document.

    `NaN`, `Infinity`, `Inf` and their negatives are numbers. Of the keys of the document, of `inputs` and of the
    objects in `instances`, the first counts where one comes twice; an object with "b64" twice is not base64. Bytes in
    strings that are not UTF-8 are kept, as lone surrogates ("surrogateescape").

    Raises:
        InvalidRequest: it is not JSON, and the message is that of RapidJSON, which TensorFlow Serving uses; or it is
            nested deeper than any tensor.
    """
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        # No JSON, or NaN and the like: the slower parser knows them, and says what is wrong as it should be said.
        return _parse_with_rapidjson(body)
    return _parse_with_rapidjson(body) if _may_repeat_keys(document, body) else document


def _may_repeat_keys(document: Any, body: bytes) -> bool:
    """Whether a key of the request or of its tensors stands in the body more often than the document shows it."""
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
    if len(counts) > _MAX_KEYS_COUNTED:
        return True  # quicker to parse once more than to look for so many
    return any(body.count(b'"%b"' % key.encode()) > count for key, count in counts.items())


def _has_repeated_base64(body: bytes) -> bool:
    """Whether an object may have "b64" twice: after one, there is more than a string and the end of the object."""
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
        mode |= rapidjson.NM_NATIVE  # sees what is too big for a float; the last digits of others may suffer
    try:
        document = _FirstKeyCounts(number_mode=mode)(text)
    except UnicodeDecodeError:
        return _parse_as_bytes(text, skipped)
    except ValueError as error:
        where, _, what = str(error).partition(": ")
        raise _parse_error(what, skipped + int(where.rsplit(" ", 1)[-1])) from error
    if b"\0" in text:  # where RapidJSON stops reading
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
    """Parse what is not UTF-8: TensorFlow Serving does not look at the encoding, a string there is bytes."""
    # What is wrong with the JSON is found first, in a document of the same length.
    _parse_with_rapidjson(b" " * skipped + text.translate(_ASCII))
    try:
        return json.loads(text.decode("utf-8", "surrogateescape"), object_pairs_hook=_first_of_each)
    except ValueError as error:  # the spelling Inf, which this parser does not know
        raise InvalidRequest("JSON Parse error: the document is not UTF-8") from error


def _parse_error(what: str, offset: int) -> InvalidRequest:
    if what == _CONTROL_CHARACTER:  # RapidJSON 1.1, which TensorFlow Serving has, says this of a control character
        what = "Invalid escape character in string."
    return InvalidRequest(f"JSON Parse error: {what} at offset: {offset}")


def _depth(text: bytes) -> int:
    """Return how deep brackets are nested; those inside strings are counted too, which is good enough for a limit."""
    symbols = np.frombuffer(text, np.uint8)
    opening = ((symbols == ord("[")) | (symbols == ord("{"))).astype(np.int8)
    closing = ((symbols == ord("]")) | (symbols == ord("}"))).astype(np.int8)
    return int(np.cumsum(opening - closing, dtype=np.int64).max(initial=0))
