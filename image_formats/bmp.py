"""Reads the header of a BMP file."""

from __future__ import annotations

import struct

from image_formats.header import ImageHeader

SIGNATURE = b"BM"

MAX_RLE_BYTES = 1 << 20  # Pillow decodes run-length encoding in Python: up to 1 us per run of two bytes

_CORE_HEADER_BYTES = 12
_HEADER_BYTES = (_CORE_HEADER_BYTES, 40, 52, 56, 64, 108, 124)  # Pillow accepts only these, TensorFlow any
_RLE = (1, 2)


def is_bmp(head: bytes) -> bool:
    """Return True if a file starts with a BMP header, not just with the letters "BM"."""
    return head.startswith(SIGNATURE) and len(head) >= 18 and struct.unpack_from("<I", head, 14)[0] in _HEADER_BYTES


def read_header(data: bytes) -> ImageHeader | None:
    """Read the header of a BMP file; None if it is truncated, or is a text that starts with "BM"."""
    if len(data) < 34:
        return None
    offset, header_bytes = struct.unpack_from("<II", data, 10)
    if header_bytes == _CORE_HEADER_BYTES:
        width, height, _, bits = struct.unpack_from("<HHHH", data, 18)
        compression = 0
    else:
        width, height, _, bits, compression = struct.unpack_from("<iiHHI", data, 18)
        width, height = abs(width), abs(height)  # a negative height means that rows are stored from the top
    if header_bytes not in _HEADER_BYTES:
        pixel_bytes = width * height * bits // 8
        if not 0 < pixel_bytes <= len(data) - offset:
            return None
    problem = None
    is_run_length = compression in _RLE
    if is_run_length and len(data) > MAX_RLE_BYTES:
        problem = f"run-length encoded BMP files may have at most {MAX_RLE_BYTES:,} bytes"
    return ImageHeader(
        "BMP", width, height, len(data), max(1, min(4, bits // 8)), is_run_length=is_run_length, problem=problem
    )
