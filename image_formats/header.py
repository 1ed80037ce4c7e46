"""What the header of an encoded image declares."""

from __future__ import annotations

from dataclasses import dataclass

# libjpeg's default for progressive files is 10 scans; the most elaborate encoders write about 20.
MAX_JPEG_SCANS = 100


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """Size and layout of an encoded image as its file declares them; the pixels may turn out to be missing."""

    format: str  # "JPEG", "PNG", "GIF", "BMP", "WEBP", "AVIF"
    width: int  # of the canvas, or of a frame that reaches beyond it
    height: int
    file_bytes: int
    channels: (
        int  # as stored: 1 for a palette, 2 for grey with alpha, 4 for CMYK, and for RGB that is transparent or turned
    )
    sample_bytes: int = 1  # 2 for samples of 16 bits
    frames: int = 1
    scans: int = 1  # of a JPEG; counting stops at MAX_JPEG_SCANS + 1
    coefficient_bytes: int = 0  # of a JPEG in several scans: what libjpeg holds between them
    is_run_length: bool = False  # of a BMP
    metadata_bytes: int = 0  # of a PNG: upper limit of its text and colour profiles once inflated
    problem: str | None = None  # why no decoder should see the file, whatever its size

    @property
    def pixels(self) -> int:
        """Width times height, of one frame."""
        return self.width * self.height
