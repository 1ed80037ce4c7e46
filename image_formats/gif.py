"""Reads the blocks of a GIF file (GIF89a specification)."""

from __future__ import annotations

from image_formats.header import ImageHeader

SIGNATURE = b"GIF8"  # TensorFlow accepts any version

MAX_SUB_BLOCKS = 1_000_000  # of up to 255 bytes each
MAX_LEADING_SUB_BLOCKS = 10_000  # before the first frame; Pillow reads them in Python

_IMAGE, _EXTENSION = 0x2C, 0x21


def read_header(data: bytes) -> ImageHeader | None:
    """Read the header of a GIF file and count its frames; None if the file ends before the first frame."""
    if len(data) < 13:
        return None
    width, height = _uint16(data, 6), _uint16(data, 8)
    position = 13 + _palette_bytes(data[10])
    frames = sub_blocks = 0
    problem = None
    try:
        while (kind := data[position]) in (_IMAGE, _EXTENSION):
            if kind == _IMAGE:
                # Decoders enlarge the canvas for a frame that exceeds it.
                width = max(width, _uint16(data, position + 1) + _uint16(data, position + 5))
                height = max(height, _uint16(data, position + 3) + _uint16(data, position + 7))
                frames += 1
                position += 11 + _palette_bytes(data[position + 9])
            else:
                position += 2
            while size := data[position]:
                position += 1 + size
                sub_blocks += 1
                if sub_blocks > (MAX_SUB_BLOCKS if frames else MAX_LEADING_SUB_BLOCKS):
                    raise ValueError("the GIF file has too many blocks")
            position += 1
            sub_blocks += 1
    except IndexError:
        pass  # truncated; decoders return the complete frames
    except ValueError as error:
        problem = str(error)
    if not frames and problem is None:
        return None
    return ImageHeader("GIF", width, height, len(data), 1, frames=frames, problem=problem)


def _uint16(data: bytes, position: int) -> int:
    return int.from_bytes(data[position : position + 2], "little")


def _palette_bytes(flags: int) -> int:
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0
