from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import serving
from tests.clients.service import IMAGE_FILE, make_server


@pytest.fixture(scope="session")
def service_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("clients")


@pytest.fixture(scope="session")
def service(service_folder: Path) -> Iterator[serving.Server]:
    """The running service with `colours` version 7 and `multi`; not to be changed."""
    server = make_server(service_folder).start()
    yield server
    assert server.stop() == 0, server.log


@pytest.fixture(scope="session")
def image_file(service_folder: Path, service: serving.Server) -> Path:
    """A blue JPEG of 50x40."""
    assert service.url
    return service_folder / IMAGE_FILE
