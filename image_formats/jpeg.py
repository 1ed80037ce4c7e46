"""Reads the markers of a JPEG file like libjpeg.

libjpeg (`jdmarker.c`, `jdhuff.c`, `jdinput.c`) treats bytes outside of segments as entropy-coded data or skips them as
garbage. Both end at the next 0xFF that is followed by neither 0x00 nor 0xFF. Every SOS outside of a segment, before the
EOI, therefore starts a scan. All of them are counted, even if libjpeg would stop earlier.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from image_formats.header import MAX_JPEG_SCANS, ImageHeader

SIGNATURE = b"\xff\xd8\xff"  # Pillow and TensorFlow both require the first byte of a second marker

MAX_SEGMENTS = 10_000  # 600 MB of metadata in segments of maximum size
MAX_TABLE_BYTES = 1 << 18  # before the first scan; eight Huffman and four quantization tables need 2.5 KB

_SOI, _EOI, _SOS, _APP1 = 0xD8, 0xD9, 0xDA, 0xE1
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOF0 to SOF15, without DHT, JPG and DAC
_METADATA = frozenset(range(0xE0, 0xF0)) | {0xFE}  # APP0 to APP15, and comments

# All markers except TEM and RST0 to RST7: these have no length and are irrelevant here, and may be numerous.
_MARKER = re.compile(rb"\xff[\x02-\xcf\xd8-\xfe]")
# A regex search holds the GIL; other threads can run between two windows.
_WINDOW_BYTES = 1 << 20


def read_header(data: bytes) -> ImageHeader | None:
    """Read the header of a JPEG file; None without a frame before the first scan, which no decoder accepts."""
    width = height = channels = scans = table_bytes = coefficient_bytes = 0
    is_progressive = False
    problem = None
    for index, (code, start, end) in enumerate(_iterate_segments(data)):
        if index == MAX_SEGMENTS:
            problem = f"the JPEG file has more than {MAX_SEGMENTS:,} segments"
            break
        if code == _SOS:
            scans += 1
            if scans == 1:
                is_progressive |= start + 4 < len(data) and data[start + 4] < channels  # some components only
            if scans > MAX_JPEG_SCANS:
                break
        elif code in _FRAMES and start + 9 < min(len(data), end):
            # libjpeg rejects a second frame, but Pillow's own parser uses the last one.
            height = max(height, int.from_bytes(data[start + 5 : start + 7]))
            width = max(width, int.from_bytes(data[start + 7 : start + 9]))
            channels = max(channels, data[start + 9])
            is_progressive |= code & 3 == 2
            coefficient_bytes = max(coefficient_bytes, _coefficient_bytes(data[start + 5 : end]))
        if not scans and code not in _METADATA:
            table_bytes += end - start
            if table_bytes > MAX_TABLE_BYTES:
                problem = "the JPEG file has more tables than it can use"
                break
    if not channels and problem is None:
        return None
    kept_bytes = coefficient_bytes if is_progressive or scans > 1 else 0
    scans = max(1, scans)
    return ImageHeader(
        "JPEG", width, height, len(data), channels, scans=scans, coefficient_bytes=kept_bytes, problem=problem
    )


def keep_pixel_data(data: bytes) -> tuple[bytes, bytes]:
    """Separate the pixel data from the metadata, which Pillow would parse in Python even if there is much of it.

    Returns:
        The file without comments and application segments except JFIF and Adobe; and the content of the EXIF segment,
        or empty bytes. Both are empty without a scan.
    """
    parts = [data[:2]]
    exif = b""
    for code, start, end in _iterate_segments(data):
        if code == _SOS:
            parts.append(data[start:])
            return b"".join(parts), exif
        if code == _APP1 and not exif and data.startswith(b"Exif\0\0", start + 4):
            exif = data[start + 4 : end]
        if code not in _METADATA or data.startswith((b"JFIF", b"Adobe"), start + 4):
            parts.append(data[start:end])
    return b"", b""


def _iterate_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield marker, start and end of each segment until the end of the first image."""
    position = 2  # after the first marker
    has_scan = False
    while (start := _find_marker(data, position)) >= 0:
        code = data[start + 1]
        position = start + 2
        if code >= 0xC0 and code not in (_SOI, _EOI):
            position += max(2, int.from_bytes(data[position : position + 2]))
        elif code == _EOI and has_scan:
            return  # an EOI before a scan ends a stream of tables; Pillow continues with the next image
        has_scan |= code == _SOS
        yield code, start, position


def _find_marker(data: bytes, start: int) -> int:
    while start < len(data):
        end = start + _WINDOW_BYTES
        if found := _MARKER.search(data, start, end + 1):
            return found.start()
        start = end
    return -1


def _coefficient_bytes(frame: bytes) -> int:
    """Return the size of a frame's coefficients: two bytes each, in blocks of 8 x 8, for each component.

    Args:
        frame: the SOF segment after the precision: height, width, number of components, three bytes per component.
    """
    height, width, count = int.from_bytes(frame[:2]), int.from_bytes(frame[2:4]), frame[4]
    factors = [(byte >> 4 or 1, byte & 15 or 1) for byte in frame[6::3][:count]]
    widest, tallest = (max((factor[axis] for factor in factors), default=1) for axis in (0, 1))
    columns, rows = -(-width // (8 * widest)), -(-height // (8 * tallest))
    return sum(columns * across * rows * down * 128 for across, down in factors)
