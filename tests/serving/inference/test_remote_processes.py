"""Two of our gRPC servers behind one `--remote`: stopped, killed and hung under load, and back again."""

from __future__ import annotations

import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from serving.app import make_app
from serving.inference import remote_channels
from serving.server_process import free_ports
from serving.settings import Settings
from tests.serving.conftest import Server

pytestmark = pytest.mark.slow

CLIENTS = 4
BODY = {"inputs": {"a": [[1, 2]], "b": [[3, 4]]}}
PREDICT = "/v1/models/adder:predict"


class Backends:
    """Two servers on ports of their own; one that has ended can be started again there."""

    def __init__(self, folder: Path, adder: Path) -> None:
        shutil.copytree(adder, folder / "models" / "adder" / "1")
        self._folder = folder
        ports = free_ports(4)
        self._ports = [(ports[0], ports[1]), (ports[2], ports[3])]
        self._starts = 0
        self.servers = [self._start(number) for number in range(2)]
        self.address = ",".join(f"127.0.0.1:{server.grpc_port}" for server in self.servers)
        for server in self.servers:
            server.wait_for("/readyz")

    def _start(self, number: int) -> Server:
        self._starts += 1
        log = self._folder / f"backend{self._starts}.log"
        return Server(self._folder / "models", log, ports=self._ports[number])

    def restart(self, number: int) -> None:
        self.servers[number] = self._start(number)
        self.servers[number].wait_for("/readyz")

    def predictions(self, number: int) -> float:
        """How many rows a backend has predicted, by its own metrics."""
        page = httpx.get(self.servers[number].url + "/metrics", timeout=60).text
        lines = [line for line in page.splitlines() if line.startswith('serving_predicted_rows_total{model="adder"}')]
        return float(lines[0].rpartition(" ")[2]) if lines else 0.0

    def wait_for_requests(self, number: int) -> None:
        """Wait until requests reach a backend again."""
        before = self.predictions(number)
        self.servers[number].wait_until(lambda: self.predictions(number) > before + CLIENTS)


@pytest.fixture(scope="module")
def backends(tmp_path_factory: pytest.TempPathFactory, adder: Path) -> Iterator[Backends]:
    backends = Backends(tmp_path_factory.mktemp("backends"), adder)
    yield backends
    for server in backends.servers:
        if server.process.poll() is None:
            server.process.kill()
            server.process.wait()


@contextmanager
def load(send: Callable[[], int]) -> Iterator[Counter[int]]:
    """Send requests from CLIENTS threads, each its next one after a response; yields the count of each status."""
    statuses: Counter[int] = Counter()
    done = threading.Event()

    def run() -> None:
        while not done.is_set():
            statuses[send()] += 1

    with ThreadPoolExecutor(CLIENTS) as threads:
        clients = [threads.submit(run) for _ in range(CLIENTS)]
        try:
            yield statuses
        finally:
            done.set()
    for client in clients:
        client.result()


def wait_for_more(statuses: Counter[int], requests: int = 20 * CLIENTS) -> None:
    """Wait until further requests have been responded to."""
    until, end_s = statuses.total() + requests, time.monotonic() + 120
    while statuses.total() < until:
        assert time.monotonic() < end_s, statuses
        time.sleep(0.01)


def test_stopped_and_killed_backends_fail_no_request_and_rejoin(backends: Backends, tmp_path: Path) -> None:
    options = ("--remote", backends.address, "--remote-model", "adder", "--poll-interval-s", "0.2")
    front = Server(tmp_path / "none", tmp_path / "front.log", *options)
    limits = httpx.Limits(max_connections=CLIENTS)
    try:
        front.wait_for("/readyz")
        with (
            httpx.Client(base_url=front.url, timeout=60, limits=limits) as client,
            load(lambda: client.post(PREDICT, json=BODY).status_code) as statuses,
        ):
            for number in range(2):
                backends.wait_for_requests(number)
            backends.servers[0].process.kill()
            wait_for_more(statuses)
            backends.restart(0)
            backends.wait_for_requests(0)
            assert backends.servers[1].stop(signal.SIGTERM) == 0
            wait_for_more(statuses)
        assert set(statuses) == {200}
        backends.restart(1)
        page = httpx.get(front.url + "/metrics").text
        assert f'serving_remote_backend_up{{backend="127.0.0.1:{backends.servers[0].grpc_port}"}} 1.0' in page
        assert front.stop() == 0
    finally:
        front.process.kill()
        front.process.wait()


def test_requests_of_a_backend_that_hangs_are_retried_within_their_deadline(
    backends: Backends, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a keep-alive of a second instead of ten. The app runs here, so that the test polls when it wants to."""
    quick = ("grpc.keepalive_time_ms", "grpc.keepalive_timeout_ms", "grpc.http2.ping_timeout_ms")
    options = tuple((name, 1_000 if name in quick else value) for name, value in remote_channels.OPTIONS)
    assert sum(value == 10_000 for name, value in remote_channels.OPTIONS if name in quick) == len(quick)
    monkeypatch.setattr(remote_channels, "OPTIONS", options)
    app = make_app(Settings(models_dir=Path("unused"), remote=backends.address, remote_models=("adder",)))
    app.inference.repository.load()
    hung = backends.servers[0].process

    def send() -> int:
        return app.test_client().post(PREDICT, json=BODY).status_code

    with load(send) as statuses:
        for number in range(2):
            backends.wait_for_requests(number)
        hung.send_signal(signal.SIGSTOP)
        try:
            wait_for_more(statuses)  # at most one request of each client waits for the keep-alive
        finally:
            hung.send_signal(signal.SIGCONT)
        backends.wait_for_requests(0)
    assert set(statuses) == {200}
