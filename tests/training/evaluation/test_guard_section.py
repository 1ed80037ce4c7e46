import numpy as np
import pytest

from tests.training.evaluation.test_plots import assert_readable
from training.data import Dataset, Split
from training.data.outliers import draw_outliers
from training.evaluation.conformal import PredictionSets
from training.evaluation.guard_evaluation import GuardEvaluation
from training.evaluation.guard_section import describe_guard, plot_atypical, plot_roc

NAMES = tuple(draw_outliers(1, height=8, width=8))


def make_evaluation(count, *, outliers=50):
    rng = np.random.default_rng(0)
    sets = {name: rng.beta(1, 2 + place, outliers).astype(np.float32) for place, name in enumerate(NAMES)}
    found = PredictionSets(threshold=0.2289, coverage=0.8961, mean_size=1.1299, sizes=(0.02, 0.855, 0.125))
    typicality = rng.random(count).astype(np.float32)
    return GuardEvaluation(typicality=typicality, outliers=sets, threshold=0.05, sets=found)


def make_dataset(count, *, height, width, classes):
    rng = np.random.default_rng(1)
    split = Split(rng.integers(0, 256, (count, height, width, 3), np.uint8), rng.integers(0, classes, count))
    return Dataset("pets", "some folder", tuple(f"a class with a long name {n}" for n in range(classes)), split, split)


def test_section_has_the_figures():
    evaluation = make_evaluation(400)
    text = describe_guard(evaluation)
    for name, area in evaluation.auroc.items():
        assert f"| {name} | {area:.3f} |" in text
    assert f"| mean | {np.mean(list(evaluation.auroc.values())):.3f} |" in text
    assert f"so are {evaluation.flagged:.1%} of the test images" in text.replace("\n", " ")
    assert "at least 0.229" in text
    assert "It is in 89.6% of those" in text
    assert "1.13 labels on average: 2.0% have none, 85.5% have 1, 12.5% have 2." in text


@pytest.mark.parametrize("outliers", [1, 200])
def test_curves_are_readable_and_named_with_their_area(outliers):
    evaluation = make_evaluation(300, outliers=outliers)
    figure = plot_roc(evaluation)
    assert_readable(figure)
    (axes,) = figure.axes
    curves = {
        str(line.get_label()): np.asarray(line.get_xydata())
        for line in axes.lines
        if not str(line.get_label()).startswith("_")
    }
    assert set(curves) == {f"{name}, AUROC {area:.3f}" for name, area in evaluation.auroc.items()}
    for label, points in curves.items():
        assert np.trapezoid(points[:, 1], points[:, 0]) == pytest.approx(float(label[-5:]), abs=1e-3)


@pytest.mark.parametrize(("count", "height", "width"), [(40, 32, 32), (3, 150, 200), (20, 200, 60)])
def test_least_typical_images_are_shown_first_and_readable(count, height, width):
    dataset, evaluation = make_dataset(count, height=height, width=width, classes=3), make_evaluation(count)
    probabilities = np.random.default_rng(2).dirichlet(np.ones(3), count).astype(np.float32)
    figure = plot_atypical(dataset, evaluation, probabilities)
    assert_readable(figure)
    order = np.argsort(evaluation.typicality)[:16]
    assert len(figure.axes) == len(order) == min(count, 16)
    for axes, index in zip(figure.axes, order, strict=True):
        np.testing.assert_array_equal(axes.images[0].get_array(), dataset.test.images[index])
        caption = axes.get_xlabel()
        assert caption.startswith(f"typicality {evaluation.typicality[index]:.1%}\n")
        assert ("true: " in caption) == (probabilities[index].argmax() != dataset.test.labels[index])
