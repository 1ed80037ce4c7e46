"""Graceful shutdown: in-flight requests are finished, idle connections closed; a second signal exits immediately."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from serving.server_process import free_ports
from tests.serving.conftest import PROJECT, Server, picture
from tests.serving.http.conftest import ALIVE, HEALTH, ROUTES, Client, head, post, request, wait_until
from tests.serving.saved_models import save_colour_classifier, write_warmup_records

PREDICT = ROUTES["predict"]
SMALL = post("/predict", picture("blue"), content_type=b"image/png")
SIGNALS = [signal.SIGTERM, signal.SIGINT]


class Gated:
    """A server whose model calls block while the gate is shut."""

    def __init__(self, folder: Path, start: Callable[..., Server], *options: str) -> None:
        self._gate = folder / "gate"
        self.open()
        path = save_colour_classifier(folder / "models" / "colours" / "1", gate=self._gate)
        write_warmup_records(path, [np.zeros((1, 32, 32, 3), np.uint8)])
        self.server = start(*options, models_dir=folder / "models")
        self.server.wait_for("/readyz")

    def open(self) -> None:
        self._gate.touch()

    def shut(self) -> None:
        self._gate.unlink()

    def hold(self, stack: ExitStack, count: int = 1) -> list[Client]:
        """Return clients whose requests block in the model."""
        self.shut()
        clients = [stack.enter_context(Client(self.server.port, timeout_s=30)) for _ in range(count)]
        for client in clients:
            client.send(SMALL)
        self.server.wait_until(lambda: self.server.in_flight() == count)
        return clients


@pytest.fixture
def gated(tmp_path: Path, start: Callable[..., Server]) -> Callable[..., Gated]:
    return lambda *options: Gated(tmp_path, start, *options)


def send_signal(server: Server, number: signal.Signals = signal.SIGTERM) -> float:
    """Send a signal, wait until the port is closed, and return the time of the signal."""
    sent_s = time.monotonic()
    server.process.send_signal(number)
    wait_until(lambda: not server.accepts(), "the port is closed", within_s=5)
    return sent_s


def test_graceful_shutdown_finishes_requests_with_connection_close(gated: Callable[..., Gated]) -> None:
    """Requests that are in the model, pipelined, uploading, in their headers, or sent on idle connections."""
    model = gated("--drain-timeout-s", "20")
    server = model.server
    with ExitStack() as stack:
        upload, headers, idle, silent = (stack.enter_context(Client(server.port)) for _ in range(4))
        for client in (upload, headers, idle, silent):  # keep-alive connections, in use
            client.send(HEALTH)
            assert not client.read().closes
        held, pipeline = model.hold(stack, 2)
        pipeline.send(SMALL + HEALTH)
        upload.send(SMALL[:-10])
        headers.send(SMALL[:30])
        time.sleep(0.3)  # the server has read them

        send_signal(server)
        idle.send(HEALTH)  # sent before the client knows of the shutdown
        response = idle.read()
        assert (response.body, response.closes) == (ALIVE, True)
        assert idle.read_to_end() == b""
        upload.send(SMALL[-10:])
        headers.send(SMALL[30:])
        silent_s = time.monotonic()
        assert silent.read_to_end() == b""
        assert time.monotonic() - silent_s < 8, "an idle connection must be closed long before the drain timeout"
        assert server.process.poll() is None

        model.open()
        for client in (held, upload, headers):
            response = client.read()
            assert (PREDICT.label(response.body), response.closes) == ("blue", True)
            assert client.read_to_end() == b""
        responses = [pipeline.read() for _ in range(3)]
        assert [response.closes for response in responses] == [False, False, True]
        assert [response.status for response in responses] == [200, 200, 200]
        assert pipeline.read_to_end() == b""
    assert server.process.wait(timeout=10) == 0
    assert "Traceback" not in server.log, server.log


@pytest.mark.parametrize("number", SIGNALS)
def test_a_second_signal_exits_immediately(gated: Callable[..., Gated], number: signal.Signals) -> None:
    model = gated("--drain-timeout-s", "60")
    with ExitStack() as stack:
        model.hold(stack, 3)
        send_signal(model.server, number)
        time.sleep(0.5)
        assert model.server.process.poll() is None, "the server must wait for in-flight requests"
        model.server.process.send_signal(number)
        model.server.process.wait(timeout=20)  # not the 60 s of the drain timeout
    assert "Traceback" not in model.server.log, model.server.log


def test_stalled_clients_are_closed_after_the_drain_timeout(gated: Callable[..., Gated]) -> None:
    model = gated("--drain-timeout-s", "3")
    server = model.server
    with ExitStack() as stack:
        for sent in (b"G", HEALTH[:-1], SMALL[:-1], head("/predict", b"Content-Length: 50000000") + b"x" * 300_000):
            for _ in range(5):
                client = stack.enter_context(Client(server.port))
                client.send(sent)
        for _ in range(5):
            client = stack.enter_context(Client(server.port, receive_buffer=2_048))
            client.send(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 2_000)
        model.hold(stack, 3)
        sent_s = send_signal(server)
        assert server.process.wait(timeout=20) == 0
        assert time.monotonic() - sent_s < 3 + 4
    assert "Traceback" not in server.log, server.log


def test_graceful_shutdown_with_only_idle_connections_is_quick(start: Callable[..., Server]) -> None:
    server = start("--drain-timeout-s", "60")
    server.wait_for("/readyz")
    with ExitStack() as stack:
        for number in range(100):
            client = stack.enter_context(Client(server.port))
            if number % 2:
                client.send(HEALTH)
                assert client.read().body == ALIVE
        sent_s = send_signal(server)
        assert server.process.wait(timeout=20) == 0
        assert time.monotonic() - sent_s < 10


def test_graceful_shutdown_loses_no_keep_alive_request(start: Callable[..., Server]) -> None:
    """Each client sends its next request after each response, until one has `Connection: close`."""
    server = start("--drain-timeout-s", "20")
    server.wait_for("/readyz")

    def work(pause_s: float) -> str:
        with Client(server.port) as client:
            while True:
                client.send(SMALL)
                response = client.read()
                assert PREDICT.label(response.body) == "blue"
                if response.closes:
                    return "closed"
                time.sleep(pause_s)

    with ThreadPoolExecutor(16) as pool:
        workers = [pool.submit(work, pause_s) for pause_s in (0, 0.001, 0.01, 0.05) * 4]
        time.sleep(1)
        server.process.send_signal(signal.SIGTERM)
        assert [worker.result(timeout=20) for worker in workers] == ["closed"] * 16
    assert server.process.wait(timeout=20) == 0
    assert "Traceback" not in server.log, server.log


# Standard output and error


class Redirected(Server):
    """A server with redirected standard streams."""

    def __init__(self, models_dir: Path, *, redirection: str = "", output: int = subprocess.DEVNULL) -> None:
        self.port, self.grpc_port = free_ports(2)
        self.url = f"http://127.0.0.1:{self.port}"
        options = ["--models-dir", str(models_dir), "--access-log", "--log-level", "debug"]
        ports = ["--rest-port", str(self.port), "--grpc-port", str(self.grpc_port)]
        command = shlex.join([sys.executable, "-m", "serving", *options, *ports])
        self.process = subprocess.Popen(
            ["sh", "-c", f"exec {command} {redirection}"],
            cwd=PROJECT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )

    @property
    def log(self) -> str:
        return "(its output is redirected)"


@pytest.fixture
def redirect(one_model: Path) -> Iterator[Callable[..., Redirected]]:
    servers: list[Redirected] = []

    def start_redirected(**options: object) -> Redirected:
        servers.append(Redirected(one_model, **options))  # type: ignore[arg-type]
        return servers[-1]

    yield start_redirected
    for server in servers:
        if server.process.poll() is None:
            server.process.kill()
            server.process.wait()


def check_service(server: Server) -> None:
    """Check that responses contain no log output, and that the server exits with 0."""
    with Client(server.port) as client:
        for _ in range(20):
            client.send(SMALL + HEALTH + b"GET /nowhere HTTP/1.1\r\nHost: x\r\n\r\n")
            assert PREDICT.label(client.read().body) == "blue"
            assert client.read().body == ALIVE
            assert client.read().status == 404
    with Client(server.port) as client:  # causes log output
        client.send(b"no http\r\n\r\n")
        assert client.read().status == 400
    assert request(server, HEALTH).status == 200
    assert server.stop() == 0


@pytest.mark.timeout(60)
@pytest.mark.parametrize("redirection", [">&- 2>&-", "<&- >&- 2>&-", ">&-", "2>&-"])
def test_the_service_runs_with_closed_output(redirect: Callable[..., Redirected], redirection: str) -> None:
    server = redirect(redirection=redirection)
    server.wait_for("/readyz")
    # TensorFlow and gRPC write to descriptors 1 and 2, so these must not be sockets.
    streams = [Path(f"/proc/{server.process.pid}/fd/{number}") for number in (0, 1, 2)]
    assert not [stream for stream in streams if stream.exists() and stream.is_socket()]
    check_service(server)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("closed", ["immediately", "after the start"])
def test_the_service_runs_with_output_to_a_broken_pipe(redirect: Callable[..., Redirected], closed: str) -> None:
    reader, writer = os.pipe()
    server = redirect(output=writer)
    os.close(writer)
    if closed == "after the start":
        assert os.read(reader, 1)
    os.close(reader)
    server.wait_for("/readyz")
    check_service(server)


@pytest.mark.timeout(60)
def test_the_service_runs_with_output_to_a_full_disk(redirect: Callable[..., Redirected]) -> None:
    server = redirect(redirection=">/dev/full 2>/dev/full")
    server.wait_for("/readyz")
    check_service(server)
