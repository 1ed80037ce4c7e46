"""Removes paths of the server's file system from responses. The log keeps them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

# An absolute path of at least two names, not the end of an address or of a relative path. Kept is its last name.
_NAME = r"""[^\s/:;,'"()<>|]+"""
_PATH = re.compile(rf"(?:(?<![\w/.:~-])|(?<=file://))/(?:{_NAME}/)+({_NAME})/?")


def hide_paths(text: str, known: Mapping[Path, str] | None = None) -> str:
    """Return a message without absolute paths.

    Args:
        text: the message.
        known: folders that may be named in it, absolute or not, each with the words to put in its place.
    """
    for folder, words in (known or {}).items():
        real = os.path.realpath(folder)  # unlike `Path.resolve`, it raises nothing for links in a circle
        for path in sorted({str(folder), str(folder.absolute()), real}, key=len, reverse=True):
            text = re.sub(rf"(?<![\w/.-]){re.escape(path)}(?![\w.-])", words.replace("\\", r"\\"), text)
    return _PATH.sub(r"\1", text)
