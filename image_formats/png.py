"""Reads the chunks of a PNG file (PNG specification, section 5)."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

from image_formats.exif import MAX_EXIF_BYTES
from image_formats.header import ImageHeader, UnreadableImage

SIGNATURE = b"\x89PNG\r\n\x1a\n"

MAX_CHUNKS = 100_000  # libpng writes chunks of 8 KiB
# libpng inflates a text chunk or a colour profile up to 8 MB (PNG_USER_CHUNK_MALLOC_MAX), and keeps 1,000 of them.
MAX_INFLATED_BYTES = 8_000_000
MAX_DEFLATE_RATIO = 1032

_CHUNK = struct.Struct(">I4s")
_IHDR = struct.Struct(">IIBBBBB")
GREY, RGB, PALETTE = 0, 2, 3  # colour types
_CHANNELS = {GREY: 1, RGB: 3, PALETTE: 1, 4: 2, 6: 4}
_CRITICAL = (b"IHDR", b"PLTE", b"IDAT", b"IEND")


def read_header(data: bytes) -> ImageHeader | None:
    """Read the header of a PNG file; None without an IHDR chunk."""
    header: tuple[int, ...] | None = None
    metadata_bytes = 0
    problem = None
    is_copied = False  # compositing and rotation copy the image, as for an alpha channel
    for index, (kind, start, end) in enumerate(_iterate_chunks(data)):
        if index == MAX_CHUNKS:
            problem = f"the PNG file has more than {MAX_CHUNKS:,} chunks"
            break
        size = end - start
        if kind == b"IHDR" and header is None and size >= _IHDR.size and len(data) >= start + _IHDR.size:
            header = _IHDR.unpack_from(data, start)
        elif kind in (b"zTXt", b"iCCP") or (kind == b"iTXt" and _is_compressed(data, start)):
            metadata_bytes += min(MAX_INFLATED_BYTES, size * MAX_DEFLATE_RATIO)
        elif kind not in (b"IDAT", b"PLTE"):
            is_copied |= kind in (b"tRNS", b"eXIf")
            metadata_bytes += size
    if header is None:
        if problem is None:
            return None
        header = (0,) * 7  # it may follow after MAX_CHUNKS
    width, height, depth, colour_type, *_ = header
    channels = 4 if colour_type == RGB and is_copied else _CHANNELS.get(colour_type, 4)
    depth_bytes = 1 if depth <= 8 else 2
    return ImageHeader(
        "PNG", width, height, len(data), channels, depth_bytes, metadata_bytes=metadata_bytes, problem=problem
    )


def keep_pixel_data(data: bytes) -> tuple[bytes, bytes, bytes]:
    """Separate the pixel data from the metadata, which may be long or damaged.

    Pillow reads chunks and metadata in Python, which is slow if there are many, and refuses long text and damaged
    metadata. The critical chunks are checked like in libpng, so that the exported model refuses the same files.

    Returns:
        The file without metadata and with a single IDAT chunk; the content of the eXIf chunk, or empty bytes; and that
        of a valid tRNS chunk, or empty bytes.

    Raises:
        UnreadableImage: a critical chunk is damaged, missing or unknown.
    """
    view = memoryview(data)
    kept: dict[bytes, memoryview] = {}  # whole chunks
    content: dict[bytes, bytes] = {}
    pixels: list[memoryview] = []
    kind = b""
    for index, (kind, start, end) in enumerate(_iterate_chunks(data)):
        if (kind == b"IHDR") != (index == 0):
            raise UnreadableImage("the image is damaged: its header is not the first chunk of the PNG file")
        if not kind.isalpha():
            raise UnreadableImage("the image is damaged: the PNG file has a chunk without a name")
        is_critical = not kind[0] & 0x20
        is_whole = end + 4 <= len(data) and zlib.crc32(view[start - 4 : end]) == int.from_bytes(view[end : end + 4])
        if is_critical and not is_whole:
            raise UnreadableImage("the image is damaged or cut off: a chunk of the PNG file has a wrong checksum")
        if is_critical and (kind not in _CRITICAL or kind in kept):
            raise UnreadableImage(f"the image is damaged: the PNG file has an unexpected chunk {kind!r}")
        if kind == b"IDAT":
            pixels.append(view[start:end])
        elif kind in (b"IHDR", b"PLTE") and not (kind == b"PLTE" and pixels):
            kept[kind] = view[start - _CHUNK.size : end + 4]
        elif kind == b"eXIf" and not pixels:
            content.setdefault(kind, bytes(view[start : min(end, start + MAX_EXIF_BYTES)]))
        elif kind == b"tRNS" and not pixels and is_whole and _is_transparency(kept, end - start):
            content.setdefault(kind, bytes(view[start:end]))
    if kind != b"IEND" or not pixels:
        raise UnreadableImage("the image is cut off: the PNG file has no end")
    if _colour_type(kept) == PALETTE and b"PLTE" not in kept:
        raise UnreadableImage("the image is damaged: the PNG file has no palette")
    joined = b"".join((b"IDAT", *pixels))
    # A chunk is its length, its type and content (`joined`), and a checksum.
    body = (struct.pack(">I", len(joined) - 4), joined, struct.pack(">I", zlib.crc32(joined)))
    file = (SIGNATURE, kept[b"IHDR"], kept.get(b"PLTE", b""), *body, b"\0\0\0\0IEND\xae\x42\x60\x82")
    return b"".join(file), content.get(b"eXIf", b""), content.get(b"tRNS", b"")


def _colour_type(kept: dict[bytes, memoryview]) -> int:
    return kept[b"IHDR"][17]


def _is_transparency(kept: dict[bytes, memoryview], size: int) -> bool:
    """Return True if libpng applies a tRNS chunk of this size; it silently ignores other sizes."""
    colour_type = _colour_type(kept)
    if colour_type == PALETTE:
        return b"PLTE" in kept and 0 < size <= (len(kept[b"PLTE"]) - 12) // 3
    return size == {GREY: 2, RGB: 6}.get(colour_type)


def is_opaque_and_upright(data: bytes) -> bool:
    """Return True if a PNG file has neither alpha, transparency nor an orientation; may return a false negative."""
    return data[25:26] not in (b"\4", b"\6") and b"tRNS" not in data and b"eXIf" not in data


def _is_compressed(data: bytes, start: int) -> bool:
    """Return the compression flag of an iTXt chunk, which follows the keyword of up to 79 bytes."""
    flag = data.find(b"\0", start, start + 80) + 1
    return data[flag : flag + 1] != b"\0"


def _iterate_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield type, start and end of each chunk's content; the end may exceed the file."""
    position = len(SIGNATURE)
    while position + _CHUNK.size <= len(data):
        size, kind = _CHUNK.unpack_from(data, position)
        start = position + _CHUNK.size
        yield kind, start, start + size
        if kind == b"IEND":
            return
        position = start + size + 4
