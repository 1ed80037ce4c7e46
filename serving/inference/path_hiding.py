"""Removes paths of the server's file system from responses. The log keeps them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

# An absolute path of at least two names, but not the end of a URL or of a relative path. Its last name is kept.
_NAME = r"""[^\s/:;,'"()<>|]+"""
_PATH = re.compile(rf"(?:(?<![\w/.:~-])|(?<=file://))/(?:{_NAME}/)+({_NAME})/?")


def hide_paths(text: str, known: Mapping[Path, str] | None = None) -> str:
    """Remove absolute paths from a message.

    Args:
        text: the message.
        known: replacement text of each folder, which may be absolute or relative.
    """
    for folder, words in (known or {}).items():
        real = os.path.realpath(folder)  # unlike `Path.resolve`, it accepts circular links
        for path in sorted({str(folder), str(folder.absolute()), real}, key=len, reverse=True):
            text = re.sub(rf"(?<![\w/.-]){re.escape(path)}(?![\w.-])", words.replace("\\", r"\\"), text)
    return _PATH.sub(r"\1", text)
