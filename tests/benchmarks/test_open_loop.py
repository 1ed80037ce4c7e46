"""The open-loop generator against a server that the test controls."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from benchmarks.load import Target
from benchmarks.open_loop import OpenLoop, draw_poisson, send_on_time


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    release = threading.Event()  # before it, no response is sent
    bodies: list[bytes] = []  # noqa: RUF012

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.bodies.append(body)
        self.release.wait(30)
        content = body * 20_000  # arrives in parts
        self.send_response(503 if body == b"refuse" else 200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    Handler.release, Handler.bodies = threading.Event(), []
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        Handler.release.set()
        running.shutdown()


def target(server: ThreadingHTTPServer, *bodies: bytes) -> Target:
    return Target(f"http://127.0.0.1:{server.server_port}/path", {"X-Header": "1"}, bodies)


def test_a_stalled_server_delays_every_request_that_is_due(server: ThreadingHTTPServer) -> None:
    """No coordinated omission: 60 requests are sent although none has a response, more than connections at first."""
    due_s = np.linspace(0, 0.3, 60)
    threading.Thread(target=release_after, args=(60,)).start()
    done = send_on_time(target(server, b"a", b"b"), due_s, pause_s=1e-4)
    assert len(done.latencies_s) == 60
    assert not done.failed.any()
    assert sorted(Handler.bodies) == [b"a"] * 30 + [b"b"] * 30
    assert done.latencies_s[0] > done.latencies_s[-1]  # it was due earlier, and all were answered after the last
    assert done.latencies_s.min() > 0


def release_after(requests: int) -> None:
    """Let the server respond when it has so many requests."""
    until_s = time.monotonic() + 60
    while len(Handler.bodies) < requests and time.monotonic() < until_s:
        time.sleep(0.01)
    Handler.release.set()


def test_refusals_and_closed_connections_have_failed(server: ThreadingHTTPServer) -> None:
    Handler.release.set()
    done = send_on_time(target(server, b"good", b"refuse"), np.linspace(0, 0.1, 10), pause_s=1e-4)
    assert done.failed.tolist() == [False, True] * 5


def test_it_says_when_it_could_not_keep_up() -> None:
    def run(lag_s: float, latency_s: float) -> bool:
        lags_s, latencies_s = np.full(100, lag_s), np.full(100, latency_s)
        return OpenLoop(np.arange(100.0), lags_s, latencies_s, np.zeros(100, bool)).kept_up

    assert run(1e-4, 1e-3)
    assert not run(2e-3, 3e-3)
    assert run(2e-3, 1.0)


def test_arrivals_are_those_of_a_poisson_process_and_the_seed_decides() -> None:
    due_s = draw_poisson(np.random.default_rng(0), requests_per_s=1_000, seconds=20)
    gaps_s = np.diff(due_s)
    assert len(due_s) == pytest.approx(20_000, rel=0.03)
    assert gaps_s.min() >= 0
    assert gaps_s.std() == pytest.approx(gaps_s.mean(), rel=0.05)
    assert np.array_equal(due_s, draw_poisson(np.random.default_rng(0), requests_per_s=1_000, seconds=20))
