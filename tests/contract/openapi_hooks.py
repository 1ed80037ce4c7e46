"""For schemathesis: request bodies that are images."""

from __future__ import annotations

import io

import schemathesis
from hypothesis import strategies
from PIL import Image


def encode(kind: str, size: tuple[int, int]) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, "red").save(file, kind)
    return file.getvalue()


FILES = [encode(kind, size) for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP") for size in ((1, 1), (32, 32), (200, 90))]
IMAGES = strategies.sampled_from(FILES) | strategies.sampled_from(FILES).map(lambda data: data[: len(data) // 2])

schemathesis.openapi.media_type("image/*", IMAGES)
