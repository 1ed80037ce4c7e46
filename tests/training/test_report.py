import numpy as np
import pytest
from PIL import Image

from training.config import TrainingConfig
from training.datasets import Dataset, Split
from training.epochs import EpochResult
from training.evaluation import evaluate
from training.report import write_report
from training.run import RunFolder

PLOTS = ("loss", "accuracy", "confusion", "calibration", "samples")


def make_history(epochs):
    return [
        EpochResult(
            epoch=epoch,
            loss=2 / epoch,
            accuracy=1 - 0.7 / epoch,
            val_loss=2.1 / epoch,
            val_accuracy=1 - 0.72 / epoch,
            learning_rate=1e-3 if epoch < 4 else 2e-4,
            seconds=12.5,
            images_per_s=2345.6,
        )
        for epoch in range(1, epochs + 1)
    ]


def report(folder, *, classes=3, epochs=5, share_right=0.6, side=32, count=60):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, count)
    probabilities = rng.dirichlet(np.ones(classes), count).astype(np.float32)
    predicted = np.where(rng.random(count) < share_right, labels, (labels + 1) % classes)
    probabilities[np.arange(count), predicted] += 1
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    images = rng.integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    names = tuple(f"a class with a long | name, number {n}" for n in range(classes))
    split = Split(images, labels)
    config = TrainingConfig(dataset="folder", image_size=(side, side), epochs=epochs, deterministic=True)
    run = RunFolder.create(folder, config)
    history = make_history(epochs)
    run.write_history(history)
    path = write_report(
        run,
        config=config,
        dataset=Dataset("pets", "some folder", names, split, split),
        evaluation=evaluate(probabilities, labels, names),
        probabilities=probabilities,
        best=vars(history[-1]),
    )
    return path.read_text()


@pytest.mark.parametrize(
    "case",
    [
        {},
        {"epochs": 1},
        {"share_right": 1.0},
        {"share_right": 0.0},
        {"classes": 2},
        {"classes": 100, "count": 300},
        {"side": 200, "count": 20},
    ],
    ids=str,
)
def test_a_report_shows_every_plot(tmp_path, case):
    text = report(tmp_path / "run", **case)
    for plot in PLOTS:
        assert f"({plot}.png)" in text
        with Image.open(tmp_path / "run" / f"{plot}.png") as image:
            image.load()
            assert min(image.size) > 300
            assert np.asarray(image.convert("L")).std() > 5  # something is drawn
    assert not [path for path in (tmp_path / "run").iterdir() if path.name.startswith(".")]


def test_a_report_says_what_was_measured_and_how_to_do_it_again(tmp_path):
    text = report(tmp_path / "run")
    assert "weights of epoch 5" in text
    assert (
        "python -m training train --dataset folder --image-size 32x32 --variant sequential --loop fit --epochs 5 "
        "--seed 0 --deterministic" in text
    )
    assert "| 5 (kept) | 0.4000 | 86.00% | 0.4200 | 85.60% | 0.0002 | 2,346 | 12.5 |" in text
    assert r"a class with a long \| name, number 2" in text


def test_what_is_undefined_is_a_dash(tmp_path):
    assert "\N{EN DASH}" in report(tmp_path / "run", classes=100, count=20)
