"""Limits on encoded images, and the memory and time of decoding them, from their headers alone.

The costs were measured with 24-megapixel files of each format, Pillow 13.0 and TensorFlow 2.20: the peak resident set
size (VmHWM) of a process that decodes one file, and the time on one core.
`tests/serving/images/test_decode_cost.py` repeats the measurement.
"""

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

DEFAULT_SIZE = (512, 512)  # (height, width) of an unknown model input

# A decoder's tables and buffers, and the allocator's overhead.
BASE_BYTES = 500_000
ALLOCATOR_FACTOR = 1.05

# Pillow stores images with several channels as four bytes per pixel, and a pointer to each row.
_PILLOW_RGB_BYTES = 4
_ROW_BYTES = 8
# Pillow's resize stores two coefficients of eight bytes for every source row and column.
_RESIZE_BYTES = 16
# libwebp's animation decoder, which Pillow uses for every file, has two canvases; Pillow copies one of them.
_WEBP_CANVAS_BYTES = 8
_WEBP_COPY_BYTES = 4
# libavif holds the planes of the AV1 image, possibly with alpha, and makes two copies of the pixels for Pillow.
_AVIF_SAMPLE_BYTES = 8
_FILE_COPIES = {"JPEG": 1, "PNG": 2, "WEBP": 2, "AVIF": 2}  # without metadata
_STRIP_BYTES = 10_000_000  # numpy's copies of `image_formats.decoding.STRIP_PIXELS` pixels of CMYK

# Time on one server core: per pixel, per byte of the file, per pixel of an additional scan, and per file.
_PIXEL_S = 15e-9  # baseline JPEG 7, progressive JPEG 13 to 18, PNG 6 to 14, GIF 9, BMP 6 ns
_WEBP_PIXEL_S = 30e-9
_FILE_BYTE_S = {"JPEG": 25e-9, "PNG": 25e-9, "WEBP": 25e-9, "AVIF": 160e-9}
_RAW_BYTE_S = 2e-9
_SCAN_PIXEL_S = 2e-9  # even where the scan is empty
_INFLATED_BYTE_S = 10e-9
_RUN_LENGTH_BYTE_S = 500e-9  # Pillow decodes the runs of a BMP in Python
_FILE_S = 50e-6
# TensorFlow's intermediate image has the model's height and the source's width.
_RESIZED_ROWS = 224

QUICK_S = 0.005


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """Maximum size of an encoded image."""

    max_pixels: int
    max_side: int


def check_image(header: ImageHeader, limits: ImageLimits, *, decoder: Decoder) -> None:
    """Refuse an image that is too large or too slow to decode.

    Pillow decodes only the first frame of an animation, and gets no metadata; TensorFlow decodes all frames and
    metadata.

    Raises:
        TooLarge: the image has too many pixels, frames or metadata, or a side is too long.
        InvalidRequest: the image has no pixels, or too many scans or other parts.
    """
    size = f"{header.width} x {header.height} pixels"
    if header.problem:
        raise InvalidRequest(header.problem)
    if not header.pixels:
        raise InvalidRequest(f"the image has {size}: there is nothing to decode")
    if header.pixels > limits.max_pixels:
        raise TooLarge(f"the image has {size}: at most {limits.max_pixels:,} in all are allowed")
    if max(header.width, header.height) > limits.max_side:
        raise TooLarge(f"the image has {size}: a side may have at most {limits.max_side:,}")
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


def decode_cost(header: ImageHeader, *, decoder: Decoder, size: tuple[int, int] = DEFAULT_SIZE) -> int:
    """Estimate the bytes at the peak of decoding a file and resizing the image to `size`, without the file itself.

    The estimate is an upper bound. It assumes that a model that decodes with TensorFlow converts the whole image to
    float32 before resizing. The models that this project exports do not; they need less than half.
    """
    cost = _pillow_cost(header) if decoder == "pillow" else _tensorflow_cost(header, size)
    return int(BASE_BYTES + ALLOCATOR_FACTOR * cost)


def _pillow_cost(header: ImageHeader) -> int:
    """See `serving.images.decoding`: decode the first frame, convert to RGB, apply the orientation, resize."""
    rows = max(header.width, header.height) * _ROW_BYTES  # a rotation swaps rows and columns
    decoded = header.pixels * _pillow_bytes(header) + rows
    converted = header.pixels * _PILLOW_RGB_BYTES + rows
    resized = (header.width + header.height) * _RESIZE_BYTES
    held = canvas_copy = 0
    if header.format == "WEBP":
        held, canvas_copy = header.pixels * _WEBP_CANVAS_BYTES, header.pixels * _WEBP_COPY_BYTES
    if header.format == "AVIF":
        held = header.pixels * header.sample_bytes * _AVIF_SAMPLE_BYTES
    if header.channels == 4 and header.format == "JPEG":
        held = _STRIP_BYTES
    may_be_rotated = header.format in ("JPEG", "WEBP", "AVIF")
    copied = decoded + converted if may_be_rotated or header.channels != 3 else decoded
    return (
        _FILE_COPIES.get(header.format, 0) * header.file_bytes
        + held
        + max(decoded + header.coefficient_bytes, decoded + canvas_copy, copied, converted + resized)
    )


def _pillow_bytes(header: ImageHeader) -> int:
    """Return Pillow's bytes per decoded pixel."""
    if header.channels > 1:
        return _PILLOW_RGB_BYTES
    return header.sample_bytes + 1 if header.sample_bytes > 1 else 1  # 16 bits are converted to 8, then to RGB


def _tensorflow_cost(header: ImageHeader, size: tuple[int, int]) -> int:
    """Decode all frames, convert them to float32, resize them."""
    height, _ = size
    channels = 3 if header.format == "JPEG" else max(3, header.channels)
    pixels = header.pixels * header.frames
    decoded = pixels * channels * header.sample_bytes
    floats = pixels * channels * 4
    resized = height * header.width * header.frames * channels * 4
    raster = pixels if header.format == "GIF" else 0  # giflib's buffer of all frames
    return (
        header.file_bytes
        + header.metadata_bytes
        + pixels  # measured, cause unknown
        + decoded
        + max(header.coefficient_bytes, floats + resized + raster)
    )


def decode_seconds(header: ImageHeader) -> float:
    """Estimate the time on one core of decoding a file and resizing the image, with either library."""
    pixel_s = _WEBP_PIXEL_S if header.format == "WEBP" else _PIXEL_S
    pixels = max(header.pixels, _RESIZED_ROWS * max(header.width, header.height)) * header.frames
    byte_s = _RUN_LENGTH_BYTE_S if header.is_run_length else _FILE_BYTE_S.get(header.format, _RAW_BYTE_S)
    return (
        _FILE_S
        + pixels * pixel_s
        + header.pixels * (header.scans - 1) * _SCAN_PIXEL_S
        + header.file_bytes * byte_s
        + header.metadata_bytes * _INFLATED_BYTE_S
    )


def is_quick(header: ImageHeader) -> bool:
    """Return True if decoding takes a few milliseconds at most, so that it may block the event loop."""
    return decode_seconds(header) <= QUICK_S
