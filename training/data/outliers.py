"""Drawn images that belong to no dataset of photographs: to measure out-of-distribution detection.

Five sets, each of one kind. The same seed gives the same images for the same versions of numpy and Pillow. Nothing is
fitted on them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from training.data.shapes import draw_shapes

_WORDS = (
    "the of and to in is it was for on are as with his they at be this from have or by one had not but what all were "
    "when we there can an your which their said if do will each about how up out them then she many some so"
)
_PAGE, _LETTER, _LINE = 1200, 16, 24  # sides of a page, height of its letters and of its lines, in pixels


def draw_outliers(count: int, *, height: int, width: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Draw the sets, by name.

    Args:
        count: images in each set, at least 1.
        height: of the images, in pixels.
        width: the same.
        seed: of the random numbers.

    Returns:
        "shapes", "uniform noise", "smooth noise", "text" and "flat colours": uint8 (count, height, width, 3) each.
    """
    page = _draw_page(np.random.default_rng(seed))
    draw: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
        "uniform noise": lambda rng: rng.integers(0, 256, (height, width, 3), dtype=np.uint8),
        "smooth noise": lambda rng: _smooth_noise(rng, height, width),
        "text": lambda rng: _text(rng, page, height, width),
        "flat colours": lambda rng: np.broadcast_to(rng.integers(0, 256, 3, dtype=np.uint8), (height, width, 3)),
    }
    shapes = draw_shapes(count, seed=seed, stream=2).images
    sets = {"shapes": np.stack([_resize(Image.fromarray(image), height, width) for image in shapes])}
    for number, (name, draw_one) in enumerate(draw.items()):
        rng = np.random.default_rng((seed, number))
        sets[name] = np.stack([draw_one(rng) for _ in range(count)])
    return sets


def _resize(image: Image.Image, height: int, width: int) -> np.ndarray:
    return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))


def _smooth_noise(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    cells = rng.integers(0, 256, (*rng.integers(2, 9, 2), 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC))


def _draw_page(rng: np.random.Generator) -> Image.Image:
    """Draw a mask of lines of words: 255 where the letters are."""
    page = Image.new("L", (_PAGE, _PAGE))
    draw = ImageDraw.Draw(page)
    font = ImageFont.load_default(_LETTER)
    for y in range(0, _PAGE, _LINE):
        # Paragraphs end within a line, and some lines are left out between them.
        words = rng.choice(_WORDS.split(), rng.choice([0, 30, 80, 160], p=[0.1, 0.1, 0.2, 0.6]))
        draw.text((_LETTER, y), " ".join(words), 255, font)
    return page


def _text(rng: np.random.Generator, page: Image.Image, height: int, width: int) -> np.ndarray:
    """Show a part of a page, two to ten lines high, dark on light or light on dark."""
    tall = rng.uniform(2, 10) * _LINE
    wide = min(tall * width / height, _PAGE / 2)
    left, top = rng.uniform(0, _PAGE / 2 - wide / 2), rng.uniform(0, _PAGE - tall)
    box = (left, top, left + wide, top + tall)
    mask = np.asarray(page.resize((width, height), Image.Resampling.BILINEAR, box), np.float32)[..., None] / 255
    dark, light = rng.integers(0, 90, 3), rng.integers(190, 256, 3)
    paper, ink = (light, dark) if rng.random() < 0.7 else (dark, light)
    return (paper + mask * (ink - paper)).round().astype(np.uint8)
