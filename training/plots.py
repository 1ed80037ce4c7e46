"""The plots of a report, in one style. Each function returns a figure; nothing here touches the disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from itertools import pairwise
from typing import Any, ParamSpec

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from training.epochs import EpochResult
from training.evaluation import CALIBRATION_BINS, Calibration

# Okabe and Ito's colours, which people with any colour vision tell apart.
BLUE, VERMILLION, GREEN, GREY, INK = "#0072B2", "#D55E00", "#009E73", "#8A8F98", "#22262B"
_STYLE: Any = {
    "figure.dpi": 160,
    "figure.constrained_layout.use": True,
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "text.color": INK,
    "xtick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.color": GREY,
    "ytick.labelcolor": INK,
}
_LABELS_UP_TO = 40  # classes whose names are written beside a confusion matrix
_COUNTS_UP_TO = 20  # classes whose counts are written into it
_SAMPLES_A_ROW, _SAMPLE_ROWS = 8, 2

_Arguments = ParamSpec("_Arguments")


def _in_our_style(plot: Callable[_Arguments, Figure]) -> Callable[_Arguments, Figure]:
    @wraps(plot)
    def styled(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> Figure:
        with mpl.rc_context(_STYLE):
            figure = plot(*args, **kwargs)
            figure.canvas.draw()  # the style has to hold while text is measured and drawn
            return figure

    return styled


@_in_our_style
def plot_curves(history: Sequence[EpochResult], *, figure_name: str, best_epoch: int) -> Figure:
    """Plot the loss or the accuracy over the epochs, of training and of validation.

    Args:
        history: the epochs.
        figure_name: "loss" or "accuracy".
        best_epoch: the epoch whose weights were kept.
    """
    figure = Figure(figsize=(5.6, 3.4))
    axes = figure.add_subplot()
    epochs = [result.epoch for result in history]
    curves = {
        "training": ([getattr(result, figure_name) for result in history], BLUE),
        "validation": ([getattr(result, f"val_{figure_name}") for result in history], VERMILLION),
    }
    for values, colour in (curve for curve in curves.values()):
        axes.plot(epochs, values, color=colour, linewidth=1.8, marker="o", markersize=3.5, clip_on=False)
    _label_ends(axes, epochs[-1], {name: (values[-1], colour) for name, (values, colour) in curves.items()})
    _mark_epochs(axes, history, best_epoch, curves["validation"][0])
    axes.set_title(figure_name.capitalize())
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlim(min(epochs) - (0.5 if len(epochs) == 1 else 0.02 * len(epochs)), None)
    if figure_name == "accuracy":
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.grid(axis="y", color=GREY, alpha=0.2, linewidth=0.6)
    axes.margins(y=0.12)
    return figure


def _label_ends(axes: Axes, epoch: int, ends: dict[str, tuple[float, str]]) -> None:
    """Write each curve's name beside its last point, pushed apart where two would touch."""
    low, high = axes.get_ylim()
    apart = 0.07 * (high - low)
    (upper, (top, top_colour)), (lower, (bottom, bottom_colour)) = sorted(ends.items(), key=lambda end: -end[1][0])
    push = max(0.0, apart - (top - bottom)) / 2
    for name, height, colour in ((upper, top + push, top_colour), (lower, bottom - push, bottom_colour)):
        axes.annotate(
            name, (epoch, height), xytext=(8, 0), textcoords="offset points", va="center", color=colour, weight="bold"
        )


def _mark_epochs(axes: Axes, history: Sequence[EpochResult], best_epoch: int, validation: Sequence[float]) -> None:
    position = [result.epoch for result in history].index(best_epoch)
    axes.plot(
        best_epoch, validation[position], marker="o", markersize=10, markerfacecolor="none", color=INK, clip_on=False
    )
    notes = [(float(best_epoch), f"kept: epoch {best_epoch}")]
    for before, after in pairwise(history):
        if after.learning_rate < before.learning_rate:
            axes.axvline(after.epoch - 0.5, color=GREY, linewidth=0.8, linestyle=(0, (4, 3)))
            notes.append((after.epoch - 0.5, f"learning rate {after.learning_rate:.1g}"))
    # Notes stand above the plot, each on a line of its own once they would run into one another.
    span = max(1.0, history[-1].epoch - history[0].epoch)
    line, last_x = 0, -np.inf
    for x, note in sorted(notes):
        line = line + 1 if x - last_x < 0.38 * span else 0
        last_x = x
        axes.annotate(
            note,
            (x, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 3 + 9 * line),
            textcoords="offset points",
            ha="center",
            fontsize=7,
            color=INK,
        )
    axes.axvline(best_epoch, color=INK, linewidth=0.8, linestyle=":", zorder=0)


@_in_our_style
def plot_confusion(confusion: np.ndarray, class_names: Sequence[str]) -> Figure:
    """Plot a confusion matrix, each row shaded by its own share, with counts where there is room."""
    classes = len(class_names)
    side = float(np.clip(0.5 * classes + 1.6, 3.4, 9))
    figure = Figure(figsize=(side + 0.5, side))
    axes = figure.add_subplot()
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if classes <= _COUNTS_UP_TO:
        for (row, column), count in np.ndenumerate(confusion):
            if count:
                colour = "white" if shares[row, column] > 0.5 else INK
                axes.text(column, row, f"{count}", ha="center", va="center", fontsize=7.5, color=colour)
    if classes <= _LABELS_UP_TO:
        names = [name if len(name) <= 18 else f"{name[:17]}…" for name in class_names]
        axes.set_xticks(range(classes), names, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(classes), names)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.set_title("Confusion on the test set")
    bar = figure.colorbar(image, ax=axes, shrink=0.6, format=PercentFormatter(1, decimals=0), pad=0.02)
    bar.outline.set_visible(False)
    bar.set_label("share of the true class")
    return figure


@_in_our_style
def plot_calibration(calibration: Calibration) -> Figure:
    """Plot accuracy against confidence, and how often each confidence occurs."""
    figure = Figure(figsize=(4.2, 4.8))
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    edges = np.linspace(0, 1, CALIBRATION_BINS + 1)
    filled = calibration.counts > 0
    upper.bar(edges[:-1][filled], calibration.accuracies[filled], width=1 / CALIBRATION_BINS, align="edge",
              color=BLUE, edgecolor="white", linewidth=0.8)  # fmt: skip
    upper.plot([0, 1], [0, 1], color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
    upper.annotate("perfect", (0.2, 0.2), xytext=(-4, 4), textcoords="offset points", ha="right", fontsize=7.5)
    upper.set_ylabel("accuracy")
    upper.set_ylim(0, 1)
    upper.set_title(f"Calibration: expected error {calibration.expected_calibration_error:.3f}")
    lower.bar(edges[:-1], calibration.counts / calibration.counts.sum(), width=1 / CALIBRATION_BINS, align="edge",
              color=GREY, edgecolor="white", linewidth=0.8)  # fmt: skip
    lower.set_ylabel("share of images")
    lower.set_xlabel("confidence")
    lower.set_xlim(0, 1)
    for axes in (upper, lower):
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    lower.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    return figure


@_in_our_style
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
    count = _SAMPLES_A_ROW * _SAMPLE_ROWS
    right = np.flatnonzero(predicted == labels)
    right = np.sort(np.random.default_rng(0).permutation(right)[:count])
    wrong = np.flatnonzero(predicted != labels)
    wrong = wrong[np.argsort(-confidences[wrong], kind="stable")][:count]

    figure = Figure(figsize=(8.6, 6.9))
    upper, lower = np.asarray(figure.subfigures(2, 1))
    for block, rows, title in (
        (upper, right, "Right, drawn at random"),
        (lower, wrong, "Wrong, the most confident first"),
    ):
        block.suptitle(title if len(rows) else f"{title}: none", x=0.01, ha="left", fontsize=10, weight="bold")
        grid = block.subplots(_SAMPLE_ROWS, _SAMPLES_A_ROW).ravel()
        for axes, row in zip(grid, rows, strict=False):
            # Small pictures stay the squares they are; large ones are better smoothed.
            axes.imshow(images[row], interpolation="nearest" if max(images.shape[1:3]) <= 96 else "antialiased")
            _caption(axes, class_names, int(labels[row]), int(predicted[row]), float(confidences[row]))
        for axes in grid:
            axes.axis("off")
    return figure


def _caption(axes: Axes, class_names: Sequence[str], label: int, predicted: int, confidence: float) -> None:
    def short(name: str) -> str:
        return name if len(name) <= 12 else f"{name[:11]}…"

    # Rounded down: a mistake of 99.6 % confidence is not one of 100 %.
    answer = f"{short(class_names[predicted])} {int(100 * confidence)}%"
    colour = GREEN if label == predicted else VERMILLION
    below: Any = {"transform": axes.transAxes, "ha": "center", "va": "top", "fontsize": 7.5}
    axes.text(0.5, -0.06, answer, color=colour, weight="bold", **below)
    if label != predicted:
        axes.text(0.5, -0.22, f"is {short(class_names[label])}", **below)
