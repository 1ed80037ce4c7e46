"""Quotes values of requests and files in messages."""

from __future__ import annotations

from typing import Any

import orjson

MAX_QUOTED_CHARACTERS = 60


def quote(value: Any) -> str:
    """Return a value of a request for an error message; long values are abbreviated."""
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, str) and len(value) > MAX_QUOTED_CHARACTERS:
        return quote(value[:MAX_QUOTED_CHARACTERS]) + "..."
    return orjson.dumps(value).decode()


def printable(text: str) -> str:
    """Return text as valid Unicode; escapes lone surrogates and the bytes of file names that are not UTF-8."""
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:
        return text.encode("utf-8", "backslashreplace").decode("utf-8")
