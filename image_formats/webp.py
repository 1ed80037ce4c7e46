"""Reads the chunks of a WebP file (RFC 9649)."""

from __future__ import annotations

import struct
from collections.abc import Iterator

from image_formats.header import ImageHeader

MAX_CHUNKS = 100_000

_CHUNK = struct.Struct("<4sI")
_FRAME_HEADER_BYTES = 16


def is_webp(data: bytes) -> bool:
    """Return True if the data has the signature of a WebP file."""
    return data.startswith(b"RIFF") and data[8:12] == b"WEBP"


def read_header(data: bytes) -> ImageHeader | None:
    """Read the header of a WebP file and count its frames; None if no chunk declares a size."""
    width = height = frames = 0
    problem = None
    for index, (kind, start, end) in enumerate(_iterate_chunks(data, 12, len(data))):
        if index == MAX_CHUNKS:
            problem = f"the WebP file has more than {MAX_CHUNKS:,} chunks"
            break
        sizes = [_read_size(kind, data[start : start + 10])]
        if kind == b"ANMF":
            frames += 1
            x, y, frame_width, frame_height = (_uint24(data, start + 3 * field) for field in range(4))
            sizes.append((2 * x + frame_width + 1, 2 * y + frame_height + 1))
            inner = _iterate_chunks(data, start + _FRAME_HEADER_BYTES, min(end, len(data)))
            # The image is the frame's first chunk, or the second chunk after an alpha chunk.
            sizes += [_read_size(kind, data[at : at + 10]) for (kind, at, _), _ in zip(inner, range(2), strict=False)]
        width = max(width, *(size[0] for size in sizes), 0)
        height = max(height, *(size[1] for size in sizes), 0)
    if not width and problem is None:
        return None
    return ImageHeader("WEBP", width, height, len(data), 4, frames=max(1, frames), problem=problem)


def _read_size(kind: bytes, content: bytes) -> tuple[int, int]:
    """Return the width and height that the start of a chunk declares, or zeros."""
    if kind == b"VP8X" and len(content) >= 10:
        return _uint24(content, 4) + 1, _uint24(content, 7) + 1
    if kind == b"VP8 " and len(content) >= 10:
        width, height = struct.unpack_from("<HH", content, 6)
        return width & 0x3FFF, height & 0x3FFF  # the upper two bits are a scale
    if kind == b"VP8L" and len(content) >= 5:
        bits = int.from_bytes(content[1:5], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    return 0, 0


def _iterate_chunks(data: bytes, position: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Yield type, start and end of each chunk's content; the end may exceed the file."""
    while position + _CHUNK.size <= end:
        kind, size = _CHUNK.unpack_from(data, position)
        start = position + _CHUNK.size
        yield kind, start, start + size
        position = start + size + (size & 1)


def _uint24(data: bytes, position: int) -> int:
    return int.from_bytes(data[position : position + 3], "little")
