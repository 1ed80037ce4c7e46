"""Two workers on the same ports: crashes, versions, model control, metrics, replacement, and the end."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import httpx
import pytest

from serving.server_process import free_ports
from tests.contract.test_swaps import publish
from tests.serving.conftest import Server
from tests.serving.workers.conftest import HttpConnection, Load, connections_of, serving_workers, worker_pids

# For a longer run by hand: WORKERS_VERSIONS=20.
VERSIONS = int(os.environ.get("WORKERS_VERSIONS", "3"))


def connect_to_each(server: Server, stack: ExitStack) -> list[HttpConnection]:
    """Return a connection to each worker."""
    found: dict[int, HttpConnection] = {}
    pids = serving_workers(server)
    while len(found) < len(pids):
        connection = stack.enter_context(closing(HttpConnection(server.port)))
        connection.request("GET", "/healthz")
        (pid,) = (pid for pid in pids if connection.port in connections_of(pid, server.port))
        found.setdefault(pid, connection)
    return [found[pid] for pid in pids]


def wait_for_state(server: Server, worker: HttpConnection, version: int, state: str) -> dict[str, str]:
    """Wait until a worker reports this state of a version, and return the version's error."""
    found: dict[str, Any] = {}

    def is_reached() -> bool:
        status, body = worker.request("GET", f"/v1/models/versioned/versions/{version}")
        found.update(json.loads(body)["model_version_status"][0] if status == 200 else {})
        return found.get("state") == state

    server.wait_until(is_reached)
    error: dict[str, str] = found["status"]
    return error


def read_sum(page: str, metric: str) -> float:
    return sum(float(line.rpartition(" ")[2]) for line in page.splitlines() if line.startswith(metric))


def test_only_the_workers_load_tensorflow_and_connections_are_divided(server: Server) -> None:
    maps = {pid: Path(f"/proc/{pid}/maps").read_text() for pid in (server.process.pid, *worker_pids(server))}
    assert ["libtensorflow" in text for text in maps.values()] == [False, True, True]
    with ExitStack() as stack:
        for _ in range(40):  # none of them waits for a response, so a worker could take all at once
            stack.enter_context(closing(HttpConnection(server.port)))
        pids = worker_pids(server)
        server.wait_until(lambda: sum(len(connections_of(pid, server.port)) for pid in pids) >= 40)
        assert min(len(connections_of(pid, server.port)) for pid in pids) >= 10


def test_a_killed_worker_fails_only_the_requests_it_held(server: Server) -> None:
    """The first worker; the second one is killed in the test of the metrics."""
    pid = serving_workers(server)[0]
    with Load(server) as load:
        os.kill(pid, signal.SIGSTOP)  # so that its connections stay the same until it is killed
        held = connections_of(pid, server.port)
        os.kill(pid, signal.SIGKILL)
        server.wait_until(lambda: pid not in worker_pids(server))
        load.wait()
        server.wait_until(lambda: len(serving_workers(server)) == 2)
        load.wait()
    assert {port for client in load.http for port, _ in client.failures} <= held
    assert all(len(client.failures) <= 1 for client in load.http)
    # The second one was on its way to the socket of the killed worker when that was closed.
    assert all(len(client.failures) <= 2 for client in load.grpc), load.failures
    assert len(load.failures) < len(load.clients)


def test_versions_change_under_load_in_all_workers_at_once(server: Server, models: Path) -> None:
    first = max(int(path.name) for path in (models / "versioned").iterdir()) + 1
    with Load(server) as load, ExitStack() as stack:
        workers = connect_to_each(server, stack)
        for version in range(first, first + VERSIONS):
            publish(models / "versioned", version)
            wait_for_state(server, workers[0], version, "AVAILABLE")
            # Every worker serves it by then.
            assert [worker.predict() for worker in workers] == [version] * 2
            load.wait()
        wait_for_state(server, workers[1], version - 1, "END")
    assert load.failures == []
    for client in load.clients:
        assert all(versions == sorted(versions) for versions in client.versions)
        assert {version for versions in client.versions for version in versions} >= {*range(first, first + VERSIONS)}


def test_a_version_that_fails_is_served_by_no_worker(server: Server, models: Path) -> None:
    (broken := models / "versioned" / "1000").mkdir()
    (broken / "saved_model.pb").write_bytes(b"\xff corrupt")
    try:
        with ExitStack() as stack:
            workers = connect_to_each(server, stack)
            for worker in workers:
                assert wait_for_state(server, worker, 1000, "END")["error_code"] == "DATA_LOSS"
                assert worker.predict() < 1000
    finally:
        shutil.rmtree(broken)


def test_models_are_loaded_and_unloaded_in_all_workers(server: Server) -> None:
    with ExitStack() as stack:
        one, other = connect_to_each(server, stack)
        version = one.predict()
        assert one.request("POST", "/v2/repository/models/versioned/unload")[0] == 200
        for worker in (one, other):
            status, body = worker.request("GET", "/v2/models/versioned/ready")
            assert status == 503 or b"unloaded" in body
            status, body = worker.request("POST", "/v1/models/versioned:predict", {"instances": [1.0]})
            assert status == 404
        assert other.request("POST", "/v2/repository/models/versioned/load")[0] == 200
        assert (one.predict(), other.predict()) == (version, version)


def test_metrics_and_statistics_are_those_of_all_workers(server: Server) -> None:
    counts = 'serving_requests_total{model="versioned",route="/v1/models/<model>:predict",status="200"}'
    with ExitStack() as stack:
        workers = connect_to_each(server, stack)
        version = workers[0].predict()
        before = workers[0].request("GET", "/metrics")[1].decode()
        statistics = f"/v2/models/versioned/versions/{version}/stats"
        successes = json.loads(workers[0].request("GET", statistics)[1])["model_stats"][0]["inference_count"]
        for worker in workers:
            for _ in range(5):
                worker.predict()
        pages = [worker.request("GET", "/metrics")[1].decode() for worker in workers]
        for page in pages:
            assert read_sum(page, counts) == read_sum(before, counts) + 10
            assert read_sum(page, "serving_workers ") == 2
            assert read_sum(page, "serving_ready ") == 1
            assert read_sum(page, 'serving_model_version_state{model="versioned",state="AVAILABLE"') == 1
            assert read_sum(page, "serving_connections ") >= 2
            assert read_sum(page, "serving_requests_in_flight ") >= 1
            assert read_sum(page, "process_resident_memory_bytes ") > 2 * 300e6  # two processes with TensorFlow
        for worker in workers:
            stats = json.loads(worker.request("GET", statistics)[1])["model_stats"][0]
            assert stats["inference_count"] == successes + 2 * 10  # rows
        pid = serving_workers(server)[1]
        os.kill(pid, signal.SIGKILL)
        after = workers[0].request("GET", "/metrics")[1].decode()
        server.wait_until(lambda: pid not in worker_pids(server) and len(serving_workers(server)) == 2)
        last = workers[0].request("GET", "/metrics")[1].decode()
        for metric in (counts, ":tensorflow:serving:request_count{", "process_cpu_seconds_total", "serving_call_rows_"):
            assert read_sum(pages[1], metric) <= read_sum(after, metric) <= read_sum(last, metric), metric
        assert read_sum(last, counts) == read_sum(pages[1], counts)
        assert read_sum(last, "serving_worker_restarts_total") > read_sum(before, "serving_worker_restarts_total")
    if shutil.which("promtool"):
        done = subprocess.run(["promtool", "check", "metrics"], input=last, capture_output=True, text=True)
        lines = done.stderr.splitlines()
        # TensorFlow Serving's own names break its rules.
        assert [line for line in lines if not line.startswith(":tensorflow:serving:")] == []


def test_a_hung_worker_is_replaced(server: Server) -> None:
    pid = serving_workers(server)[0]
    os.kill(pid, signal.SIGSTOP)
    # The others accept what it does not.
    assert httpx.get(server.url + "/readyz", timeout=60).status_code == 200
    server.wait_until(lambda: pid not in worker_pids(server) and len(serving_workers(server)) == 2)
    assert "hangs (no sign of life for" in server.log


def test_sighup_replaces_all_workers_without_a_failed_request(server: Server) -> None:
    before = serving_workers(server)
    with Load(server) as load:
        server.process.send_signal(signal.SIGHUP)
        server.wait_until(lambda: not set(before) & set(worker_pids(server)) and len(serving_workers(server)) == 2)
        load.wait()
    assert load.failures == []


def test_sigterm_drains_all_workers(models: Path, tmp_path: Path) -> None:
    """Also: port 0, and the limits that are divided."""
    options = "--workers", "2", "--rest-port", "0", "--grpc-port", "0", "--memory-budget", "100000000"
    server = Server(models, tmp_path / "log", *options)
    try:
        server.wait_until(lambda: len(serving_workers(server)) == 2)
        (port,) = re.findall(r"http://127\.0\.0\.1:(\d+)", server.log)
        server.url = f"http://127.0.0.1:{port}"
        server.port = int(port)
        server.wait_for("/readyz")
        page = httpx.get(server.url + "/metrics").text
        assert read_sum(page, "serving_memory_budget_bytes ") == pytest.approx(1e8, abs=10)
        assert read_sum(page, "serving_connections_limit ") <= 10_000
        workers = worker_pids(server)
        assert server.stop() == 0
    finally:
        server.process.kill()
        server.process.wait()
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    assert "Traceback" not in server.log


def test_the_end_of_the_supervisor_ends_the_workers(server: Server) -> None:
    """The last test of this server."""
    workers = worker_pids(server)
    os.kill(workers[0], signal.SIGSTOP)  # not even one that hangs stays
    server.process.kill()
    server.process.wait()
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        pass
    assert free_ports(1)
