"""Complete runs through the command line, in processes that are killed, interrupted or run out of disk space."""

import csv
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from training.data.shapes import draw_shapes
from training.data.shard_writer import write_shards

EPOCHS = 4
WAYS = {
    "fit": ["--loop", "fit"],
    "custom": ["--loop", "custom"],
    "airbench": ["--variant", "airbench", "--dtype", "mixed_bfloat16"],
}


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A small folder of drawn shapes, four classes, as PNG files: an epoch on it takes a fraction of a second."""
    folder = tmp_path_factory.mktemp("pictures")
    for split, count, seed in (("train", 1200, 0), ("test", 300, 1)):
        drawn = draw_shapes(count, seed=seed)
        for number, (image, label) in enumerate(zip(drawn.images, drawn.labels, strict=True)):
            if label < 4:
                path = folder / split / f"class{label}" / f"{number:04d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image).save(path)
    return folder


def command(*arguments):
    return [sys.executable, "-m", "training", *map(str, arguments)]


def train_arguments(pictures, run, *more):
    options = ["--dataset", "folder", "--data", pictures, "--epochs", EPOCHS, "--batch-size", 32, "--deterministic"]
    return command("train", *options, "--run", run, "--no-export", *more)


def call(arguments, **options):
    return subprocess.run(arguments, capture_output=True, text=True, check=False, **options)


def checkpoint_values(run, which):
    path = tf.train.latest_checkpoint(str(run / "checkpoints" / which))
    reader = tf.train.load_checkpoint(path)
    return {
        name: reader.get_tensor(name)
        for name in reader.get_variable_to_shape_map()
        if name.startswith(("weights", "optimizer"))
    }


def assert_same_run(run, reference):
    for which in ("best", "latest"):
        values, expected = checkpoint_values(run, which), checkpoint_values(reference, which)
        assert values.keys() == expected.keys()
        for name, value in values.items():
            np.testing.assert_array_equal(value, expected[name])
    timings = ("seconds", "images_per_s")
    histories = []
    for folder in (run, reference):
        with (folder / "history.csv").open() as file:
            histories.append([{k: v for k, v in row.items() if k not in timings} for row in csv.DictReader(file)])
    assert histories[0] == histories[1]
    assert len(histories[0]) == EPOCHS
    evaluations = [json.loads((folder / "evaluation.json").read_text())["test"] for folder in (run, reference)]
    assert evaluations[0] == evaluations[1]


@pytest.fixture(scope="session", params=WAYS)
def undisturbed(request, pictures, tmp_path_factory):
    """A run nobody disturbed, in each of `WAYS`."""
    run = tmp_path_factory.mktemp("undisturbed") / request.param
    done = call(train_arguments(pictures, run, *WAYS[request.param]))
    assert done.returncode == 0, done.stderr
    return request.param, run, done


def test_run_prints_progress_and_writes_its_files(undisturbed):
    _, run, done = undisturbed
    for epoch in range(1, EPOCHS + 1):
        assert re.search(rf"epoch {epoch}/4  loss \d\.\d+  accuracy .* val loss .* images/s", done.stderr)
    assert re.search(r"test accuracy\s+\d+\.\d\d% of \d+ images", done.stdout)
    names = {path.name for path in run.iterdir()}
    assert names >= {"config.json", "dataset.json", "history.csv", "evaluation.json", "report.md", "checkpoints"}
    assert len(list(run.glob("*.png"))) >= 4
    assert [path.name for path in run.glob(".*")] == [".lock"]  # no temporary file is left


def test_killed_and_resumed_run_is_bit_identical(undisturbed, pictures, tmp_path):
    way, reference, _ = undisturbed
    run = tmp_path / "killed"
    with subprocess.Popen(
        train_arguments(pictures, run, *WAYS[way]), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stderr
        for line in process.stderr:
            if line.startswith("epoch 2/4"):
                process.kill()
                break
    assert not (run / "evaluation.json").exists()
    done = call(command("train", "--resume", run, "--no-export"))
    assert done.returncode == 0, done.stderr
    assert "epoch 1/4" not in done.stderr
    assert "epoch 4/4" in done.stderr
    assert_same_run(run, reference)


def test_streamed_run_equals_the_one_in_memory(undisturbed, pictures, tmp_path):
    way, reference, _ = undisturbed
    if way == "airbench":
        pytest.skip(
            "one way is enough for each loop: batches with augmentation are compared in test_streamed_images.py"
        )
    run, data = tmp_path / "streamed", pictures
    if way == "custom":  # from shards, killed and resumed; the other from the folder
        data = write_shards(pictures, tmp_path / "shards", shard_bytes=100_000).folder
    with subprocess.Popen(
        train_arguments(data, run, *WAYS[way], "--stream"), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stderr
        for line in process.stderr:
            if way == "custom" and line.startswith("epoch 2/4"):
                process.kill()
                break
    assert (process.returncode == 0) == (way != "custom")
    if way == "custom":
        done = call(command("train", "--resume", run, "--no-export"))
        assert done.returncode == 0, done.stderr
        assert "epoch 1/4" not in done.stderr
    assert_same_run(run, reference)


def test_run_killed_ten_times_is_bit_identical(undisturbed, pictures, tmp_path):
    way, reference, _ = undisturbed
    if way != "custom":
        pytest.skip("one way is enough here: what is saved, and when, is the same code for all")
    run = tmp_path / "killed"
    seed = random.randrange(10**6)
    print(f"kill moments drawn with seed {seed}")
    rng = random.Random(seed)
    arguments = train_arguments(pictures, run, *WAYS[way])
    kills = 0
    while kills < 10:
        with subprocess.Popen(arguments, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
            # Every other kill waits for the first epoch of this process, so that the run gets on; a moment later it is
            # training, validating, saving, or already evaluating.
            if kills % 2:
                assert process.stderr
                for line in process.stderr:
                    if line.startswith("epoch"):
                        break
                time.sleep(rng.uniform(0, 0.8))
            else:
                time.sleep(rng.uniform(0.5, 9))
            process.kill()
        kills += 1
        if (run / "config.json").exists():
            arguments = command("train", "--resume", run, "--no-export")
    done = call(arguments)
    assert done.returncode == 0, done.stderr
    assert_same_run(run, reference)


def test_complete_run_is_evaluated_again(undisturbed, tmp_path):
    _, reference, _ = undisturbed
    run = tmp_path / "copy"
    shutil.copytree(reference, run)
    (run / "evaluation.json").unlink()
    (run / "report.md").unlink()
    done = call(command("evaluate", run))
    assert done.returncode == 0, done.stderr
    assert (run / "report.md").exists()
    assert_same_run(run, reference)


def test_export_of_a_past_run(undisturbed, tmp_path):
    _, run, _ = undisturbed
    done = call(command("export", run, "--models-dir", tmp_path, "--name", "pets"))
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "pets" / "1") in done.stdout
    assert done.stderr == ""
    metadata = json.loads((tmp_path / "pets" / "1" / "assets.extra" / "model.json").read_text())
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert metadata["class_names"] == ["class0", "class1", "class2", "class3"]
    assert metadata["input_shape"] == [32, 32, 3]
    assert metadata["test"]["accuracy"] == evaluation["test"]["accuracy"]
    assert metadata["validation"]["loss"] == evaluation["best"]["val_loss"]
    assert metadata["best_epoch"] == evaluation["best"]["epoch"]
    assert len(metadata["dataset"]["content_hash"]) == 64


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_keeps_its_best_and_prints_the_resume_command(pictures, tmp_path, signal_number):
    run = tmp_path / "run"
    options = ["--epochs", "9999", *(["--stream"] if signal_number == signal.SIGTERM else [])]
    with subprocess.Popen(
        train_arguments(pictures, run, *options), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as process:  # so many epochs that it has not ended before the signal
        output = ""
        assert process.stderr
        for line in process.stderr:
            output += line
            if line.startswith("epoch    1/9999"):
                process.send_signal(signal_number)
        assert process.wait() == 130
    assert "Traceback" not in output
    assert "keeps its best checkpoint, of epoch" in output
    assert f"--resume {run}" in output
    assert checkpoint_values(run, "best")


def test_a_diverged_run_keeps_its_best_and_has_its_own_exit_code(pictures, tmp_path):
    run = tmp_path / "run"
    done = call(train_arguments(pictures, run, "--learning-rate", "1e30"))
    assert done.returncode == 3
    assert "the run has diverged" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture
def small_disk(tmp_path):
    """A small file system, with room for what a run says it needs."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = call(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", folder])
    if mounted.returncode != 0:
        pytest.skip(f"mounting a small file system needs rights this user lacks: {mounted.stderr.strip()}")
    yield folder
    call(["umount", "-l", folder])


def test_a_full_disk_keeps_the_best_and_has_its_own_exit_code(pictures, small_disk):
    run = small_disk / "run"
    # The checkpoints of the first epochs fit; a file then takes what is left, as another program would.
    with subprocess.Popen(
        train_arguments(pictures, run), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as process:
        output = ""
        assert process.stderr
        for line in process.stderr:
            output += line
            if line.startswith("epoch 1/4"):
                filler = small_disk / "filler"
                with filler.open("wb", buffering=0) as file:
                    try:
                        while True:
                            file.write(b"0" * 4096)
                    except OSError:
                        pass
        assert process.wait() == 4, output
    assert "disk full" in output
    assert "Traceback" not in output
    assert checkpoint_values(run, "best")
    filler.unlink()
    done = call(command("train", "--resume", run, "--no-export"))
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["train", "--epochs", "0"], 2, "epochs"),
        (["train", "--image-size", "32"], 2, "HEIGHTxWIDTH"),
        (["train", "--plateau-factor", "2"], 2, "plateau_factor"),
        (["train", "--resume", "nowhere"], 1, "nowhere is not a run directory"),
        (["train", "--resume", "nowhere", "--epochs", "3", "--seed", "1"], 2, "leave out --seed"),
        (["train", "--dataset", "shapes", "--name", "my pictures (2)"], 1, "Choose another: --name my-pictures-2"),
        (["evaluate", "nowhere"], 1, "nowhere is not a run directory"),
        (["export", "nowhere"], 1, "nowhere is not a run directory"),
    ],
)
def test_usage_errors_are_explained(tmp_path, arguments, code, message):
    done = call(command(*arguments), cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(Path.cwd())})
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_run_is_never_overwritten_shared_or_trained_on_other_data(undisturbed, pictures, tmp_path):
    _, reference, _ = undisturbed
    again = call(train_arguments(pictures, reference))
    assert again.returncode == 1
    assert "contains a run already" in again.stderr

    run = tmp_path / "copy"
    shutil.copytree(reference, run)
    with (run / ".lock").open() as lock:
        import fcntl

        fcntl.flock(lock, fcntl.LOCK_EX)
        busy = call(command("evaluate", run))
    assert busy.returncode == 1
    assert "another process is using" in busy.stderr

    config = json.loads((run / "config.json").read_text())
    moved = tmp_path / "other"
    shutil.copytree(pictures, moved)
    next((moved / "test" / "class0").iterdir()).unlink()
    (run / "config.json").write_text(json.dumps({**config, "data": str(moved)}))
    other = call(command("evaluate", run))
    assert other.returncode == 1
    assert "was trained on other data" in other.stderr


def test_tensorboard_logs_on_request(pictures, tmp_path):
    run = tmp_path / "run"
    done = call(train_arguments(pictures, run, "--tensorboard"))
    assert done.returncode == 0, done.stderr
    tags = set()
    for path in run.glob("tensorboard/*/events*"):
        for event in tf.data.TFRecordDataset(str(path)).as_numpy_iterator():
            for value in tf.compat.v1.Event.FromString(event).summary.value:
                tags.add(f"{path.parent.name}/{value.tag}")
    assert tags == {
        "train/loss",
        "train/accuracy",
        "train/learning_rate",
        "train/images_per_s",
        "validation/loss",
        "validation/accuracy",
    }
