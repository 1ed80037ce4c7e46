"""The orientation that EXIF data declares."""

from __future__ import annotations

import struct

_ORIENTATION = 0x0112
_BYTE_ORDERS = {b"II*\0": "<", b"MM\0*": ">"}
_FORMATS = {3: "H", 4: "I", 6: "b", 8: "h", 9: "i"}  # by the type of a value: SHORT, LONG, SBYTE, SSHORT, SLONG


def read_orientation(exif: bytes) -> int:
    """Return the orientation, 1 (upright) to 8; 1 where it is missing or damaged.

    Only the one tag is read. Pillow's parser copies the values of all of them, and 64 KB can hold 5,000 tags that
    share a value of 60 KB.

    Args:
        exif: a TIFF header and its directories, with or without "Exif" and two zeros in front.
    """
    start = 6 if exif.startswith(b"Exif\0\0") else 0
    order = _BYTE_ORDERS.get(exif[start : start + 4])
    if order is None:
        return 1
    orientation = 1
    try:
        (directory,) = struct.unpack_from(order + "I", exif, start + 4)
        (count,) = struct.unpack_from(order + "H", exif, start + directory)
        for index in range(count):
            entry = start + directory + 2 + 12 * index
            tag, kind, values = struct.unpack_from(order + "HHI", exif, entry)
            if tag == _ORIENTATION and values == 1 and kind in _FORMATS:
                (orientation,) = struct.unpack_from(order + _FORMATS[kind], exif, entry + 8)
    except struct.error:  # it is cut off
        pass
    return orientation if 1 <= orientation <= 8 else 1
