"""Messages: quotes values of requests and files, and removes paths of the server's file system."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson

MAX_QUOTED_CHARACTERS = 60

# An absolute path of at least two names, but not the end of a URL or of a relative path. Its last name is kept.
_NAME = r"""[^\s/:;,'"()<>|]+"""
_PATH = re.compile(rf"(?:(?<![\w/.:~-])|(?<=file://))/(?:{_NAME}/)+({_NAME})/?")


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


def hide_paths(text: str, known: Mapping[Path, str] | None = None) -> str:
    """Remove absolute paths from a message of a response; the log keeps them.

    Args:
        text: the message.
        known: replacement text of each folder, which may be absolute or relative.
    """
    for folder, words in (known or {}).items():
        real = os.path.realpath(folder)  # unlike `Path.resolve`, it accepts circular links
        for path in sorted({str(folder), str(folder.absolute()), real}, key=len, reverse=True):
            text = re.sub(rf"(?<![\w/.-]){re.escape(path)}(?![\w.-])", words.replace("\\", r"\\"), text)
    return _PATH.sub(r"\1", text)
