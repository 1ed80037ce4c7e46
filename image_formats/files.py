"""Finds image files in folders."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

from image_formats.content import HEAD_BYTES, name_format

MAX_FILE_BYTES = 64 << 20  # of an image to classify; the service's default maximum for one request
# Files with these suffixes count as images even if their content is not an image, so that damaged ones are reported.
IMAGE_SUFFIXES = frozenset({".avif", ".bmp", ".gif", ".heic", ".jpeg", ".jpg", ".png", ".webp"})
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


def has_image_suffix(name: str) -> bool:
    """Return True if a file's name ends like that of an image."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES  # noqa: PTH122 - creating a Path for each file is slow


def find_image_files(folder: str, *, on_error: Callable[[OSError], None]) -> Iterator[str]:
    """Yield the image files in a folder and below, sorted: the files of each level, then its folders.

    Image files are recognised by their content or their suffix. Hidden files and those of file managers and file
    systems are skipped.

    Args:
        folder: searched to any depth; symbolic links to folders are not followed.
        on_error: called with the error of each folder that cannot be listed.
    """
    for parent, folders, files in os.walk(folder, onerror=on_error):
        folders[:] = sorted(name for name in folders if not is_system_name(name))
        for name in sorted(files):
            path = os.path.join(parent, name)  # noqa: PTH118 - as above
            if not is_system_name(name) and (has_image_suffix(name) or is_image_file(path)):
                yield path
