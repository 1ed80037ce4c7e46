"""JSON as TensorFlow Serving reads and quotes it: the same parser's errors, the same spelling of values."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import numpy as np
import orjson
import rapidjson

from serving.errors import InvalidRequest

# TensorFlow's tensors have at most 254 dimensions; a document nested much deeper than that crashes recursive parsers.
MAX_DEPTH = 600
_QUOTED_DOCUMENT_LENGTH = 256


class NestedTooDeep(InvalidRequest):
    """The document is nested deeper than any tensor can be."""


def parse_document(body: bytes) -> Any:
    """Parse a JSON document.

    `NaN`, `Infinity`, `Inf` and their negatives are numbers, as RapidJSON with its flag for them has it. Where a key
    comes twice in an object that is not a tensor's, the first one counts.

    Raises:
        InvalidRequest: it is no JSON; the message is that of RapidJSON, which TensorFlow Serving uses.
        NestedTooDeep: it could not be a tensor.
    """
    try:
        if not _may_repeat_keys(body):
            return orjson.loads(body)
    except orjson.JSONDecodeError:
        pass  # no JSON, or NaN and the like: the slower parser knows them, and says what is wrong as it should be said
    body = body.removeprefix(b"\xef\xbb\xbf")
    if not body.strip():
        raise InvalidRequest("JSON Parse error: The document is empty")
    if _depth(body) > MAX_DEPTH:
        raise NestedTooDeep(f"nested deeper than {MAX_DEPTH} levels")
    try:
        return _FirstKeyCounts(number_mode=rapidjson.NM_NAN)(body)
    except UnicodeDecodeError as error:
        # What is wrong with the JSON comes before what is wrong with its encoding.
        parse_document(re.sub(rb"[\x80-\xff]", b"?", body))
        raise InvalidRequest(f"JSON Parse error: Invalid encoding in string. at offset: {error.start}") from error
    except ValueError as error:
        where, _, what = str(error).partition(": ")
        raise InvalidRequest(f"JSON Parse error: {what or where} at offset: {where.rsplit(' ', 1)[-1]}") from error


class _FirstKeyCounts(rapidjson.Decoder):
    def start_object(self) -> list[tuple[str, Any]]:
        return []

    def end_object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        return dict(reversed(pairs))


def _may_repeat_keys(body: bytes) -> bool:
    return any(body.count(key) > 1 for key in (b'"instances"', b'"inputs"', b'"signature_name"'))


def _depth(body: bytes) -> int:
    """Return how deep brackets are nested; those inside strings are counted too, which is good enough for a limit."""
    text = np.frombuffer(body, np.uint8)
    opening = ((text == ord("[")) | (text == ord("{"))).astype(np.int8)
    closing = ((text == ord("]")) | (text == ord("}"))).astype(np.int8)
    return int(np.cumsum(opening - closing, dtype=np.int64).max(initial=0))


def quote(value: Any) -> str:
    """Spell a value as TensorFlow Serving's messages do."""
    return _spell(value, indent=0)


def quote_document(document: Any) -> str:
    """Spell a whole request, cut to the length TensorFlow Serving cuts it to."""
    return quote(document)[:_QUOTED_DOCUMENT_LENGTH]


def type_name(value: Any) -> str:
    """Return RapidJSON's name for the type of a value."""
    if value is None:
        return "Null"
    if isinstance(value, bool):
        return str(value)
    names: dict[type, str] = {dict: "Object", list: "Array", str: "String"}
    return names.get(type(value), "Number")


def _spell(value: Any, *, indent: int) -> str:
    # Objects are spread over lines, arrays are not; a number that is not finite is nothing at all.
    if isinstance(value, dict):
        if not value:
            return "{}"
        inner = " " * (indent + 4)
        members = (f"{inner}{json.dumps(key)}: {_spell(item, indent=indent + 4)}" for key, item in value.items())
        return "{\n" + ",\n".join(members) + "\n" + " " * indent + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_spell(item, indent=indent) for item in value) + "]"
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else ""
    return json.dumps(value, ensure_ascii=False)
