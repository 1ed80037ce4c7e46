"""Limits on encoded images, checked by what their headers declare before anything is decoded.

Imports neither Pillow nor TensorFlow.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from image_formats.header import MAX_JPEG_SCANS, ImageHeader
from serving.errors import InvalidRequest, TooLarge

Decoder = Literal["pillow", "tensorflow"]

# A scan of a JPEG costs time for every pixel, so a large image may have fewer than MAX_JPEG_SCANS: as many as there
# are in `max_pixels` times this. 49 megapixels take 2 s with 20 scans, and 9 s with 100.
FULL_SIZE_SCANS = 20

# giflib prepares its tables anew for every frame, however small.
MAX_FRAMES = 10_000

# libpng inflates every chunk of text, although no decoder returns it: 300 chunks in a file of 2 MB take 16 s and 2 GB.
MAX_METADATA_BYTES = 32_000_000


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """How large an encoded image may be."""

    max_pixels: int
    max_side: int


def check_image(header: ImageHeader, limits: ImageLimits, *, decoder: Decoder) -> None:
    """Refuse an image that is too large or too slow to decode.

    Args:
        header: what the file declares.
        limits: the service's limits.
        decoder: which library decodes it. Pillow reads only the first frame of an animation and is given no metadata;
            TensorFlow reads all of both.

    Raises:
        TooLarge: it has too many pixels, frames or metadata, or a side that is too long.
        InvalidRequest: it has no pixels, too many scans, or more parts than any image needs.
    """
    size = f"{header.width} x {header.height} pixels"
    if header.problem:
        raise InvalidRequest(header.problem)
    if not header.pixels:
        raise InvalidRequest(f"the picture has {size}: there is nothing to decode")
    if header.pixels > limits.max_pixels:
        raise TooLarge(f"the picture has {size}: at most {limits.max_pixels:,} in all are taken")
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
            raise TooLarge(f"the animation has {header.frames:,} frames: at most {MAX_FRAMES:,} are taken")
        if header.pixels * header.frames > limits.max_pixels:
            raise TooLarge(
                f"the animation has {header.frames:,} frames of {size}: at most {limits.max_pixels:,} in all are taken"
            )
        if header.metadata_bytes > MAX_METADATA_BYTES:
            raise TooLarge("the PNG file has too much compressed text beside the pixels; remove its metadata")
