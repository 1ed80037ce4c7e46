"""The public API of the package, as users' programs call it."""

from __future__ import annotations

import doctest
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

import serving
from serving import app as app_module
from serving import server_process
from serving.server_process import free_ports
from tests.serving.conftest import PROJECT, picture


def test_the_public_names() -> None:
    assert serving.__all__ == ["Server", "Settings", "StartupError", "__version__", "create_app", "serve"]
    assert all(hasattr(serving, name) for name in serving.__all__)
    assert (PROJECT / "serving" / "py.typed").exists()
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        serving.nothing  # noqa: B018


@pytest.mark.parametrize(
    ("module", "name"), [(app_module, "create_app"), (server_process, "Server")], ids=["create_app", "Server"]
)
def test_the_examples_run(module: object, name: str, models_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(models_dir.parent)
    finder = doctest.DocTestFinder(recurse=False)
    (example,) = finder.find(getattr(module, name), name, globs={"serving": serving, "httpx": httpx})
    assert example.examples
    assert doctest.DocTestRunner().run(example).failed == 0


def test_an_app_loads_its_models_at_the_first_request_but_a_health_check_does_not_wait(models_dir: Path) -> None:
    client = serving.create_app(models_dir).test_client()
    assert client.get("/healthz").status_code == 200
    response = client.post("/predict", data=picture("blue"), content_type="image/png")
    assert response.json
    assert response.json["predictions"][0]["label"] == "blue"
    assert (client.get("/readyz").json or {})["ready"]


def test_a_folder_that_is_missing_is_a_startup_error(tmp_path: Path) -> None:
    with pytest.raises(serving.StartupError, match="there is no models folder"):
        serving.create_app(tmp_path / "nowhere")
    with pytest.raises(serving.StartupError, match=r"the server ended with 1; its log:\n.*there is no models folder"):
        serving.Server(tmp_path / "nowhere").start()


def test_a_server_stops_gracefully_and_its_log_stays(models_dir: Path) -> None:
    server = serving.Server(models_dir, max_batch_size=4).start()
    with pytest.raises(serving.StartupError, match="has been started already"):
        server.start()
    assert httpx.get(server.url + "/readyz").status_code == 200
    assert server.stop() == 0
    assert "ready" in server.log
    with pytest.raises(httpx.ConnectError):
        httpx.get(server.url + "/readyz")


def test_serve_blocks_until_a_signal_and_returns(models_dir: Path) -> None:
    rest_port, grpc_port = free_ports(2)
    program = f"import serving; serving.serve({str(models_dir)!r}, port={rest_port}, grpc_port={grpc_port}); print('x')"
    with subprocess.Popen([sys.executable, "-c", program], cwd=PROJECT, stdout=subprocess.PIPE) as process:
        wait_until_ready(f"http://127.0.0.1:{rest_port}", process)
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=30)[0] == b"x\n"
        assert process.returncode == 0


def wait_until_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    while True:
        assert process.poll() is None
        try:
            if httpx.get(url + "/readyz", timeout=60).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.05)


@pytest.fixture(params=[[], ["--preload"]], ids=["load in workers", "preload"])
def gunicorn(request: pytest.FixtureRequest, models_dir: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """`gunicorn "serving:create_app()"` with two worker processes."""
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "gunicorn", "serving:create_app()", "--workers", "2", "--timeout", "120"]
    with subprocess.Popen(
        [*command, "--bind", f"127.0.0.1:{port}", *request.param],
        cwd=models_dir.parent,
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
        stderr=subprocess.DEVNULL,
    ) as process:
        yield f"http://127.0.0.1:{port}", process
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0


def test_gunicorn_serves_the_app_with_models_loaded_after_the_fork(
    gunicorn: tuple[str, subprocess.Popen[bytes]],
) -> None:
    url, process = gunicorn
    wait_until_ready(url, process)
    files = {"image": ("blue.png", picture("blue"))}
    for _ in range(4):
        response = httpx.post(url + "/predict", files=files, timeout=60)
        assert response.json()["predictions"][0]["label"] == "blue"
    missing = httpx.post(url + "/v1/models/colours/versions/3:predict", json={"instances": [1]}, timeout=60)
    assert missing.json() == {"error": "Servable not found for request: Specific(colours, 3)"}
    assert httpx.post(url + "/v1/models/colours:predict", content=b"{", timeout=60).status_code == 400
    assert "tensorflow" not in Path(f"/proc/{process.pid}/maps").read_text()  # of gunicorn's own process, which forks
