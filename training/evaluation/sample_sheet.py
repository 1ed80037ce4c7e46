"""The sample predictions in a report."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from training.data.streamed_images import Images
from training.evaluation.plots import GREEN, VERMILLION, shorten, with_style

_COLUMNS, _ROWS = 8, 2  # of each block
_WIDTH = 1.15  # of an image with its margin, in inches
_TITLE, _LINE = 0.35, 0.15  # heights of a block's title and of a line of a caption, in inches


@with_style
def plot_samples(images: Images, labels: np.ndarray, probabilities: np.ndarray, class_names: Sequence[str]) -> Figure:
    """Show random correct predictions, and the most confident errors.

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
    blocks = (("Correct predictions, random", right, GREEN, 2), ("Errors, most confident first", wrong, VERMILLION, 3))
    image_height = float(np.clip(_WIDTH * images.shape[1] / images.shape[2], 0.4, 1.6))
    heights = [
        _TITLE + -(-len(rows) // _COLUMNS) * (image_height + (lines + 1) * _LINE) for _, rows, _, lines in blocks
    ]
    figure = Figure(figsize=(_COLUMNS * _WIDTH, sum(heights)), layout="constrained")
    parts = np.asarray(figure.subfigures(2, 1, height_ratios=heights))
    for part, (title, rows, colour, lines) in zip(parts, blocks, strict=True):
        part.suptitle(title if len(rows) else f"{title}: none", x=0, ha="left", fontsize=10, weight="bold")
        for position, index in enumerate(rows):
            axes = part.add_subplot(-(-len(rows) // _COLUMNS), _COLUMNS, position + 1)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            # Small images show their pixels; large ones are smoothed.
            axes.imshow(images[index], interpolation="nearest" if max(images.shape[1:3]) <= 96 else "antialiased")
            name, truth = shorten(class_names[predicted[index]], 14), shorten(class_names[labels[index]], 12)
            # The confidence is rounded down: 99.96 % is not 100 %.
            caption = (name, f"{int(1000 * confidences[index]) / 10:.1f}%", f"true: {truth}")
            axes.set_xlabel("\n".join(caption[:lines]), color=colour, fontsize=7.5)
    return figure
