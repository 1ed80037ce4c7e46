"""Models that are trained, exported and served with the project's commands, once per test session."""

from __future__ import annotations

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


def train_and_serve(folder: Path, *options: str) -> Iterator[Served]:
    command = [sys.executable, "-m", "training", "train", "--run", str(folder / "run")]
    done = subprocess.run(
        [*command, "--models-dir", str(folder / "models"), *options], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (version,) = (folder / "models").glob("*/1")
    server = Server(folder / "models", folder / "log")
    server.wait_for("/readyz")
    yield Served(server, folder / "run", version)
    assert server.stop() == 0


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    options = ("--dataset", "shapes", "--epochs", "3", "--batch-size", "32")
    yield from train_and_serve(tmp_path_factory.mktemp("shapes"), *options)


@pytest.fixture(scope="session")
def cifar10(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    if not os.environ.get("CIFAR10_DATA"):
        pytest.skip("CIFAR10_DATA names no folder with CIFAR-10")
    options = ("--variant", "subclass", "--loop", "custom", "--epochs", "1")
    yield from train_and_serve(tmp_path_factory.mktemp("cifar10"), *options)
