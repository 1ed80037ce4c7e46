"""Detects the format of an image file from its first bytes; the file name is ignored."""

from __future__ import annotations

from PIL import features

from image_formats import avif, bmp, gif, jpeg, png, webp
from image_formats.header import ImageHeader

HEAD_BYTES = 512  # enough to detect the format, including the list of brands of HEIC and AVIF

HAS_AVIF = bool(features.check("avif"))  # Pillow can be built without it
SUPPORTED = ("JPEG", "PNG", "WebP", *(["AVIF"] if HAS_AVIF else []), "BMP", "GIF")
EXPECTED = f"expected {', '.join(SUPPORTED[:-1])} or {SUPPORTED[-1]}"

_READERS = (
    (jpeg.SIGNATURE, jpeg.read_header),
    (png.SIGNATURE, png.read_header),
    (gif.SIGNATURE, gif.read_header),
    (bmp.SIGNATURE, bmp.read_header),
)
_SIGNATURES = {
    "JPEG": (jpeg.SIGNATURE,),
    "PNG": (png.SIGNATURE,),
    "GIF": (b"GIF87a", b"GIF89a"),
    "TIFF": (b"II*\0", b"MM\0*"),
    "JPEG XL": (b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n"),
}


def read_header(data: bytes) -> ImageHeader | None:
    """Read the header of a file in one of the SUPPORTED formats.

    The signatures are those that TensorFlow's decoders check; `name_format` is stricter about GIF and BMP.

    Returns:
        The header, or None if the format is not supported or the file ends before the image data. Never raises.
    """
    for signature, read in _READERS:
        if data.startswith(signature):
            return read(data)
    if webp.is_webp(data):
        return webp.read_header(data)
    if HAS_AVIF and avif.is_avif(data):
        return avif.read_header(data)
    return None


def name_format(head: bytes) -> str | None:
    """Return the name of the image format, supported or not; None if the file is not an image.

    Args:
        head: the first `HEAD_BYTES` of the file, or all of it.
    """
    if bmp.is_bmp(head):
        return "BMP"
    if webp.is_webp(head):
        return "WebP"
    if avif.is_avif(head):
        return "AVIF"
    if avif.is_heic(head):
        return "HEIC"
    return next((name for name, starts in _SIGNATURES.items() if head.startswith(starts)), None)


def explain_unreadable(head: bytes) -> str:
    """Return the reason why a file without a readable header is refused."""
    if not head:
        return "the file is empty"
    name = name_format(head)
    if name is None:
        return f"unknown image format: {EXPECTED}"
    if name in SUPPORTED:
        return f"the {name} file is damaged or cut off"
    return f"{name} is not supported: convert the image to JPEG or PNG ({EXPECTED})"
