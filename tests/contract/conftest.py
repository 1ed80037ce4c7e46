"""Models trained and exported with the project's commands, once per session, and served by each of its processes."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.serving.conftest import Server, colours

__all__ = ["colours"]  # a fixture of tests/serving


@dataclass(frozen=True)
class Served:
    """A running service with one model, its training run and its exported version."""

    server: Server
    run: Path
    version: Path  # the exported SavedModel

    @property
    def model(self) -> str:
        return self.version.parent.name


def train(name: str, tmp_path_factory: pytest.TempPathFactory, *options: str) -> Path:
    """Train and export a model, once for all processes of the session; returns its folder: run/ and models/."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # the session's; each process has its own below
    folder = base / name
    command = [sys.executable, "-m", "training", "train", "--run", str(folder / "run")]
    command += ["--models-dir", str(folder / "models"), *options]
    with (base / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
    return folder


def serve(folder: Path, log: Path) -> Iterator[Served]:
    (version,) = (folder / "models").glob("*/1")
    server = Server(folder / "models", log)
    server.wait_for("/readyz")
    yield Served(server, folder / "run", version)
    assert server.stop() == 0


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = train("shapes", tmp_path_factory, "--dataset", "shapes", "--epochs", "3", "--batch-size", "32")
    yield from serve(folder, tmp_path_factory.mktemp("shapes-served") / "log")


@pytest.fixture(scope="session")
def cifar10(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A model of CIFAR-10, trained on a tenth of the images for training, evaluated on a fifth for the test."""
    if not os.environ.get("CIFAR10_DATA"):
        pytest.skip("CIFAR10_DATA names no folder with CIFAR-10")
    images = Path(os.environ["CIFAR10_DATA"], "images")
    data = tmp_path_factory.mktemp("cifar10-images")
    for split, step in (("train", 10), ("test", 5)):
        for folder in (images / split).iterdir():
            (data / split / folder.name).mkdir(parents=True)
            for image in sorted(folder.iterdir())[::step]:
                (data / split / folder.name / image.name).symlink_to(image)
    options = ("--data", str(data), "--variant", "subclass", "--loop", "custom", "--epochs", "1")
    folder = train("cifar10", tmp_path_factory, *options)
    yield from serve(folder, tmp_path_factory.mktemp("cifar10-served") / "log")
