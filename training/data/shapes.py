"""Drawn shapes: a dataset that needs no data.

Ten classes of 32x32 images with one shape each, varied in colour, size, position, rotation, proportions, background and
noise. The same seed gives bit-identical images for the same versions of numpy and Pillow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from training.data.dataset import Dataset, Split

SIZE = 32
TRAIN_COUNT = 8000
TEST_COUNT = 1000
_SCALE = 4  # supersampling factor, for smooth edges
_MIN_CONTRAST = 110  # grey levels between shape and background, in the channel with the largest difference

Point = tuple[float, float]


def _polygon(corners: int, *, start: float = 0.0) -> list[Point]:
    angles = (start + 2 * math.pi * corner / corners for corner in range(corners))
    return [(math.cos(angle), math.sin(angle)) for angle in angles]


def _star(points: int, inner: float) -> list[Point]:
    radii = (1.0 if corner % 2 == 0 else inner for corner in range(2 * points))
    corners = _polygon(2 * points)
    return [(radius * x, radius * y) for radius, (x, y) in zip(radii, corners, strict=True)]


def _cross(arm: float) -> list[Point]:
    quarter = [(arm, arm), (arm, 1.0), (-arm, 1.0)]
    half = [*quarter, *((-y, x) for x, y in quarter)]
    return [*half, *((-x, -y) for x, y in half)]


def _crescent() -> list[Point]:
    outer = [(math.cos(a), math.sin(a)) for a in np.linspace(math.radians(50), math.radians(310), 40)]
    tip_x, tip_y = outer[-1]
    # The inner edge is an arc of another circle through both tips.
    centre = 0.45
    radius = math.hypot(tip_x - centre, tip_y)
    tip = math.atan2(tip_y, tip_x - centre) % (2 * math.pi)
    inner = [(centre + radius * math.cos(a), radius * math.sin(a)) for a in np.linspace(tip, 2 * math.pi - tip, 30)]
    return [*outer, *inner]


def _heart() -> list[Point]:
    angles = np.linspace(0, 2 * math.pi, 60)
    x = 16 * np.sin(angles) ** 3
    y = 13 * np.cos(angles) - 5 * np.cos(2 * angles) - 2 * np.cos(3 * angles) - np.cos(4 * angles)
    return [(float(px) / 17, -float(py + 2) / 17) for px, py in zip(x, y, strict=True)]


# Outlines within the unit circle; a ring is a circle with a circular hole.
_OUTLINES: dict[str, list[Point]] = {
    "arrow": [(1, 0), (0.15, 0.75), (0.15, 0.3), (-0.95, 0.3), (-0.95, -0.3), (0.15, -0.3), (0.15, -0.75)],
    "circle": _polygon(60),
    "crescent": _crescent(),
    "cross": _cross(0.33),
    "heart": _heart(),
    "hexagon": _polygon(6),
    "ring": _polygon(60),
    "square": _polygon(4),
    "star": _star(5, 0.42),
    "triangle": _polygon(3),
}
CLASS_NAMES = tuple(_OUTLINES)


def load_shapes(*, seed: int) -> Dataset:
    """Draw 8,000 training and 1,000 test images, equally many of each class."""
    return Dataset(
        "shapes",
        f"drawn, seed {seed}",
        CLASS_NAMES,
        draw_shapes(TRAIN_COUNT, seed=seed),
        # Another random stream, so that no seed gives the same training images.
        draw_shapes(TEST_COUNT, seed=seed, stream=1),
    )


def draw_shapes(count: int, *, seed: int, stream: int = 0) -> Split:
    """Draw `count` shapes in random order, with balanced classes; the labels are indices into `CLASS_NAMES`.

    Another stream gives other images for the same seed.
    """
    rng = np.random.default_rng((seed, stream))
    labels = np.arange(count, dtype=np.int64) % len(CLASS_NAMES)
    images = np.stack([_draw(CLASS_NAMES[label], rng) for label in labels])
    order = rng.permutation(count)
    return Split(images[order], labels[order])


def _draw(name: str, rng: np.random.Generator) -> np.ndarray:
    background = _background(rng)
    mask = np.asarray(_mask(name, rng), np.float32)[..., None] / 255
    colour = _contrasting_colour(background, rng)
    picture = background * (1 - mask) + colour * mask
    picture += rng.normal(0, rng.uniform(0, 8), picture.shape)
    return picture.clip(0, 255).round().astype(np.uint8)


def _mask(name: str, rng: np.random.Generator) -> Image.Image:
    """Draw the mask of a shape: 255 inside, 0 outside."""
    radius = rng.uniform(9, 14) * _SCALE
    x, y = (SIZE * _SCALE / 2 + rng.uniform(-0.7, 0.7) * (SIZE * _SCALE / 2 - 0.95 * radius) for _ in range(2))
    angle = rng.uniform(0, 2 * math.pi)
    squeeze = rng.uniform(0.85, 1)  # slight foreshortening; more would change the shape
    cos, sin = math.cos(angle), math.sin(angle)

    def place(points: Sequence[Point], factor: float = 1.0) -> list[Point]:
        factor *= radius
        return [
            (x + factor * (px * cos - py * squeeze * sin), y + factor * (px * sin + py * squeeze * cos))
            for px, py in points
        ]

    image = Image.new("L", (SIZE * _SCALE, SIZE * _SCALE))
    draw = ImageDraw.Draw(image)
    draw.polygon(place(_OUTLINES[name]), fill=255)
    if name == "ring":
        draw.polygon(place(_OUTLINES[name], rng.uniform(0.45, 0.65)), fill=0)
    return image.reduce(_SCALE)


def _background(rng: np.random.Generator) -> np.ndarray:
    """Return a plain, gradient, striped or blotchy background, float32 (32, 32, 3)."""
    # Dark behind bright shapes, so that a small network learns them in a few epochs.
    first = rng.uniform(0, 120, 3)
    second = (first + rng.normal(0, 20, 3)).clip(0, 255)
    kind = rng.integers(4)
    if kind == 0:
        blend = np.zeros((SIZE, SIZE))
    elif kind == 3:
        cells = Image.fromarray(rng.integers(0, 256, (6, 6), dtype=np.uint8))
        blend = np.asarray(cells.resize((SIZE, SIZE), Image.Resampling.BICUBIC)) / 255
    else:
        angle = rng.uniform(0, 2 * math.pi)
        rows, columns = np.mgrid[0:SIZE, 0:SIZE] / SIZE - 0.5
        slope = rows * math.sin(angle) + columns * math.cos(angle)
        blend = slope.clip(-0.5, 0.5) + 0.5 if kind == 1 else (slope * rng.uniform(2, 5)) % 1 > 0.5
    return (first + np.asarray(blend, np.float32)[..., None] * (second - first)).astype(np.float32)


def _contrasting_colour(background: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Choose a colour that contrasts with the background."""
    around = background.reshape(-1, 3)
    colours = rng.uniform(100, 255, (24, 3))
    # The channel with the largest difference, at the background pixel with the smallest.
    contrast = np.abs(colours[:, None] - around[None, ::16]).max(axis=2).min(axis=1)
    fits = np.flatnonzero(contrast >= _MIN_CONTRAST)
    chosen: np.ndarray = colours[fits[0] if len(fits) else contrast.argmax()]
    return chosen.astype(np.float32)
