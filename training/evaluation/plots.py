"""The plots of a report, except the sample sheet, and their style."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from functools import wraps
from itertools import pairwise
from typing import Any, ParamSpec, TypeVar

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from training.evaluation.metrics import CALIBRATION_BINS, Calibration
from training.history import EpochResult

# Okabe and Ito's colours, distinguishable with any colour vision.
BLUE, VERMILLION, GREEN, GREY, INK = "#0072B2", "#D55E00", "#009E73", "#8A8F98", "#22262B"
_STYLE: Any = {
    "figure.dpi": 160,
    "savefig.bbox": "tight",
    "savefig.pad_inches": 0.1,
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
    "legend.fontsize": 8,
    "legend.frameon": False,
    "text.color": INK,
    "text.parse_math": False,  # class names may contain dollar signs
    "xtick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.color": GREY,
    "ytick.labelcolor": INK,
}
_PERCENT = FuncFormatter(lambda share, _: f"{100 * share:.4g}%")

_COUNTS_UP_TO = 20  # classes up to which a confusion matrix shows counts
_NAMES_UP_TO = 100  # classes up to which it shows names

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def with_style(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Decorate a function that creates or renders a figure."""

    @wraps(function)
    def styled(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        # Based on matplotlib's defaults, whatever the user's matplotlibrc contains.
        with style.context(["default", _STYLE]):
            return function(*args, **kwargs)

    return styled


@with_style
def render_png(figure: Figure) -> bytes:
    """Return `figure` as a PNG file."""
    content = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(content, format="png")
    return content.getvalue()


@with_style
def plot_curves(history: Sequence[EpochResult], *, quantity: str, best_epoch: int) -> Figure:
    """Plot training and validation loss or accuracy by epoch.

    Args:
        history: the epochs, at least one.
        quantity: "loss" or "accuracy".
        best_epoch: the epoch whose weights are kept; one of `history`.
    """
    figure = Figure(figsize=(5.6, 3.7), layout="constrained")
    axes = figure.add_subplot()
    epochs = [result.epoch for result in history]
    marker = "o" if len(epochs) <= 40 else ""
    for name, prefix, colour in (("training", "", BLUE), ("validation", "val_", VERMILLION)):
        values = [getattr(result, f"{prefix}{quantity}") for result in history]
        axes.plot(epochs, values, color=colour, linewidth=1.8, marker=marker, markersize=3.5, clip_on=False, label=name)
    best = values[epochs.index(best_epoch)]
    label = f"kept: epoch {best_epoch}, {best:{'.1%' if quantity == 'accuracy' else '.3f'}}"
    axes.plot(best_epoch, best, "o", markersize=9, markerfacecolor="none", color=INK, clip_on=False, label=label)
    axes.set_xlim(epochs[0] - 0.4, epochs[-1] + 0.4)
    axes.margins(y=0.1)
    bottom, top = axes.get_ylim()
    axes.set_ylim(max(bottom, 0), min(top, 1) if quantity == "accuracy" else top)
    _mark_learning_rates(axes, history)
    axes.set_title(quantity.capitalize())
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    if quantity == "accuracy":
        axes.yaxis.set_major_formatter(_PERCENT)
    axes.grid(axis="y", color=GREY, alpha=0.2, linewidth=0.6)
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def _mark_learning_rates(axes: Axes, history: Sequence[EpochResult]) -> None:
    """Draw a line where the learning rate was reduced, except for a schedule that reduces it every epoch."""
    drops = [b.epoch - 0.5 for a, b in pairwise(history) if b.learning_rate < a.learning_rate]
    if not drops:
        return
    rates = f"learning rate {history[0].learning_rate:.2g} to {history[-1].learning_rate:.2g}"
    line: Any = {"color": GREY, "linewidth": 0.8, "linestyle": (0, (4, 3))}
    if len(drops) > 2 and len(drops) == len(history) - 1:
        axes.plot([], [], linestyle="none", label=f"{rates}, every epoch")
        return
    for epoch in drops:
        axes.axvline(epoch, zorder=0, **line)
    axes.plot([], [], label=rates, **line)


@with_style
def plot_confusion(confusion: np.ndarray, class_names: Sequence[str]) -> Figure:
    """Plot a confusion matrix, shaded by share of the row, with counts for few classes.

    Args:
        confusion: int64 (classes, classes), (true, predicted).
        class_names: a name for each class.
    """
    classes = len(class_names)
    cell = float(np.clip(7 / classes, 0.09, 0.46)) if classes > 4 else 0.8  # inches
    figure = Figure(figsize=(cell * classes + 2.6, cell * classes + 1.8), layout="compressed")
    axes = figure.add_subplot()
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if classes <= _COUNTS_UP_TO:
        for (row, column), count in np.ndenumerate(confusion):
            if count:
                colour = "white" if shares[row, column] > 0.6 else INK
                axes.text(column, row, f"{count}", ha="center", va="center", fontsize=7.5, color=colour)
    if classes <= _NAMES_UP_TO:
        names = [shorten(name, 18) for name in class_names]
        fontsize = min(9, 58 * cell)
        axes.set_xticks(range(classes), names, fontsize=fontsize)
        axes.set_yticks(range(classes), names, fontsize=fontsize)
        if max(map(len, names)) * fontsize * 0.65 / 72 > cell:
            upright = classes > _COUNTS_UP_TO
            for label in axes.get_xticklabels():
                label.set(rotation=90 if upright else 45, rotation_mode="anchor")
                label.set(ha="right", va="center" if upright else "top")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    axes.set_title("Confusion on the test set")
    bar = figure.colorbar(image, ax=axes, shrink=0.6, format=_PERCENT, pad=0.02, aspect=22)
    bar.outline.set_visible(False)
    bar.set_label("share of the true class")
    return figure


@with_style
def plot_calibration(before: Calibration, after: Calibration, *, temperature: float) -> Figure:
    """Plot accuracy by confidence, and the distribution of confidences (Guo et al. 2017, figure 1).

    Args:
        before: of the trained model, on the left.
        after: with the logits divided by `temperature`, on the right.
        temperature: for the title.
    """
    figure = Figure(figsize=(8.2, 4.9), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True, sharey="row", height_ratios=(3.4, 1))
    for upper, lower, calibration, title in (
        (*panels[:, 0], before, "As trained"),
        (*panels[:, 1], after, f"Temperature {temperature:.2f}, as exported"),
    ):
        _draw_reliability(upper, lower, calibration)
        upper.set_title(title, pad=20)
        lower.set(xlabel="confidence", xlim=(0, 1))
    panels[0, 0].set(ylabel="accuracy", ylim=(0, 1))
    panels[1, 0].set(ylabel="images")
    for axis in (panels[0, 0].yaxis, panels[1, 0].yaxis, panels[1, 0].xaxis):
        axis.set_major_formatter(_PERCENT)
    panels[1, 0].yaxis.set_major_locator(MaxNLocator(3))
    panels[0, 0].legend(loc="upper left")
    return figure


def _draw_reliability(upper: Axes, lower: Axes, calibration: Calibration) -> None:
    edges = np.linspace(0, 1, CALIBRATION_BINS + 1)[:-1]
    filled = calibration.counts > 0
    accuracies, confidences = calibration.accuracies[filled], calibration.confidences[filled]
    bars: Any = {"width": 1 / CALIBRATION_BINS, "align": "edge", "edgecolor": "white", "linewidth": 0.8}
    upper.bar(edges[filled], accuracies, color=BLUE, label="accuracy", **bars)
    ends = edges[filled] + 1 / CALIBRATION_BINS
    upper.hlines(confidences, edges[filled], ends, color=VERMILLION, linewidth=2, label="mean confidence")
    upper.plot([0, 1], [0, 1], color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
    share = calibration.counts / calibration.counts.sum()
    means = np.nansum(share * calibration.accuracies), np.nansum(share * calibration.confidences)
    text = "accuracy {:.1%}, mean confidence {:.1%}, expected error {:.3f}"
    upper.annotate(
        text.format(*means, calibration.expected_calibration_error),
        (0, 1),
        xycoords="axes fraction",
        xytext=(0, 7),
        textcoords="offset points",
        fontsize=7.5,
    )
    lower.bar(edges, share, color=GREY, **bars)


def shorten(name: str, length: int) -> str:
    """Shorten in the middle, because similar names often differ at the end."""
    tail = length // 3
    return name if len(name) <= length else f"{name[: length - 1 - tail]}…{name[-tail:]}"
