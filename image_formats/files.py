"""Recognises image files in folders."""

from __future__ import annotations

import os

from image_formats.content import HEAD_BYTES, name_format

# Files and folders of file managers, disks and file systems, skipped like hidden ones.
SYSTEM_NAMES = ("thumbs.db", "ehthumbs.db", "desktop.ini", "picasa.ini", "icon\r", "__macosx", "@eadir", "lost+found")


def is_system_name(name: str) -> bool:
    """Return True if the name is that of a hidden file or folder, or of one of a file manager or file system."""
    return name.startswith(".") or name.lower() in SYSTEM_NAMES


def is_image_file(file: str | os.PathLike[str]) -> bool:
    """Return True if a file starts with the signature of an image format; False if it cannot be read."""
    try:
        # Opening a pipe would block until it has a writer. `os.path`, as creating a Path for each file is slow.
        if not os.path.isfile(file):  # noqa: PTH113
            return False
        with open(file, "rb", buffering=0) as stream:  # noqa: PTH123
            return name_format(stream.read(HEAD_BYTES)) is not None
    except OSError:
        return False
