"""Reads the boxes of an AVIF file (ISO 14496-12, 23008-12 and the AV1 Image File Format), and its AV1 streams."""

from __future__ import annotations

import struct
from collections.abc import Iterator

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
MAX_UNITS = 1_000  # of an AV1 stream of a still image, with one tile group per unit at most
_SEQUENCE_HEADER = 1
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
            declared = _read_sequence_size(view[base + offset : base + offset + size])
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


def _read_sequence_size(stream: memoryview) -> tuple[int, int]:
    """Return the maximum width and height of the sequence headers in one sample, or zeros."""
    width = height = 0
    position = 0
    for _ in range(MAX_UNITS):
        if position >= len(stream):
            break
        head = stream[position]
        position += 2 if head & 4 else 1
        size = len(stream) - position
        if head & 2:
            size, position = _read_leb128(stream, position)
        if head >> 3 & 15 == _SEQUENCE_HEADER:
            sizes = _read_size(_Bits(stream[position : position + size]))
            width, height = max(width, sizes[0]), max(height, sizes[1])
        position += size
    return width, height


class _Bits:
    """Reads bits, most significant first; bits after the end are zero."""

    def __init__(self, content: memoryview) -> None:
        self._content = bytes(content[:512])
        self._bits = int.from_bytes(self._content)
        self._left = 8 * len(self._content)

    def read(self, count: int) -> int:
        self._left -= count
        shifted = self._bits >> self._left if self._left >= 0 else self._bits << -self._left
        return shifted & ((1 << count) - 1) if self._left > -64 else 0


def _read_size(bits: _Bits) -> tuple[int, int]:
    bits.read(4)  # profile, still picture
    if bits.read(1):  # reduced header
        bits.read(5)
    else:
        _skip_operating_points(bits)
    width_bits, height_bits = bits.read(4) + 1, bits.read(4) + 1
    return bits.read(width_bits) + 1, bits.read(height_bits) + 1


def _skip_operating_points(bits: _Bits) -> None:
    delay_bits = 0
    if bits.read(1):  # timing info
        bits.read(64)
        if bits.read(1):
            zeros = 0
            while zeros < 32 and not bits.read(1):
                zeros += 1
            bits.read(zeros)
        if bits.read(1):  # decoder model
            delay_bits = bits.read(5) + 1
            bits.read(42)
    has_display_delay = bits.read(1)
    for _ in range(bits.read(5) + 1):
        bits.read(12)
        if bits.read(5) > 7:  # only higher levels have tiers
            bits.read(1)
        if delay_bits and bits.read(1):
            bits.read(2 * delay_bits + 1)
        if has_display_delay and bits.read(1):
            bits.read(4)


def _read_leb128(stream: memoryview, position: int) -> tuple[int, int]:
    value = 0
    for index, byte in enumerate(stream[position : position + 8]):
        value |= (byte & 127) << 7 * index
        if not byte & 128:
            return value, position + index + 1
    return value, position + 8
