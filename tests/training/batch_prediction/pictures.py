"""Image files for batch prediction."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image


def encode(image_format: str = "PNG", *, size: tuple[int, int] = (32, 32), seed: int = 0) -> bytes:
    """Return an encoded image of noise around one colour; `size` is (width, height)."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 60, (size[1], size[0], 3)) + rng.integers(0, 190, 3)
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, image_format)
    return file.getvalue()


def write_pictures(folder: Path, count: int) -> list[Path]:
    """Write PNG and JPEG files, of 32x32 pixels and other sizes, in a folder and one below; every 17th is damaged."""
    (folder / "below").mkdir(parents=True)
    paths = []
    for index in range(count):
        data = encode("JPEG" if index % 5 == 4 else "PNG", size=(32, 32) if index % 3 else (50, 40), seed=index)
        path = folder / ("below" if index % 2 else "") / f"{index:04}.{'jpg' if index % 5 == 4 else 'png'}"
        path.write_bytes(data[: len(data) // 2] if index % 17 == 16 else data)
        paths.append(path)
    return paths
