"""One image file to pixels, as the exported model decodes it: the same picture has to give the same answer."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from training.errors import DatasetError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
MAX_PIXELS = 50_000_000  # what the exported model takes: nothing is trained on that could not be asked about

_ORIENTATION_TAG = 0x0112
# Only the orientation of these counts; the exported model reads that of JPEG files alone. A JPEG file that holds
# several pictures, as many phones write, is MPO to Pillow.
_TURNED_FORMATS = ("JPEG", "MPO", "WEBP")
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_image(file: Path | BinaryIO, *, image_size: tuple[int, int] | None) -> np.ndarray:
    """Read one image: upright, three channels, resized by antialiased bilinear.

    Args:
        file: a JPEG, PNG, WebP, BMP or GIF file, or one opened for reading; of an animation, the first picture counts.
        image_size: (height, width); `None` leaves it as it is.

    Returns:
        uint8 (height, width, 3). Alpha is dropped, grey repeated, 16-bit samples keep their high byte.

    Raises:
        DatasetError: the file is damaged, no image, or has more than `MAX_PIXELS`, which is told from its header.
    """
    try:
        with Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DatasetError(
                    f"{file} has {image.width} x {image.height} pixels; at most {MAX_PIXELS:,} in all are taken"
                )
            orientation = _orientation(image) if image.format in _TURNED_FORMATS else 1
            pixels = _to_rgb(image)
    except UnidentifiedImageError as error:
        raise DatasetError(f"{file} is not a {', '.join(FORMATS)} file, or its beginning is damaged") from error
    except Image.DecompressionBombError as error:
        raise DatasetError(f"{file} has too many pixels; at most {MAX_PIXELS:,} are taken") from error
    except DatasetError:
        raise
    except Exception as error:  # what Pillow raises for damage depends on the format and on where the damage is
        if isinstance(error, OSError) and error.strerror is not None:
            raise DatasetError(f"{file} cannot be read: {error.strerror}") from error
        raise DatasetError(f"{file} is damaged: {error or type(error).__name__}") from error
    if orientation in _TURNS:
        pixels = pixels.transpose(_TURNS[orientation])
    if image_size is not None and pixels.size != image_size[::-1]:
        pixels = pixels.resize(image_size[::-1], Image.Resampling.BILINEAR)
    return np.asarray(pixels)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip instead of scaling
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "CMYK":
        return _cmyk_to_rgb(image)
    image.info.pop("transparency", None)  # or Pillow makes an alpha channel of it first, at some cost
    return image.convert("RGB")


def _cmyk_to_rgb(image: Image.Image) -> Image.Image:
    """Convert as TensorFlow's JPEG decoder does (`tensorflow/core/lib/jpeg/jpeg_mem.cc`), not as Pillow would."""
    ink = np.asarray(image).astype(np.uint16)
    if "adobe" in image.info:  # Pillow has undone the inversion that such files have
        ink = 255 - ink
    return Image.fromarray((ink[..., :3] * ink[..., 3:] // 255).astype(np.uint8))


def _orientation(image: Image.Image) -> int:
    data = image.info.get("exif")
    if not data:
        return 1
    exif = Image.Exif()
    try:
        exif.load(data)
        orientation = exif.get(_ORIENTATION_TAG, 1)
    except Exception:  # damaged EXIF data is no reason to lose a picture; Pillow raises many things for it
        return 1
    return orientation if isinstance(orientation, int) else 1
