"""`ImageHeader`: size and layout of an encoded image; `UnreadableImage`: there is none."""

from __future__ import annotations

from dataclasses import dataclass

MAX_PIXELS = 50_000_000  # of an image: of training, of the exported model, and the service's default

# libjpeg's default for progressive files is 10 scans; other encoders write up to about 20.
MAX_JPEG_SCANS = 100


class UnreadableImage(Exception):  # noqa: N818 - named for the condition
    """The format is not supported, or the file is damaged or truncated. The message states the reason."""


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """Size and layout of an encoded image, as its file declares them; the pixel data may still be missing."""

    format: str  # "JPEG", "PNG", "GIF", "BMP", "WEBP", "AVIF"
    width: int  # of the canvas, or of a frame that exceeds it
    height: int
    file_bytes: int
    channels: int  # as stored: 1 for a palette, 2 for grey with alpha, 4 for CMYK and for transparent or rotated RGB
    sample_bytes: int = 1  # 2 for samples of 16 bits
    frames: int = 1
    scans: int = 1  # of a JPEG; counting stops at MAX_JPEG_SCANS + 1
    coefficient_bytes: int = 0  # of a JPEG with several scans: libjpeg keeps the coefficients between scans
    is_run_length: bool = False  # of a BMP
    metadata_bytes: int = 0  # of a PNG: upper bound of its inflated text and colour profiles
    problem: str | None = None  # reason why the file must not be decoded

    @property
    def pixels(self) -> int:
        """Width times height of one frame."""
        return self.width * self.height
