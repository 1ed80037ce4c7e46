"""The style of a report's plots, and all of them but the sample sheet.

Each `plot_` function returns a figure, `render_png` makes a file's content of it; nothing here touches the disk.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from itertools import pairwise
from typing import Any, ParamSpec, TypeVar

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, MaxNLocator

from training.evaluation.metrics import CALIBRATION_BINS, Calibration
from training.history import EpochResult

# Okabe and Ito's colours, which people with any colour vision tell apart.
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
    "text.color": INK,
    "text.parse_math": False,  # a class may well be named with dollar signs
    "xtick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.color": GREY,
    "ytick.labelcolor": INK,
}
_HALO = [withStroke(linewidth=2.5, foreground="white")]  # keeps a note readable where a line runs under it
_PERCENT = FuncFormatter(lambda share, _: f"{100 * share:.4g}%")
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

_COUNTS_UP_TO = 20  # classes whose counts are written into a confusion matrix
_NAMES_UP_TO = 100  # classes whose names are written beside it

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def in_our_style(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Decorate what makes or renders a figure."""

    @wraps(function)
    def styled(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        # On top of matplotlib's own defaults, so that a plot looks the same whatever a person's matplotlibrc says.
        with style.context(["default", _STYLE]):
            return function(*args, **kwargs)

    return styled


@in_our_style
def render_png(figure: Figure) -> bytes:
    """Return `figure` as the content of a PNG file."""
    content = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(content, format="png")
    return content.getvalue()


@in_our_style
def plot_curves(history: Sequence[EpochResult], *, quantity: str, best_epoch: int) -> Figure:
    """Plot the loss or the accuracy over the epochs, of training and of validation.

    Args:
        history: the epochs, at least one.
        quantity: "loss" or "accuracy".
        best_epoch: the epoch whose weights were kept; one of `history`.
    """
    figure = Figure(figsize=(5.6, 3.5), layout="constrained")
    axes = figure.add_subplot()
    epochs = [result.epoch for result in history]
    curves = {
        "training": ([getattr(result, quantity) for result in history], BLUE),
        "validation": ([getattr(result, f"val_{quantity}") for result in history], VERMILLION),
    }
    for values, colour in curves.values():
        marker = "o" if len(epochs) <= 40 else ""
        axes.plot(epochs, values, color=colour, linewidth=1.8, marker=marker, markersize=3.5, clip_on=False)
    axes.set_xlim(epochs[0] - 0.4, epochs[-1] + 0.4)
    axes.margins(y=0.16)
    bottom, top = axes.get_ylim()
    axes.set_ylim(max(bottom, 0), min(top, 1) if quantity == "accuracy" else top)
    _name_curves(axes, epochs[-1], {name: (values[-1], colour) for name, (values, colour) in curves.items()})
    shown = ".1%" if quantity == "accuracy" else ".3f"
    _mark_kept(axes, epochs, best_epoch, {name: values for name, (values, _) in curves.items()}, shown)
    marked = _mark_learning_rates(axes, history)
    axes.set_title(quantity.capitalize(), pad=20 if marked else 8)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    if quantity == "accuracy":
        axes.yaxis.set_major_formatter(_PERCENT)
    axes.grid(axis="y", color=GREY, alpha=0.2, linewidth=0.6)
    return figure


def _name_curves(axes: Axes, epoch: int, ends: Mapping[str, tuple[float, str]]) -> None:
    """Write each curve's name beside its last point, pushed apart where two would touch, and kept beside the axes."""
    bottom, top = axes.get_ylim()
    (upper, (high, high_colour)), (lower, (low, low_colour)) = sorted(ends.items(), key=lambda end: -end[1][0])
    gap = 0.08 * (top - bottom)
    push = max(0.0, gap - (high - low)) / 2
    high, low = high + push, low - push
    if low < bottom:
        low, high = bottom, max(high, bottom + gap)
    elif high > top:
        high, low = top, min(low, top - gap)
    for name, height, colour in ((upper, high, high_colour), (lower, low, low_colour)):
        axes.annotate(
            name,
            (epoch, height),
            xytext=(9, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            weight="bold",
            annotation_clip=False,  # else a point that rounding puts outside the axes has no name
        )


def _mark_kept(
    axes: Axes, epochs: Sequence[int], best_epoch: int, curves: Mapping[str, Sequence[float]], shown: str
) -> None:
    """Circle the validation's point of the kept epoch, and write its value as near as the curves leave room."""
    value = curves["validation"][epochs.index(best_epoch)]
    axes.plot(best_epoch, value, "o", markersize=9, markerfacecolor="none", color=INK, clip_on=False)
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    place = (best_epoch - left) / (right - left)
    align, start = ("left", 0.0) if place < 0.2 else ("right", -0.3) if place > 0.8 else ("center", -0.15)
    under = best_epoch + (start + np.linspace(0, 0.3, 20)) * (right - left)
    others = [np.interp(under, epochs, values) for values in curves.values()]

    def room(height: float) -> float:
        return min(float(np.abs(other - height).min()) for other in others) if bottom < height < top else 0.0

    heights = [value + side * away * (top - bottom) for away in (0.085, 0.14, 0.2) for side in (-1, 1)]
    height = max(heights, key=lambda height: min(room(height), 0.055 * (top - bottom)))  # the first with so much
    note = f"kept: epoch {best_epoch}, {value:{shown}}"
    backing = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
    axes.text(best_epoch, height, note, ha=align, va="center", fontsize=7.5, bbox=backing)


def _mark_learning_rates(axes: Axes, history: Sequence[EpochResult]) -> bool:
    """Draw a line where the learning rate was lowered, or tell of a schedule; return whether there was something."""
    drops = [(after.epoch - 0.5, after.learning_rate) for before, after in pairwise(history)
             if after.learning_rate < before.learning_rate]  # fmt: skip
    above: Any = {"xytext": (0, 6), "textcoords": "offset points", "fontsize": 7.5}
    if len(drops) > 2 and len(drops) == len(history) - 1:  # with every epoch: a line at each would say nothing
        note = f"lr {_rate(history[0].learning_rate)} to {_rate(history[-1].learning_rate)}, epoch by epoch"
        axes.annotate(note, (1, 1), xycoords="axes fraction", ha="right", **above)
        return True
    next_label = np.inf
    for epoch, rate in reversed(drops):
        axes.axvline(epoch, color=GREY, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
        # Where drops are crowded, the last one's rate is written: the one that training went on with.
        if next_label - epoch > 0.16 * (history[-1].epoch - history[0].epoch):
            axes.annotate(f"lr {_rate(rate)}", (epoch, 1), xycoords=("data", "axes fraction"), ha="center", **above)
            next_label = epoch
    return bool(drops)


def _rate(learning_rate: float) -> str:
    if learning_rate == 0:
        return "0"
    mantissa, exponent = f"{learning_rate:.1e}".split("e")
    power = f"10{str(int(exponent)).translate(_SUPERSCRIPTS)}"
    return f"{mantissa.removesuffix('.0')}\N{MULTIPLICATION SIGN}{power}"


@in_our_style
def plot_confusion(confusion: np.ndarray, class_names: Sequence[str]) -> Figure:
    """Plot a confusion matrix, each row shaded by its own share, with counts where there is room.

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


@in_our_style
def plot_calibration(before: Calibration, after: Calibration, *, temperature: float) -> Figure:
    """Plot accuracy against confidence, and how often each confidence occurs (Guo et al. 2017, figure 1).

    Args:
        before: as the model was trained, on the left.
        after: with its logits divided by `temperature`, on the right.
        temperature: the temperature.
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
    for line, (text, colour) in enumerate((("accuracy", BLUE), ("mean confidence", VERMILLION))):
        panels[0, 0].text(0.03, 0.96 - 0.07 * line, text, color=colour, weight="bold", va="center", path_effects=_HALO)
    return figure


def _draw_reliability(upper: Axes, lower: Axes, calibration: Calibration) -> None:
    edges = np.linspace(0, 1, CALIBRATION_BINS + 1)[:-1]
    filled = calibration.counts > 0
    accuracies, confidences = calibration.accuracies[filled], calibration.confidences[filled]
    bars: Any = {"width": 1 / CALIBRATION_BINS, "align": "edge", "edgecolor": "white", "linewidth": 0.8}
    upper.bar(edges[filled], accuracies, color=BLUE, **bars)
    upper.hlines(confidences, edges[filled], edges[filled] + 1 / CALIBRATION_BINS, color=VERMILLION, linewidth=2)
    upper.plot([0, 1], [0, 1], color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
    share = calibration.counts / calibration.counts.sum()
    upper.annotate(
        f"accuracy {np.nansum(share * calibration.accuracies):.1%}, "
        f"mean confidence {np.nansum(share * calibration.confidences):.1%}, "
        f"expected error {calibration.expected_calibration_error:.3f}",
        (0, 1),
        xycoords="axes fraction",
        xytext=(0, 7),
        textcoords="offset points",
        fontsize=7.5,
    )
    lower.bar(edges, share, color=GREY, **bars)


def shorten(name: str, length: int) -> str:
    """Cut from the middle: names that are alike often differ at the end."""
    tail = length // 3
    return name if len(name) <= length else f"{name[: length - 1 - tail]}…{name[-tail:]}"
