"""The section of a report on the limits of predictions: typicality and prediction sets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from training.data import Dataset
from training.evaluation.conformal import COVERAGE
from training.evaluation.guard_evaluation import GuardEvaluation
from training.evaluation.plots import BLUE, GREEN, GREY, INK, VERMILLION, shorten, with_style
from training.evaluation.roc import compute_roc

_COLOURS = (BLUE, VERMILLION, GREEN, "#CC79A7", "#E69F00", "#56B4E9")  # of Okabe and Ito
_COLUMNS, _ROWS = 8, 2
_WIDTH, _LINE = 1.15, 0.15  # of an image with its margin, and height of a line of its caption, in inches


def describe_guard(guard: GuardEvaluation) -> str:
    """Return the section, in Markdown; it shows typicality.png and atypical.png."""
    auroc, sets = guard.auroc, guard.sets
    rows = "\n".join(f"| {name} | {area:.3f} |" for name, area in auroc.items())
    sizes = ", ".join(f"{share:.1%} have {size or 'none'}" for size, share in enumerate(sets.sizes[:4]) if share)
    return f"""## Limits of the predictions

The `guarded` signatures of the exported model tell how typical an image is, from 0 to 1, and which labels cannot be \
ruled out. They were fitted on other held-out images.

Images with a typicality below {guard.threshold:.0%} are flagged as not typical; so are {guard.flagged:.1%} of the \
test images. The AUROC is the probability that a drawn image of another kind is less typical than a test image.

| drawn images | AUROC |
|---|---:|
{rows}
| mean | {np.mean(list(auroc.values())):.3f} |

![Flagged outliers by flagged test images](typicality.png)

![Least typical test images](atypical.png)

A prediction set has each label with a probability of at least {sets.threshold:.3f}, so that the true label should be \
in {COVERAGE:.0%} of the sets. It is in {sets.coverage:.1%} of those of the test images. They have \
{sets.mean_size:.2f} labels on average: {sizes}. In an empty set no label is probable enough.
"""


@with_style
def plot_roc(guard: GuardEvaluation) -> Figure:
    """Plot the share of outliers that is flagged by that of test images, a line for each set of outliers."""
    figure = Figure(figsize=(5.6, 4.1), layout="constrained")
    axes = figure.add_subplot()
    by_area = sorted(guard.auroc.items(), key=lambda item: -item[1])
    for colour, (name, area) in zip(_COLOURS, by_area, strict=False):
        of_test, of_outliers = compute_roc(guard.typicality, guard.outliers[name])
        axes.plot(of_test, of_outliers, color=colour, linewidth=1.8, clip_on=False, label=f"{name}, AUROC {area:.3f}")
    dashed: Any = {"color": INK, "linewidth": 0.8, "linestyle": (0, (4, 3))}
    axes.plot([0, 1], [0, 1], **dashed)
    axes.axvline(guard.threshold, color=GREY, linewidth=0.8, zorder=0)
    axes.annotate(
        f"below {guard.threshold:.0%}:\nnot typical",
        (guard.threshold, 0.28),
        (4, 4),
        textcoords="offset points",
        fontsize=7.5,
    )
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="test images that are flagged", ylabel="outliers that are flagged")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1))
    axes.grid(color=GREY, alpha=0.2, linewidth=0.6)
    axes.set_title("Outliers by typicality")
    axes.legend(loc="lower right")
    return figure


@with_style
def plot_atypical(dataset: Dataset, guard: GuardEvaluation, probabilities: np.ndarray) -> Figure:
    """Show the least typical test images.

    Args:
        dataset: with the test images.
        guard: evaluated on them.
        probabilities: float32 (n, classes), of them.
    """
    images, labels, names = dataset.test.images, dataset.test.labels, dataset.class_names
    shown = np.argsort(guard.typicality, kind="stable")[: _COLUMNS * _ROWS]
    rows = -(-len(shown) // _COLUMNS)
    image_height = float(np.clip(_WIDTH * images.shape[1] / images.shape[2], 0.4, 1.6))
    figure = Figure(figsize=(_COLUMNS * _WIDTH, 0.3 + rows * (image_height + 3.2 * _LINE)), layout="constrained")
    figure.suptitle("Least typical test images", x=0, ha="left", fontsize=10, weight="bold")
    for position, index in enumerate(shown):
        axes = figure.add_subplot(rows, _COLUMNS, position + 1)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        axes.imshow(images[index], interpolation="nearest" if max(images.shape[1:3]) <= 96 else "antialiased")
        predicted = int(probabilities[index].argmax())
        axes.set_xlabel(_caption(guard.typicality[index], names, predicted, int(labels[index])), fontsize=7.5)
        axes.xaxis.label.set_color(GREEN if predicted == labels[index] else VERMILLION)
    return figure


def _caption(typicality: float, names: Sequence[str], predicted: int, label: int) -> str:
    lines = [f"typicality {typicality:.1%}", shorten(names[predicted], 14)]
    return "\n".join(lines if predicted == label else [*lines, f"true: {shorten(names[label], 12)}"])
