"""Reads the boxes of an AVIF file (ISO 14496-12, 23008-12 and the AV1 Image File Format)."""

from __future__ import annotations

import struct
from collections.abc import Iterator

from image_formats.av1 import read_sequence_size
from image_formats.header import ImageHeader

MAX_BOXES = 10_000
MAX_ITEMS = 1_000  # tiles of a grid and their auxiliary images

_AVIF_BRANDS = frozenset({b"avif", b"avis"})
_HEIC_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"})
_CONTAINER_BRANDS = frozenset({b"mif1", b"msf1"})

# Boxes that contain boxes, and the offset of the first one in their content.
_CONTAINERS = {b"meta": 4, b"iprp": 0, b"ipco": 0, b"moov": 0, b"trak": 0, b"mdia": 0, b"minf": 0, b"stbl": 0} | {
    b"stsd": 8,
    b"av01": 78,
}
_MAX_DEPTH = 8
_CHUNK_OFFSETS = {b"stco": 4, b"co64": 8}  # of an animation; the first chunk starts with the first frame


def is_avif(data: bytes) -> bool:
    """Return True if the file starts like the AVIF files that Pillow accepts."""
    brands = _read_brands(data)
    return bool(brands) and brands[0] in _AVIF_BRANDS | _CONTAINER_BRANDS and not _AVIF_BRANDS.isdisjoint(brands)


def is_heic(data: bytes) -> bool:
    """Return True if the file starts like a HEIC file, which many phones write, or another HEIF file."""
    return not is_avif(data) and not (_HEIC_BRANDS | _CONTAINER_BRANDS).isdisjoint(_read_brands(data))


def read_header(data: bytes) -> ImageHeader | None:
    """Read the header of an AVIF file; None if no box declares a size.

    The result is the maximum of all sizes that a box or an AV1 stream declares. The decoder allocates the stream's size
    before scaling, and the file may contain several images, for example tiles or an alpha channel.
    """
    width = height = inside = 0
    sample_bytes = 1
    problem = None
    samples: list[tuple[int, int]] = []  # offset and length of each AV1 stream
    for index, (kind, start, end) in enumerate(_iterate_boxes(data, 0, len(data))):
        if index == MAX_BOXES:
            problem = f"the AVIF file has more than {MAX_BOXES:,} boxes"
            break
        sizes = [(0, 0)]
        if kind == b"ispe" and end - start >= 12:
            sizes.append(struct.unpack_from(">II", data, start + 4))
        elif kind == b"tkhd" and end - start >= 84:
            sizes.append((_uint(data, end - 8, 4) >> 16, _uint(data, end - 4, 4) >> 16))
        elif kind == b"av01" and end - start >= 28:
            sizes.append(struct.unpack_from(">HH", data, start + 24))
        elif kind == b"av1C" and end - start >= 4:
            sample_bytes = max(sample_bytes, 2 if data[start + 2] & 0x40 else 1)
        elif kind == b"iloc":
            places, problem = _read_locations(data, start, end)
            samples += places
        elif kind in _CHUNK_OFFSETS and end - start >= 8 + _CHUNK_OFFSETS[kind]:
            samples.append((_uint(data, start + 8, _CHUNK_OFFSETS[kind]), len(data)))
        elif kind == b"idat":
            inside = start
        width = max(width, *(size[0] for size in sizes))
        height = max(height, *(size[1] for size in sizes))
        if problem:
            break
    view = memoryview(data)
    for offset, size in samples if problem is None else ():
        # Offsets are relative to the file, or to the "idat" box.
        for base in {0, inside}:
            declared = read_sequence_size(view[base + offset : base + offset + size])
            width, height = max(width, declared[0]), max(height, declared[1])
    if not width and problem is None:
        return None
    return ImageHeader("AVIF", width, height, len(data), 4, sample_bytes=sample_bytes, problem=problem)


def _read_locations(data: bytes, start: int, end: int) -> tuple[list[tuple[int, int]], str | None]:
    """Return offset and length of each item in an item location box, or a reason not to decode the file."""
    version = _uint(data, start, 1)
    sizes = _uint(data, start + 4, 2)
    offset_bytes, length_bytes, base_bytes, index_bytes = (sizes >> shift & 15 for shift in (12, 8, 4, 0))
    position = start + 6
    id_bytes = 4 if version == 2 else 2
    count = _uint(data, position, id_bytes)
    position += id_bytes
    if count > MAX_ITEMS:
        return [], f"the AVIF file has more than {MAX_ITEMS:,} items"
    places = []
    for _ in range(count):
        position += id_bytes + (2 if version else 0) + 2
        base = _uint(data, position, base_bytes)
        position += base_bytes
        extents = _uint(data, position, 2)
        position += 2
        if extents > 1 or position > end:
            return [], "the AVIF file has an image in several parts; save it again"
        if extents:
            position += index_bytes if version else 0
            offset = _uint(data, position, offset_bytes)
            length = _uint(data, position + offset_bytes, length_bytes)
            places.append((base + offset, length or len(data)))  # a length of zero means until the end of the file
            position += offset_bytes + length_bytes
    return places, None


def _read_brands(data: bytes) -> list[bytes]:
    """Return the brands of the leading file type box, the major brand first."""
    if data[4:8] != b"ftyp":
        return []
    listed = data[16 : min(_uint(data, 0, 4), 512)]
    return [data[8:12], *(listed[place : place + 4] for place in range(0, len(listed), 4))]


def _iterate_boxes(data: bytes, start: int, end: int, depth: int = 0) -> Iterator[tuple[bytes, int, int]]:
    """Yield type, start and end of each box's content, followed by its child boxes."""
    while start + 8 <= end:
        size, kind = struct.unpack_from(">I4s", data, start)
        content = start + 8
        if size == 1 and content + 8 <= end:
            size = _uint(data, content, 8)
            content += 8
        stop = min(start + size, end) if size else end
        if stop < content:
            return
        yield kind, content, stop
        if kind in _CONTAINERS and depth < _MAX_DEPTH:
            yield from _iterate_boxes(data, content + _CONTAINERS[kind], stop, depth + 1)
        start = stop


def _uint(data: bytes, position: int, size: int) -> int:
    return int.from_bytes(data[position : position + size])
