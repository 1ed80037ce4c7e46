"""Limits on encoded images, checked with their headers before decoding. Imports neither Pillow nor TensorFlow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from image_formats.header import MAX_JPEG_SCANS, ImageHeader
from serving.errors import InvalidRequest, TooLarge

Decoder = Literal["pillow", "tensorflow"]

# Every scan of a JPEG processes every pixel, so scans times pixels is limited to `max_pixels` times this number. 49
# megapixels take 2 s with 20 scans, and 9 s with 100.
FULL_SIZE_SCANS = 20

# giflib rebuilds its tables for every frame, even a small one.
MAX_FRAMES = 10_000

# libpng inflates every text chunk, although decoders drop it: 300 chunks in a file of 2 MB take 16 s and 2 GB.
MAX_METADATA_BYTES = 32_000_000


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """Maximum size of an encoded image."""

    max_pixels: int
    max_side: int


def check_image(header: ImageHeader, limits: ImageLimits, *, decoder: Decoder) -> None:
    """Refuse an image that is too large or too slow to decode.

    Args:
        header: the file's header.
        limits: the service's limits.
        decoder: the library that decodes the file. Pillow decodes only the first frame of an animation, and gets no
            metadata; TensorFlow decodes all frames and metadata.

    Raises:
        TooLarge: the image has too many pixels, frames or metadata, or a side is too long.
        InvalidRequest: the image has no pixels, or too many scans or other parts.
    """
    size = f"{header.width} x {header.height} pixels"
    if header.problem:
        raise InvalidRequest(header.problem)
    if not header.pixels:
        raise InvalidRequest(f"the picture has {size}: there is nothing to decode")
    if header.pixels > limits.max_pixels:
        raise TooLarge(f"the picture has {size}: at most {limits.max_pixels:,} in all are allowed")
    if max(header.width, header.height) > limits.max_side:
        raise TooLarge(f"the picture has {size}: a side may have at most {limits.max_side:,}")
    if header.scans > MAX_JPEG_SCANS:
        raise InvalidRequest(f"the JPEG file has more than {MAX_JPEG_SCANS} scans; save it with fewer")
    if header.scans > 1 and header.pixels * header.scans > limits.max_pixels * FULL_SIZE_SCANS:
        most = limits.max_pixels * FULL_SIZE_SCANS // header.pixels
        raise InvalidRequest(
            f"the JPEG file has {header.scans} scans; with {size} it may have at most {most}. Save it with fewer"
        )
    if decoder == "tensorflow":
        if header.frames > MAX_FRAMES:
            raise TooLarge(f"the animation has {header.frames:,} frames: at most {MAX_FRAMES:,} are allowed")
        if header.pixels * header.frames > limits.max_pixels:
            raise TooLarge(
                f"the animation has {header.frames:,} frames of {size}: at most {limits.max_pixels:,} in all are "
                "allowed"
            )
        if header.metadata_bytes > MAX_METADATA_BYTES:
            raise TooLarge("the PNG file has too much compressed text in its metadata; remove the metadata")
