"""Detects the type of a file that is not a dataset, and says how to use it."""

from __future__ import annotations

import zipfile
from pathlib import Path

_HEAD_BYTES = 1024
_UNPACK = "unpack it, and name the folder"
_SAVE_AS_FILES = "save its images as files, in a folder for each class, and name the folder"
_KINDS = (
    (b"7z\xbc\xaf\x27\x1c", f"is a 7z archive: {_UNPACK}"),
    (b"Rar!\x1a\x07", f"is a RAR archive: {_UNPACK}"),
    (b"\x93NUMPY", f"is a NumPy array (.npy), which is not supported: {_SAVE_AS_FILES}"),
    (b"\x89HDF\r\n\x1a\n", f"is an HDF5 file, which is not supported: {_SAVE_AS_FILES}"),
    (b"PAR1", f"is a Parquet file, which is not supported: {_SAVE_AS_FILES}"),
    (b"\xff\xd8\xff", "is a single image: name the folder of all images"),
    (b"\x89PNG\r\n\x1a\n", "is a single image: name the folder of all images"),
)
_TAR = ((0, b"\x1f\x8b"), (0, b"BZh"), (0, b"\xfd7zXZ\0"), (257, b"ustar"))
_MARKUP = (b"<!doctype", b"<html", b"<head", b"<?xml")


def describe_foreign_file(path: Path) -> str | None:
    """Describe a file that is not a tar archive, for a message that starts with its name.

    Returns:
        `None` for a possible tar archive, and for an unknown type.
    """
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    except OSError:
        return None
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return _describe_zip(path)
    if head.lstrip().lower().startswith(_MARKUP):
        return "is a web page and not the data: the download went wrong; fetch it again"
    if head[:1] == b"\x80" and head[1:2] in b"\2\3\4\5" and len(head) > 2:
        return "is a pickle file: if it is a batch of CIFAR-10, name the folder that holds all six"
    return next((kind for start, kind in _KINDS if head.startswith(start)), None)


def describe_file(path: Path) -> str:
    """Describe a file that was named instead of a folder, for a message that starts with its name."""
    if kind := describe_foreign_file(path):
        return kind
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    if any(head.startswith(start, offset) for offset, start in _TAR):
        return f"is a compressed or tar archive: {_UNPACK}"
    return "is an empty file: name a folder" if not head else "is a file: name a folder"


def _describe_zip(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError):
        return "is a zip archive, and damaged: fetch it again, unpack it, and name the folder"
    if names and all(name.endswith(".npy") for name in names):
        arrays = ", ".join(name.removesuffix(".npy") for name in names[:4])
        return f"is a NumPy archive (.npz, of {arrays}), which is not supported: {_SAVE_AS_FILES}"
    return f"is a zip archive: {_UNPACK}"
