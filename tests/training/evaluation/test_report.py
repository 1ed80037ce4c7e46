import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training.__main__ import train as train_command
from training.config import TrainingConfig
from training.data import Dataset, Split
from training.evaluation.metrics import CalibratedEvaluation, evaluate
from training.evaluation.report import write_report
from training.history import EpochResult
from training.run_dir import RunDir
from training.shell_command import format_command

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


def report(
    folder, *, classes=3, epochs=5, share_right=0.6, side=32, count=60, config=None, history=None, mirrored=None
):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, count)
    probabilities = rng.dirichlet(np.ones(classes), count).astype(np.float32)
    predicted = np.where(rng.random(count) < share_right, labels, (labels + 1) % classes)
    probabilities[np.arange(count), predicted] += 1
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    images = rng.integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    # Dollar signs are mathematics to matplotlib, bars are columns to Markdown.
    names = tuple(f"a|b $x_{{$ {n}" for n in range(classes))
    split = Split(images, labels)
    config = config or TrainingConfig(dataset="folder", image_size=(side, side), epochs=epochs, deterministic=True)
    run = RunDir.create(folder, config)
    epochs_run = make_history(epochs)
    run.write_history(epochs_run if history is None else history)
    evaluation = evaluate(probabilities, labels, names)
    test = CalibratedEvaluation(
        evaluation=evaluation, uncalibrated=evaluation.calibration, temperature=1.234, probabilities=probabilities
    )
    path = write_report(
        run,
        config=config,
        dataset=Dataset("pets", "some folder", names, split, split),
        test=test,
        mirrored=mirrored and test,
        best=epochs_run[-1],
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
        {"classes": 10, "epochs": 10, "count": 300},
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
    assert [path.name for path in (tmp_path / "run").glob(".*")] == [".lock"]  # no temporary file is left


def test_report_contains_metrics_and_the_command(tmp_path):
    text = report(tmp_path / "run")
    assert "weights of epoch 5" in text
    assert (
        "python -m training train --dataset folder --image-size 32x32 --variant sequential --loop fit --epochs 5 "
        "--dtype float32 --seed 0 --deterministic" in text
    )
    assert "| 5 (best) | 0.4000 | 86.00% | 0.4200 | 85.60% | 0.0002 | 2,346 | 12.5 |" in text
    assert "| image size | 32x32 |" in text
    assert "| deterministic | yes |" in text
    assert r"| a\|b $x_{$ 2 |" in text


@pytest.mark.parametrize(
    "config",
    [
        TrainingConfig(),
        TrainingConfig.fill_in(variant="airbench", preset="best", epochs=3),
        TrainingConfig(
            dataset="folder",
            data=Path("my 'pets' & $HOME"),
            image_size=(48, 64),
            variant="subclass",
            loop="custom",
            conv_activation="linear",
            epochs=3,
            batch_size=7,
            learning_rate=2.5e-4,
            plateau_factor=0.35,
            plateau_patience=4,
            seed=99,
            deterministic=True,
            tensorboard=True,
        ),
    ],
    ids=["defaults", "airbench", "everything else"],
)
def test_command_in_the_report_gives_the_same_config(tmp_path, config):
    text = report(tmp_path / "run", config=config)
    (line,) = [line for line in text.splitlines() if " -m training train " in line]
    assert line.startswith(format_command("train"))
    values = train_command.make_context("train", shlex.split(line)[4:]).params
    for other in ("run_path", "resume", "export", "models_dir", "name", "default_outputs", "explain"):
        del values[other]
    assert TrainingConfig.fill_in(**values) == config


def test_undefined_metrics_are_shown_as_a_dash(tmp_path):
    text = report(tmp_path / "run", classes=30, count=10)  # most classes have no image
    assert "| \N{EN DASH} | \N{EN DASH} | \N{EN DASH} | 0 |" in text
    assert "nan" not in text


def test_best_epoch_missing_in_the_history_is_reported(tmp_path):
    # Killed after the best checkpoint was saved, before the history was written.
    text = report(tmp_path / "run", epochs=3, history=make_history(2))
    assert "| 2 | " in text
    assert "| 3 (best) | 0.6667 | " in text


def test_a_run_without_history_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(RunDir, "write_history", lambda *_: None)
    assert "| 1 (best) | 2.0000 | " in report(tmp_path / "run", epochs=1)


def test_report_replaces_the_previous_one(tmp_path):
    report(tmp_path / "run")
    before = (tmp_path / "run" / "report.md").read_text()
    (tmp_path / "run" / "config.json").unlink()
    after = report(tmp_path / "run", share_right=1.0)
    assert before != after == (tmp_path / "run" / "report.md").read_text()


def test_plots_need_no_display_and_no_pyplot():
    code = "import json, sys, training.evaluation.report; print(json.dumps(sorted(sys.modules)))"
    modules = json.loads(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout)
    assert not {"matplotlib.pyplot", "tensorflow"} & set(modules)
