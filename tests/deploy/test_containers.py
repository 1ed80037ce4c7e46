"""The image in containers that are hardened as in production: `make test-containers`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import yaml

from serving.settings import Settings
from tests.deploy.containers import (
    IMAGE,
    NOT_CONNECTED,
    RANDOM_USER,
    Container,
    HardenedContainer,
    Load,
    docker,
    wait_until,
    why_not,
)
from tests.deploy.test_manifests import DEPLOY, compose_command
from tests.serving.conftest import picture
from tests.serving.saved_models import save_colour_classifier

REASON = why_not()
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.skipif(REASON is not None, reason=str(REASON))]

# All files below some folders, and whether there are others where there should be none.
LIST_FILES = """
import json, os
paths = [os.path.join(top, name) for root in ("/app", "/venv", "/root", "/home", "/tmp", "/run", "/etc")
         for top, _, names in os.walk(root) for name in names]
print(json.dumps([paths, sorted(os.listdir("/app"))]))
"""
READ_STATUS = "print(open('/proc/1/status').read())"
# What base images and the Dockerfile set, and no more: no index, no token.
KNOWN_VARIABLES = {"PATH", "LANG", "GPG_KEY", "PYTHON_VERSION", "PYTHON_SHA256"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of models that any user can read."""
    folder = tmp_path_factory.mktemp("models")
    save_colour_classifier(folder / "colours" / "1")
    folder.chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def container(models: Path) -> Iterator[HardenedContainer]:
    with HardenedContainer(models, memory="1664m") as running:
        yield running


def predict(url: str, colour: str = "blue") -> str:
    response = httpx.post(f"{url}/predict", content=picture(colour), headers={"Content-Type": "image/png"}, timeout=60)
    assert response.status_code == 200, response.text
    return str(response.json()["predictions"][0]["label"])


def test_the_image_has_the_service_and_neither_training_tests_nor_secrets() -> None:
    listed = docker("run", "--rm", "--user", "0", "--entrypoint", "/venv/bin/python", IMAGE, "-c", LIST_FILES)
    paths, packages = json.loads(listed)
    assert packages == ["image_formats", "serving"]
    assert not [path for path in paths if path.startswith("/app") and "test" in path]
    installed = {path.split("/site-packages/")[1].split("/")[0] for path in paths if "/site-packages/" in path}
    assert "tensorflow" in installed
    assert not installed & {"keras", "pip", "pytest", "tests", "training", "tensorboard"}
    assert not [
        path
        for path in paths
        if path.endswith(("pip.conf", ".netrc", ".lock", "id_rsa")) and not path.startswith("/etc/.pwd")
    ]
    environment = json.loads(docker("inspect", "--format", "{{json .Config.Env}}", IMAGE))
    names = {entry.split("=")[0] for entry in environment}
    assert not {name for name in names if not name.startswith(("PYTHON", "SERVING_"))} - KNOWN_VARIABLES
    history = docker("history", "--no-trunc", "--format", "{{.CreatedBy}}", IMAGE)
    assert "PIP_" not in history
    assert "://" not in history.replace("http://127.0.0.1:8501", "")


def test_a_random_user_without_capabilities_gets_predictions(container: HardenedContainer) -> None:
    assert [predict(container.url, colour) for colour in ("red", "green", "blue")] == ["red", "green", "blue"]
    status = dict(line.split(":\t", 1) for line in container.run_python(READ_STATUS).splitlines() if ":\t" in line)
    assert status["Uid"].split() == [RANDOM_USER.split(":")[0]] * 4
    assert {int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {0}
    assert status["NoNewPrivs"] == "1"


def test_the_health_check_reports_healthy(container: HardenedContainer) -> None:
    wait_until(container.is_healthy, "the container is healthy")


def test_hostile_requests_do_not_exhaust_the_memory_limit(container: HardenedContainer) -> None:
    """Many large batches and uploads at a time: more than the container could hold."""
    image = b"[" + b",".join([b"[" + b",".join([b"[12,34,56]"] * 32) + b"]"] * 32) + b"]"
    batch = b'{"instances":[' + b",".join([image] * 2_500) + b"]}"
    assert len(batch) < Settings.max_request_bytes
    too_large = b"\0" * (Settings.max_request_bytes + 1)

    def send(content: bytes) -> int:
        url = f"{container.url}/v1/models/colours:predict"
        return httpx.post(url, content=content, timeout=300).status_code

    with ThreadPoolExecutor(24) as pool:
        batches = list(pool.map(send, [batch] * 72))
    with ThreadPoolExecutor(8) as pool:
        uploads = list(pool.map(send, [too_large] * 8))
    assert set(batches) <= {200, 413, 503}
    assert set(uploads) == {413}
    assert predict(container.url) == "blue"
    state = container.state
    assert (state["OOMKilled"], state["Running"], container.inspect()["RestartCount"]) == (False, True, 0)


def test_nothing_is_written_outside_of_tmpfs(container: HardenedContainer) -> None:
    predict(container.url)
    assert container.written_files() == []


def test_stop_during_the_start_ends_the_container(models: Path) -> None:
    """With a first process that passes signals on: the kernel ignores them for process 1 until it handles them."""
    container = Container(docker("run", "--detach", "--init", "--volume", f"{models}:/models:ro", IMAGE))
    try:
        docker("stop", "--time", "120", container.name)
        assert container.state["ExitCode"] in (0, 128 + signal.SIGTERM)
    finally:
        docker("rm", "--force", container.name)


def test_stop_under_load_finishes_every_request(models: Path) -> None:
    with HardenedContainer(models, memory="1664m") as container:
        with Load(f"{container.url}/predict", picture("blue", (1_500, 1_500))) as load:
            wait_until(lambda: len(load.outcomes) > 50, "some requests are finished")
            stopped_s = time.monotonic()
            docker("stop", "--time", "45", container.name)
            load.join()
        responses = [outcome for outcome in load.outcomes if outcome.error is None]
        assert {outcome.status for outcome in responses} == {200}
        assert [outcome for outcome in responses if outcome.sent_s < stopped_s < outcome.done_s], "none was in flight"
        refused = [outcome for outcome in load.outcomes if outcome.error is not None]
        assert all(isinstance(outcome.error, (httpx.ConnectError, httpx.ConnectTimeout)) for outcome in refused), (
            refused
        )
        assert all(outcome.done_s > stopped_s for outcome in refused)
        state = container.state
        assert (state["ExitCode"], state["OOMKilled"]) == (0, False)


@dataclass
class Pair:
    """Both services of deploy/compose.yaml."""

    front: Container
    backend: Container


@pytest.fixture(scope="module")
def pair(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Start compose.yaml as it is, but for the image's name, the build and the ports of this machine."""
    command = compose_command()
    if command is None:
        pytest.skip("there is no compose command")
    document = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    for service in (document["services"]["backend"], document["services"]["service"]):
        service["image"] = IMAGE
        del service["build"]
        service.pop("ports", None)
    del document["x-hardened"]
    file = tmp_path_factory.mktemp("compose") / "compose.yaml"
    file.write_text(yaml.safe_dump(document))
    command = [*command, "-p", f"containers-{uuid.uuid4().hex[:8]}", "-f", str(file)]
    environment = os.environ | {"MODELS": str(models)}

    def compose(*arguments: str) -> str:
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    try:
        compose("up", "--detach", "--no-build")
        yield Pair(Container(compose("ps", "-q", "service")), Container(compose("ps", "-q", "backend")))
    finally:
        compose("down", "--timeout", "1")


def test_the_front_of_the_pair_predicts_with_the_model_of_the_backend(pair: Pair) -> None:
    for container in (pair.backend, pair.front):
        wait_until(container.is_healthy, "the pair is healthy")
    assert [predict(pair.front.url, colour) for colour in ("red", "green", "blue")] == ["red", "green", "blue"]


def test_a_killed_backend_is_503_with_retry_after_until_it_is_back(pair: Pair) -> None:
    wait_until(pair.front.is_ready, "the pair is ready")
    with Load(f"{pair.front.url}/predict", picture("blue"), threads=4) as load:
        wait_until(lambda: len(load.outcomes) > 50, "some requests are finished")
        pair.backend.kill_from_outside()
        wait_until(lambda: 503 in load.statuses(), "the front has noticed")
        wait_until(lambda: pair.backend.inspect()["RestartCount"] == 1, "the backend is restarted")
        wait_until(lambda: load.outcomes[-1].status == 200, "predictions are back")
    assert load.statuses() == {200, 503}
    assert all(outcome.retry_after for outcome in load.outcomes if outcome.status == 503)
    assert predict(pair.front.url) == "blue"


def test_the_front_of_the_pair_stops_under_load_without_a_failed_request(pair: Pair) -> None:
    """The last test of the pair: its containers stay unharmed, unwritten, and the front ends."""
    wait_until(pair.front.is_ready, "the pair is ready")
    with Load(f"{pair.front.url}/predict", picture("blue")) as load:
        wait_until(lambda: len(load.outcomes) > 50, "some requests are finished")
        docker("stop", "--time", "45", pair.front.name)
        load.join()
    assert load.statuses() <= {200, None}
    failed = [outcome.error for outcome in load.outcomes if outcome.error is not None]
    assert all(isinstance(error, NOT_CONNECTED) for error in failed), failed
    assert pair.front.state["ExitCode"] == 0
    for container in (pair.front, pair.backend):
        assert not container.state["OOMKilled"]
        assert container.written_files() == []
