"""A service on a loopback port, and images of one colour for it."""

from __future__ import annotations

import io
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from tests.client.service import COLOURS, Handler, Server, Service

if TYPE_CHECKING:
    from tests.client.grpc_service import GrpcService


@pytest.fixture
def service() -> Iterator[Service]:
    """A service that has received no requests."""
    with Server(("127.0.0.1", 0), Handler) as server:
        server.service = Service(port=server.server_port)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server.service
        server.service.release.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def grpc_service() -> Iterator[GrpcService]:
    """A gRPC service that has received no requests."""
    from tests.client.grpc_service import serve  # not at the top: importing TensorFlow is slow

    with serve() as service:
        yield service


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port that refuses connections during the test."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        yield unused.getsockname()[1]


def pixels_of(colour: str) -> np.ndarray:
    pixels = np.zeros((4, 6, 3), np.uint8)
    pixels[..., COLOURS.index(colour)] = 200
    return pixels


def png_of(colour: str) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels_of(colour)).save(stream, "PNG")
    return stream.getvalue()


def write_png(path: Path, colour: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png_of(colour))
    return path


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    """Seven files whose colours repeat: red, green, blue, red, ..."""
    return [write_png(tmp_path / f"{index}.png", COLOURS[index % 3]) for index in range(7)]
