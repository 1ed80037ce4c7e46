"""Encoded images that no camera writes, built from parts."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image


def noise(size: tuple[int, int], mode: str = "RGB", seed: int = 0) -> Image.Image:
    """An image of (width, height) with something in every block."""
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).convert(mode)


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def segment(code: int, content: bytes = b"") -> bytes:
    """A JPEG segment with its length."""
    return struct.pack(">BBH", 0xFF, code, len(content) + 2) + content


def jpeg_of_scans(scans: int, *, size: tuple[int, int] = (64, 64), between: bytes = b"") -> bytes:
    """A progressive JPEG that repeats its last scan, as libjpeg decodes it, until it has so many.

    Args:
        scans: how many.
        size: (width, height) that the header declares.
        between: what comes before every scan that is added.
    """
    file = encode(noise((64, 64)), "JPEG", progressive=True)
    frame = file.index(b"\xff\xc2")
    file = file[: frame + 5] + struct.pack(">HH", size[1], size[0]) + file[frame + 9 :]
    last = file.rindex(b"\xff\xda")
    assert file.endswith(b"\xff\xd9")
    scan = file[last:-2]
    return file[:-2] + (between + scan) * (scans - file.count(b"\xff\xda")) + b"\xff\xd9"


def chunk(kind: bytes, content: bytes) -> bytes:
    """A PNG chunk with its length and CRC."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, *, extra: bytes = b"", rows: int = 0) -> bytes:
    """A black RGB PNG.

    Args:
        width: what the header declares.
        height: likewise.
        extra: chunks between the header and the pixels.
        rows: how many there really are.
    """
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1 + 3 * width) * rows, 9)
    return b"".join((b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", header), extra, chunk(b"IDAT", pixels), chunk(b"IEND", b"")))


def gif(size: tuple[int, int], frames: int, *, frame_size: tuple[int, int] = (1, 1)) -> bytes:
    """A GIF of black frames of one pixel, or with frames that declare more."""
    head = b"GIF89a" + struct.pack("<HHBBB", *size, 0x80, 0, 0) + bytes(6)
    frame = b"," + struct.pack("<HHHHB", 0, 0, *frame_size, 0) + b"\x02\x02\x44\x01\0"
    return head + frame * frames + b";"


def webp_canvas(width: int, height: int, *, frames: int = 0) -> bytes:
    """An extended WebP file that declares a canvas, with frames that hold a pixel each."""
    pixel = encode(Image.new("RGB", (1, 1)), "WEBP", lossless=True)[12:]
    frame = struct.pack("<4sI", b"ANMF", 16 + len(pixel)) + bytes(16) + pixel
    sizes = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    canvas = struct.pack("<4sIBxxx", b"VP8X", 10, 2 if frames else 0) + sizes
    body = b"WEBP" + canvas + (struct.pack("<4sIIH", b"ANIM", 6, 0, 0) + frame * frames if frames else pixel)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def bmp(width: int, height: int) -> bytes:
    """The header of a BMP file and one row."""
    return b"BM" + struct.pack("<IIIIiiHHIIIIII", 0, 0, 54, 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0) + bytes(96)
