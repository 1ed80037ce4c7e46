"""Several replicas of the model, in one process and in worker processes, train what a single replica trains."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training.checkpoints import read_best_state
from training.config import TrainingConfig
from training.data.shapes import CLASS_NAMES, draw_shapes
from training.distribution import Cluster
from training.errors import ClusterError
from training.run_dir import RunDir

PROJECT = Path(__file__).parents[2]


def tf_config(workers: list[str], index: int) -> dict[str, str]:
    return {"TF_CONFIG": json.dumps({"cluster": {"worker": workers}, "task": {"type": "worker", "index": index}})}


def test_the_first_worker_is_the_chief() -> None:
    workers = ["a:1", "b:2"]
    chief, other = (Cluster.from_environment(tf_config(workers, index)) for index in (0, 1))
    assert (chief.workers, chief.is_chief, other.is_chief) == (("a:1", "b:2"), True, False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "needs the environment variable TF_CONFIG"),
        ("{", "TF_CONFIG is invalid: expected JSON such as"),
        ('{"cluster": {"worker": "a:1"}, "task": {"type": "worker", "index": 0}}', "is invalid"),
        ('{"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "worker", "index": 2}}', "not 2"),
        ('{"cluster": {"worker": ["a:1"]}, "task": {"type": "worker", "index": 0}}', "at least two"),
        ('{"cluster": {"worker": ["a:1", "a:1"]}, "task": {"type": "worker", "index": 0}}', "different"),
        ('{"cluster": {"worker": ["a:1", "b:1"], "ps": []}, "task": {"type": "worker", "index": 0}}', "type worker"),
        ('{"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "chief", "index": 0}}', "type worker"),
    ],
)
def test_an_invalid_tf_config_is_explained(text: str, message: str) -> None:
    with pytest.raises(ClusterError, match=message):
        Cluster.from_environment({"TF_CONFIG": text})


def test_fit_with_several_replicas_is_refused() -> None:
    with pytest.raises(ValueError, match="needs the loop custom: Keras's fit fails with several replicas"):
        TrainingConfig(strategy="multiworker", loop="fit")


@pytest.mark.slow
def test_replicas_in_one_process_train_what_a_single_one_trains() -> None:
    """The devices of a process are fixed before TensorFlow starts, so this runs in a process of its own."""
    command = [sys.executable, "-m", "tests.training.replicas"]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    losses = json.loads(done.stdout.splitlines()[-1])
    for variant, (single, mirrored) in losses.items():
        np.testing.assert_allclose(mirrored, single, rtol=2e-3, err_msg=variant)
        np.testing.assert_allclose(mirrored[0], single[0], rtol=1e-5, err_msg=variant)


class Workers:
    """Worker processes of `train`, on free ports of this machine."""

    def __init__(self, run: Path, *options: str, count: int = 2) -> None:
        sockets = [socket.socket() for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        addresses = [f"127.0.0.1:{each.getsockname()[1]}" for each in sockets]
        for each in sockets:
            each.close()
        self.logs = [run.with_name(f"{run.name}-{time.monotonic_ns()}-{index}.log") for index in range(count)]
        command = [sys.executable, "-m", "training", "train", "--no-export", *options]
        self.processes = []
        for index, log in enumerate(self.logs):
            with log.open("wb") as file:
                environ = {**os.environ, **tf_config(addresses, index), "TF_CPP_MIN_LOG_LEVEL": "3"}
                self.processes.append(subprocess.Popen(command, cwd=PROJECT, env=environ, stdout=file, stderr=file))

    def wait(self) -> list[int]:
        return [process.wait(timeout=900) for process in self.processes]

    def text(self) -> str:
        return "\n".join(log.read_text() for log in self.logs)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    split = draw_shapes(240, seed=0)
    for number, (image, label) in enumerate(zip(split.images, split.labels, strict=True)):
        path = folder / CLASS_NAMES[label] / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(path)
    return folder


@pytest.fixture(scope="module")
def options(pictures: Path) -> list[str]:
    common = ["--dataset", "folder", "--data", str(pictures), "--loop", "custom", "--deterministic"]
    return [*common, "--batch-size", "32", "--epochs", "3"]


@pytest.fixture(scope="module")
def single(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with one process."""
    run = tmp_path_factory.mktemp("runs") / "single"
    command = [sys.executable, "-m", "training", "train", "--no-export", "--run", str(run), *options]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    return run


def metrics(run: Path) -> np.ndarray:
    rows = RunDir.open(run).read_history()
    return np.array([(row.loss, row.val_loss, row.accuracy, row.val_accuracy, row.learning_rate) for row in rows])


four = pytest.param(
    4, marks=pytest.mark.skipif("FOUR_WORKERS" not in os.environ, reason="takes minutes: make test-workers")
)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("count", [2, four])
def test_workers_train_what_one_process_trains_and_resume_exactly_when_one_is_killed(
    count: int, options: list[str], single: Path, tmp_path: Path
) -> None:
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    workers = Workers(undisturbed, "--run", str(undisturbed), "--strategy", "multiworker", *options, count=count)
    assert workers.wait() == [0] * count, workers.text()
    losses, expected = (metrics(run)[:, :2] for run in (undisturbed, single))
    assert losses.shape == (3, 2)
    np.testing.assert_allclose(losses, expected, rtol=2e-3)

    workers = Workers(killed, "--run", str(killed), "--strategy", "multiworker", *options, count=count)
    deadline_s = time.monotonic() + 900
    while not (killed / "history.csv").exists():  # the first epoch is saved
        assert time.monotonic() < deadline_s, workers.text()
        time.sleep(0.01)
    workers.processes[-1].kill()
    assert workers.wait()[0] in (0, 1)  # 0: it was in its last epoch already
    if workers.processes[0].returncode:
        assert "another worker has ended or cannot be reached" in workers.text()
        assert read_best_state(killed / "checkpoints") is not None
    # Streamed from here on: the images and their order are the same.
    resumed = Workers(killed, "--resume", str(killed), "--stream", count=count)
    assert resumed.wait() == [0] * count, resumed.text()
    np.testing.assert_array_equal(metrics(killed), metrics(undisturbed))
