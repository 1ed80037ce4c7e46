"""Real SavedModels, the app that serves them, and server processes on loopback ports."""

from __future__ import annotations

import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from flask.testing import FlaskClient
from PIL import Image

from serving.api.flask_app import ServingApp

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from benchmarks import memory_cgroup
from serving.app import make_app
from serving.server_process import free_ports
from serving.settings import Settings
from tests.serving import saved_models

PROJECT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One version folder: a classifier of 32x32 pictures, with two warm-up records."""
    path = saved_models.save_colour_classifier(tmp_path_factory.mktemp("colours") / "1")
    saved_models.write_warmup_records(path, [np.zeros((rows, 32, 32, 3), np.uint8) for rows in (1, 3)])
    return path


@pytest.fixture(scope="session")
def adder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One version folder: a model that takes no pictures."""
    return saved_models.save_adder(tmp_path_factory.mktemp("adder") / "1")


@pytest.fixture
def models_dir(tmp_path: Path, colours: Path) -> Path:
    """A models folder to change at will: `colours`, versions 2 and 10."""
    for version in ("2", "10"):
        shutil.copytree(colours, tmp_path / "models" / "colours" / version)
    return tmp_path / "models"


@pytest.fixture(scope="session")
def app(tmp_path_factory: pytest.TempPathFactory, colours: Path) -> ServingApp:
    """The app with one model, `colours` version 7, loaded. Not to be changed."""
    models_dir = tmp_path_factory.mktemp("models")
    shutil.copytree(colours, models_dir / "colours" / "7")
    app = make_app(Settings(models_dir=models_dir, max_request_bytes=200_000, max_image_pixels=250_000, max_images=5))
    app.inference.repository.load()
    return app


@pytest.fixture
def client(app: ServingApp) -> FlaskClient:
    return app.test_client()


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def picture(colour: str, size: tuple[int, int] = (32, 32), kind: str = "PNG") -> bytes:
    return encode(Image.new("RGB", size, colour), kind)


class Server:
    """`python -m serving` in a process of its own."""

    def __init__(
        self,
        models_dir: Path,
        log: Path,
        *options: str,
        ports: tuple[int, int] | None = None,
        program: tuple[str, str] = ("-m", "serving"),
    ) -> None:
        self.port, self.grpc_port = ports or free_ports(2)
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = log
        command = [sys.executable, *program, "--models-dir", str(models_dir)]
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [*command, "--rest-port", str(self.port), "--grpc-port", str(self.grpc_port), *options],
                cwd=PROJECT,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def log(self) -> str:
        return self._log.read_text()

    def accepts(self) -> bool:
        """Whether it still listens."""
        try:
            socket.create_connection(("127.0.0.1", self.port)).close()
        except OSError:
            return False
        return True

    def in_flight(self) -> int:
        """How many requests are being answered, the one that asks left out."""
        page = httpx.get(self.url + "/metrics").text
        return int(float(page.split("\nserving_requests_in_flight ")[1].split()[0])) - 1

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Ask until it holds; fails if the server ends first."""
        while not condition():
            assert self.process.poll() is None, f"ended with {self.process.returncode}: {self.log}"
            time.sleep(0.02)

    def wait_for(self, path: str, status: int = 200) -> httpx.Response:
        """Wait until it answers with this status, and return the answer."""
        self.wait_until(self.accepts)
        # The port is open before TensorFlow is imported, which takes seconds on a busy machine.
        self.wait_until(lambda: httpx.get(self.url + path, timeout=60).status_code == status)
        return httpx.get(self.url + path)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and wait for the end; returns the exit code."""
        self.process.send_signal(number)
        return self.process.wait(timeout=60)


@pytest.fixture
def start_server(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(models_dir: Path, *options: str) -> Server:
        servers.append(Server(models_dir, tmp_path / f"server{len(servers)}.log", *options))
        return servers[-1]

    yield start
    for server in servers:
        if server.process.poll() is None:
            server.process.kill()  # its worker ends with it
            server.process.wait()


_NO_CGROUPS = memory_cgroup.why_unavailable()
requires_cgroups = pytest.mark.skipif(_NO_CGROUPS is not None, reason=f"needs memory cgroups: {_NO_CGROUPS}")
