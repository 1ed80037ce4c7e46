"""Chunks of a PNG file (the PNG specification, section 5)."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

from serving.image_formats.header import ImageHeader

SIGNATURE = b"\x89PNG\r\n\x1a\n"

MAX_CHUNKS = 100_000  # libpng writes 8 KiB in each
# libpng inflates a chunk of text or a colour profile up to 8 MB (PNG_USER_CHUNK_MALLOC_MAX), and keeps 1,000 of them.
MAX_INFLATED_BYTES = 8_000_000
MAX_DEFLATE_RATIO = 1032

_CHUNK = struct.Struct(">I4s")
_IHDR = struct.Struct(">IIBBBBB")
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type


def read_header(data: bytes) -> ImageHeader | None:
    """Read the header of a PNG file; None where it has no IHDR chunk."""
    header: tuple[int, ...] | None = None
    metadata_bytes = 0
    problem = None
    for index, (kind, start, end) in enumerate(_iterate_chunks(data)):
        if index == MAX_CHUNKS:
            problem = f"the PNG file has more than {MAX_CHUNKS:,} chunks"
            break
        if kind in (b"IDAT", b"PLTE"):
            continue
        if kind == b"IHDR" and header is None and end - start >= _IHDR.size and len(data) >= start + _IHDR.size:
            header = _IHDR.unpack_from(data, start)
        elif kind in (b"zTXt", b"iCCP") or (kind == b"iTXt" and _is_compressed(data, start)):
            metadata_bytes += min(MAX_INFLATED_BYTES, (end - start) * MAX_DEFLATE_RATIO)
        else:
            metadata_bytes += end - start
    if header is None:
        if problem is None:
            return None
        header = (0,) * 7  # there may be one behind all those chunks
    width, height, depth, colour_type, *_ = header
    return ImageHeader(
        "PNG",
        width,
        height,
        len(data),
        _CHANNELS.get(colour_type, 4),
        sample_bytes=1 if depth <= 8 else 2,
        metadata_bytes=metadata_bytes,
        problem=problem,
    )


def keep_pixel_data(data: bytes) -> bytes:
    """Return the file with only the chunks that the pixels depend on, and those of the image data joined into one.

    Pillow walks the chunks and parses metadata in Python, and a file may consist of either.
    """
    view = memoryview(data)
    header: memoryview | bytes = b""
    palette: memoryview | bytes = b""
    pixels: list[memoryview] = []
    for kind, start, end in _iterate_chunks(data):
        chunk = view[start - _CHUNK.size : end + 4]
        if kind == b"IHDR":
            header = header or chunk
        elif kind == b"PLTE" and not pixels:
            palette = chunk
        elif kind == b"IDAT":
            pixels.append(view[start:end])
    joined = b"".join((b"IDAT", *pixels))
    # Both have the length in front and the CRC behind. Of the end there is nothing to check.
    body = (struct.pack(">I", len(joined) - 4), joined, struct.pack(">I", zlib.crc32(joined)))
    return b"".join((SIGNATURE, header, palette, *(body if pixels else ()), b"\0\0\0\0IEND\xae\x42\x60\x82"))


def _is_compressed(data: bytes, start: int) -> bool:
    """Whether a chunk of international text is compressed: a flag says so behind the keyword of up to 79 bytes."""
    flag = data.find(b"\0", start, start + 80) + 1
    return data[flag : flag + 1] != b"\0"


def _iterate_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield each chunk's type and where its content starts and ends, which may be beyond the end of the file."""
    position = len(SIGNATURE)
    while position + _CHUNK.size <= len(data):
        size, kind = _CHUNK.unpack_from(data, position)
        start = position + _CHUNK.size
        yield kind, start, start + size
        if kind == b"IEND":
            return
        position = start + size + 4
