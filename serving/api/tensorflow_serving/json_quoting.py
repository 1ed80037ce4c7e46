"""Quotes JSON values like TensorFlow Serving's messages: RapidJSON's pretty printer with single-line arrays."""

from __future__ import annotations

import math
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import rapidjson

from serving.errors import InvalidRequest

_QUOTED_DOCUMENT_BYTES = 256


class RepeatedKeys(dict[str, Any]):
    """An object with repeated keys. The first of equal keys counts; messages quote all members."""

    def __init__(self, members: list[tuple[str, Any]]) -> None:
        super().__init__(reversed(members))
        self.members = members


class _NotWritable(Exception):  # noqa: N818
    """A number is not finite; RapidJSON's writer stops there."""


def quote_document(document: Any) -> str:
    """Return a request document, quoted and truncated like in TensorFlow Serving's messages."""
    return quote_json(document, max_bytes=_QUOTED_DOCUMENT_BYTES)


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
