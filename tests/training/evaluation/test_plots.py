"""Texts in the plots do not overlap, and nothing is cut off."""

from itertools import combinations

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from training.evaluation.calibration import apply_temperature
from training.evaluation.metrics import evaluate
from training.evaluation.plots import plot_calibration, plot_confusion, plot_curves, shorten, with_style
from training.evaluation.sample_sheet import plot_samples
from training.history import EpochResult


def make_history(val_losses, rates=None):
    return [
        EpochResult(
            epoch=epoch,
            loss=1.8 / epoch**0.5,
            accuracy=1 - 0.6 / epoch**0.5,
            val_loss=val_loss,
            val_accuracy=max(0.0, 1 - val_loss / 3),
            learning_rate=1e-3 if rates is None else rates[epoch - 1],
            seconds=1.0,
            images_per_s=1.0,
        )
        for epoch, val_loss in enumerate(val_losses, start=1)
    ]


def written(figure):
    """Draw `figure`; return the upright texts of which something is seen, with the boxes they fill, in dots."""
    canvas = FigureCanvasAgg(figure)
    with_style(canvas.draw)()
    texts = [text for text in figure.findobj(Text) if text.get_text().strip() and text.get_visible()]
    boxes = [(text, text.get_window_extent(canvas.get_renderer())) for text in texts]
    hidden = {id(label) for axes in figure.axes if not axes.axison for label in axes.findobj(Text)}
    outside = {
        id(label)
        for axes in figure.axes
        for axis, low_high in ((axes.xaxis, sorted(axes.get_xlim())), (axes.yaxis, sorted(axes.get_ylim())))
        for tick, place in zip(axis.get_major_ticks(), axis.get_majorticklocs(), strict=False)
        for label in (tick.label1, tick.label2)
        if not low_high[0] - 1e-9 <= place <= low_high[1] + 1e-9
    }
    return [
        (text.get_text(), box)
        for text, box in boxes
        # Of an annotation that is left out, because its point is outside the axes, the box is that of one dot.
        if id(text) not in hidden | outside and text.get_rotation() in (0, 90) and box.width > 1
    ]


def assert_readable(figure):
    texts = written(figure)
    assert texts
    for (one, box), (other, other_box) in combinations(texts, 2):
        # A line's box has room for accents and descenders; touching by a dot or two is nothing written over.
        width = min(box.x1, other_box.x1) - max(box.x0, other_box.x0)
        height = min(box.y1, other_box.y1) - max(box.y0, other_box.y0)
        assert width <= 2 or height <= 2, f"{one!r} and {other!r} overlap by {width:.0f}x{height:.0f} dots"


def make_ending(loss, val_loss, accuracy, val_accuracy):
    """Make a history that ends with these values."""
    values = [(1.4, 0.8, 0.45, 0.7), (0.1, 0.1, 0.97, 0.97), (loss, val_loss, accuracy, val_accuracy)]
    return [
        EpochResult(
            epoch=epoch,
            loss=loss,
            accuracy=accuracy,
            val_loss=val_loss,
            val_accuracy=val_accuracy,
            learning_rate=1e-3,
            seconds=1.0,
            images_per_s=1.0,
        )
        for epoch, (loss, val_loss, accuracy, val_accuracy) in enumerate(values, start=1)
    ]


HISTORIES = {
    "ends near the axes": make_ending(0.013, 0.028, 0.997, 0.993),
    "ends on the axes": make_ending(0.0, 0.0, 1.0, 1.0),
    "validation ends on the axes": make_ending(0.02, 0.0, 0.999, 1.0),
    "one epoch": make_history([1.5]),
    "two alike": make_history([1.8, 1.27]),
    "best last": make_history([1.9, 1.6, 1.3, 1.1], [1e-3, 1e-3, 1e-3, 2e-4]),
    "best first": make_history(np.linspace(1, 3, 10), [1e-3] * 3 + [2e-4] * 2 + [4e-5] * 2 + [8e-6] * 2 + [1.6e-6]),
    "crowded": make_history(1 + np.abs(np.linspace(-1, 9, 100)), 1e-3 * 0.5 ** (np.arange(100) // 2)),
    "long schedule": make_history(1 + np.abs(np.linspace(-1, 9, 100)), 1e-3 * 0.5 ** np.arange(100.0)),
    "schedule": make_history([1.9, 1.5, 1.3, 1.15, 1.05, 0.97, 0.9, 0.86], np.linspace(0.12, 0, 8)),
}


@pytest.mark.parametrize("quantity", ["loss", "accuracy"])
@pytest.mark.parametrize("history", HISTORIES.values(), ids=HISTORIES)
def test_curves_are_readable(history, quantity):
    best = min(history, key=lambda result: result.val_loss)
    figure = plot_curves(history, quantity=quantity, best_epoch=best.epoch)
    assert_readable(figure)
    texts = [text for text, _ in written(figure)]
    assert {"training", "validation"} <= set(texts)
    assert any(text.startswith(f"kept: epoch {best.epoch}, ") for text in texts)


@pytest.mark.parametrize("quantity", ["loss", "accuracy"])
@pytest.mark.parametrize("name", ["two alike", "best last", "best first", "schedule"])
def test_the_legend_does_not_cover_the_axes(name, quantity):
    best = min(HISTORIES[name], key=lambda result: result.val_loss)
    figure = plot_curves(HISTORIES[name], quantity=quantity, best_epoch=best.epoch)
    assert written(figure)
    (axes,), (legend,) = figure.axes, figure.legends
    assert legend.get_window_extent().y1 < axes.get_window_extent().y0


@pytest.mark.parametrize(
    ("name", "label", "lines"),
    [
        ("best last", "learning rate 0.001 to 0.0002", 1),
        ("best first", "learning rate 0.001 to 1.6e-06", 4),
        ("schedule", "learning rate 0.12 to 0, every epoch", 0),
        ("one epoch", None, 0),
    ],
)
def test_reductions_of_the_learning_rate_are_lines_unless_they_come_every_epoch(name, label, lines):
    best = min(HISTORIES[name], key=lambda result: result.val_loss)
    figure = plot_curves(HISTORIES[name], quantity="loss", best_epoch=best.epoch)
    assert [text for text, _ in written(figure) if text.startswith("learning")] == ([label] if label else [])
    (axes,) = figure.axes
    abscissas = [np.asarray(line.get_xdata()) for line in axes.lines]
    vertical = [xs for xs in abscissas if len(xs) == 2 and xs[0] == xs[1]]
    assert len(vertical) == lines


@pytest.mark.parametrize("classes", [2, 3, 10, 20, 21, 100, 150])
def test_confusion_is_readable(classes):
    confusion = np.random.default_rng(0).integers(0, 1000, (classes, classes))
    figure = plot_confusion(confusion, [f"a rather long class name, {n}" for n in range(classes)])
    assert_readable(figure)
    counts = {text for text, _ in written(figure)} & {str(count) for count in confusion.ravel() if count > 200}
    assert bool(counts) == (classes <= 20)


def make_predictions(classes, count, share_right):
    rng = np.random.default_rng(1)
    labels = rng.integers(0, classes, count)
    predicted = np.where(rng.random(count) < share_right, labels, (labels + 1) % classes)
    probabilities = rng.dirichlet(np.ones(classes), count)
    probabilities[np.arange(count), predicted] += rng.random(count) + 1
    return (probabilities / probabilities.sum(axis=1, keepdims=True)).astype(np.float32), labels


@pytest.mark.parametrize("share_right", [0.0, 0.6, 1.0])
def test_calibration_is_readable(share_right):
    probabilities, labels = make_predictions(10, 500, share_right)
    before, after = (
        evaluate(rows, labels, [str(n) for n in range(10)]).calibration
        for rows in (probabilities, apply_temperature(probabilities, 2.5))
    )
    assert_readable(plot_calibration(before, after, temperature=2.5))


@pytest.mark.parametrize("size", [(32, 32), (32, 96), (200, 60)], ids=str)
@pytest.mark.parametrize("share_right", [0.0, 0.6, 1.0])
def test_samples_are_readable(share_right, size):
    probabilities, labels = make_predictions(10, 60, share_right)
    images = np.random.default_rng(0).integers(0, 256, (60, *size, 3), dtype=np.uint8)
    figure = plot_samples(images, labels, probabilities, [f"automobile number {n}" for n in range(10)])
    assert_readable(figure)
    pictures = [axes.get_window_extent() for axes in figure.axes]
    assert len(pictures) == (32 if share_right == 0.6 else 16)
    for text, box in written(figure):
        assert not any(box.overlaps(picture.shrunk(0.98, 0.98)) for picture in pictures), text


def test_samples_are_correct_predictions_and_the_most_confident_errors():
    count = 100
    labels = np.arange(count) % 2
    confidences = np.linspace(0.55, 0.99995, count, dtype=np.float32)
    is_wrong = np.arange(count) % 4 == 3
    probabilities = np.zeros((count, 2), np.float32)
    probabilities[np.arange(count), np.where(is_wrong, 1 - labels, labels)] = confidences
    probabilities[np.arange(count), np.where(is_wrong, labels, 1 - labels)] = 1 - confidences
    # Each picture is of one grey, which tells which it is.
    images = np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None], (count, 8, 8, 3))
    figure = plot_samples(images, labels, probabilities, ("cat", "dog"))
    shown = [int(np.asarray(axes.images[0].get_array())[0, 0, 0]) for axes in figure.axes]
    assert len(shown) == 32
    assert not is_wrong[shown[:16]].any()
    assert shown[16:] == np.flatnonzero(is_wrong)[::-1][:16].tolist()
    assert any("99.9%" in text for text, _ in written(figure))  # 99.995 % is not 100 %


def test_a_long_name_keeps_both_ends():
    assert shorten("cat", 8) == "cat"
    assert shorten("Saintpaulia number 17", 12) == "Saintpa…r 17"
    assert all(len(shorten("x" * 50, length)) == length for length in range(4, 30))
