"""The sheet of sample predictions in a report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from training.evaluation.plots import GREEN, INK, VERMILLION, in_our_style, shorten

_COLUMNS, _ROWS = 8, 2  # of each block

# Laid out by hand, in inches: what there is to show says how much room it takes.
_WIDTH, _GAP = 1.0, 0.15  # of a picture, and between two; at 160 dots an inch a pixel of 32x32 becomes 5x5
_TITLE = 0.28
_LINE = 0.125  # from one line of a caption to the next


@dataclass(frozen=True)
class _Block:
    title: str
    order: str
    rows: np.ndarray
    colour: str
    caption_lines: int

    def row_height(self, picture_height: float) -> float:
        return picture_height + _LINE * (self.caption_lines + 1.6)

    def height(self, picture_height: float) -> float:
        return _TITLE + self.row_height(picture_height) * -(-len(self.rows) // _COLUMNS)


@in_our_style
def plot_samples(
    images: np.ndarray, labels: np.ndarray, probabilities: np.ndarray, class_names: Sequence[str]
) -> Figure:
    """Show some right predictions, and the mistakes the model is most sure of.

    Args:
        images: uint8 (n, height, width, 3).
        labels: int64 (n,).
        probabilities: float32 (n, classes).
        class_names: a name for each class.
    """
    predicted, confidences = probabilities.argmax(axis=1), probabilities.max(axis=1)
    right = np.flatnonzero(predicted == labels)
    right = np.sort(np.random.default_rng(0).permutation(right)[: _COLUMNS * _ROWS])
    wrong = np.flatnonzero(predicted != labels)
    wrong = wrong[np.argsort(-confidences[wrong], kind="stable")][: _COLUMNS * _ROWS]
    blocks = (
        _Block("Right predictions", "drawn at random", right, GREEN, caption_lines=2),
        _Block("Mistakes", "the most confident first", wrong, VERMILLION, caption_lines=3),
    )

    picture_height = float(np.clip(_WIDTH * images.shape[1] / images.shape[2], 0.4, 1.5))
    full_width = _COLUMNS * (_WIDTH + _GAP) - _GAP
    full_height = sum(block.height(picture_height) for block in blocks)
    figure = Figure(figsize=(full_width, full_height))
    top = full_height
    for block in blocks:
        title = f"{block.title}, {block.order}" if len(block.rows) else f"{block.title}: none"
        figure.text(0, top / full_height, title, va="top", fontsize=10, weight="bold")
        for position, index in enumerate(block.rows):
            row, column = divmod(position, _COLUMNS)
            x = column * (_WIDTH + _GAP)
            y = top - _TITLE - row * block.row_height(picture_height) - picture_height
            axes = figure.add_axes((x / full_width, y / full_height, _WIDTH / full_width, picture_height / full_height))
            axes.axis("off")
            # Small pictures stay the squares they are; large ones are better smoothed.
            axes.imshow(images[index], interpolation="nearest" if max(images.shape[1:3]) <= 96 else "antialiased")
            answer, truth = class_names[predicted[index]], class_names[labels[index]]
            caption = shorten(answer, 14), _format_confidence(confidences[index]), f"true: {shorten(truth, 12)}"
            for line, text in enumerate(caption[: block.caption_lines]):
                look: Any = {"color": INK} if line else {"color": block.colour, "weight": "bold"}
                place = (x + _WIDTH / 2) / full_width, (y - 0.06 - _LINE * line) / full_height
                figure.text(*place, text, ha="center", va="top", fontsize=7.5, **look)
        top -= block.height(picture_height)
    return figure


def _format_confidence(confidence: float) -> str:
    # Rounded down: a mistake of 99.96 % confidence is not one of 100 %.
    return f"{int(1000 * confidence) / 10:.1f}%"
