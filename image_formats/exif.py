"""Reads the orientation from EXIF data."""

from __future__ import annotations

import struct

MAX_EXIF_BYTES = 1 << 16  # maximum size of a JPEG segment; further bytes are ignored

_ORIENTATION = 0x0112
_BYTE_ORDERS = {b"II*\0": "<", b"MM\0*": ">"}
# `struct` format of each value type: BYTE and SBYTE, SHORT and SSHORT, LONG and SLONG. Orientations are not negative.
_FORMATS = {1: "B", 6: "B", 3: "H", 8: "H", 4: "I", 9: "I"}
_ENTRY_BYTES = 12


def read_orientation(exif: bytes) -> int:
    """Return the orientation, 1 (upright) to 8; 1 if it is missing or damaged.

    The exported model reads it in the same way (`training/exporter/exif_orientation.py`). Pillow's parser is
    not used because it copies the values of all tags: 64 KB can contain 5,000 tags that share a value of 60 KB.

    Args:
        exif: a TIFF header and its directories, optionally after the prefix "Exif" and two zero bytes.
    """
    tiff = exif[6 if exif.startswith(b"Exif\0\0") else 0 :][:MAX_EXIF_BYTES]
    order = _BYTE_ORDERS.get(tiff[:4])
    if order is None:
        return 1
    size = len(tiff)
    tiff += bytes(_ENTRY_BYTES)  # pads a truncated entry with zeros
    (directory,) = struct.unpack_from(order + "I", tiff, 4)
    if directory >= size:
        return 1
    (count,) = struct.unpack_from(order + "H", tiff, directory)
    orientation = 1
    for entry in range(directory + 2, min(size, directory + 2 + count * _ENTRY_BYTES), _ENTRY_BYTES):
        tag, kind, values = struct.unpack_from(order + "HHI", tiff, entry)
        if tag == _ORIENTATION and values == 1 and kind in _FORMATS:
            (orientation,) = struct.unpack_from(order + _FORMATS[kind], tiff, entry + 8)
    return orientation if 1 <= orientation <= 8 else 1
