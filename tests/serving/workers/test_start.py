"""What is refused at the start, how many workers fit, and workers with TLS, tokens and a remote server."""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import grpc
import httpx
import pytest
import tensorflow as tf
from click.testing import CliRunner
from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

from serving import process_memory
from serving.__main__ import main
from serving.errors import StartupError
from serving.settings import Settings
from serving.workers import capacity
from tests.serving.certificates import Authority
from tests.serving.conftest import PROJECT, Server
from tests.serving.workers.conftest import connections_of, serving_workers

GIB = 2**30


@pytest.mark.parametrize("flag", ["--rest-port", "--grpc-port"])
@pytest.mark.parametrize("shared", [False, True])
def test_a_port_of_another_program_is_refused(tmp_path: Path, flag: str, *, shared: bool) -> None:
    """Even if that program would share it."""
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, shared)
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        ports = ["--rest-port", "0", "--grpc-port", "0", flag, port]
        done = CliRunner().invoke(main, ["--models-dir", str(tmp_path), "--workers", "2", *ports])
    assert done.exit_code == 1
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in done.output


def run(tmp_path: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "serving", "--models-dir", str(tmp_path), "--workers", "2", "--rest-port", "0"]
    return subprocess.run(
        [*command, "--grpc-port", "0", *options],
        cwd=PROJECT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_workers_that_crash_at_the_start_end_the_service(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\nif 'serving.workers.worker' in sys.orig_argv: os._exit(3)\n"
    )
    done = run(tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert re.search(
        r"Error: workers ended 3 times before they served, the last one, worker [12], with exit code 3; "
        r'the reason is in its log, the lines with "worker [12]" on standard error',
        done.stderr,
    )


def test_a_setting_that_only_workers_read_is_refused(tmp_path: Path) -> None:
    done = run(tmp_path, "--cors-origin", "no origin")
    assert done.returncode == 1
    assert "Error: " in done.stderr
    assert "no origin" in done.stderr
    assert "Traceback" not in done.stderr


def limit(monkeypatch: pytest.MonkeyPatch, folder: Path, *, memory: int, cores: int, quota: str | None) -> None:
    """Simulate a container."""
    (folder / "cpu.max").write_text(quota or "max 100000")
    monkeypatch.setattr(capacity, "memory_limit_bytes", lambda: memory)
    monkeypatch.setattr(capacity, "CORES", cores)
    monkeypatch.setattr(capacity, "cgroup_folders", lambda _: {folder})


@pytest.mark.parametrize(
    ("memory", "cores", "quota", "count"),
    [
        (64 * GIB, 8, None, 8),
        (64 * GIB, 8, "250000 100000", 2),
        (64 * GIB, 8, "50000 100000", 1),
        (3 * GIB, 8, None, 4),
        (GIB // 2, 8, None, 1),
    ],
)
def test_auto_is_what_processors_and_memory_allow(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, memory: int, cores: int, quota: str | None, count: int
) -> None:
    limit(monkeypatch, tmp_path, memory=memory, cores=cores, quota=quota)
    assert capacity.choose_worker_count(Settings(models_dir=tmp_path, workers="auto")) == count


def test_the_quota_of_version_1_of_cgroups(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    limit(monkeypatch, tmp_path, memory=64 * GIB, cores=8, quota=None)
    (tmp_path / "cpu.cfs_period_us").write_text("100000")
    (tmp_path / "cpu.cfs_quota_us").write_text("-1")
    assert capacity.count_processors() == 8
    (tmp_path / "cpu.cfs_quota_us").write_text("300000")
    assert capacity.count_processors() == 3


def test_the_folders_of_cgroups(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("5:cpu,cpuacct:/pod/a\n3:memory:/other\n0::/unified\n")
    monkeypatch.setattr(process_memory, "Path", lambda name: tmp_path / name.removeprefix("/"))
    folders = process_memory.cgroup_folders("cpu")
    root = tmp_path / "sys/fs/cgroup"
    assert {root / "cpu,cpuacct/pod/a", root / "cpu,cpuacct/pod", root / "cpu,cpuacct", root / "unified"} <= folders
    assert not any("other" in str(folder) for folder in folders)


def test_workers_that_do_not_fit_the_memory_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for version, size in (("1", 7), ("2", 100)):  # the newest counts
        (tmp_path / "pets" / version).mkdir(parents=True)
        with (tmp_path / "pets" / version / "saved_model.pb").open("wb") as file:
            file.truncate(size * 2**20)
    limit(monkeypatch, tmp_path, memory=4 * GIB, cores=2, quota=None)
    settings = Settings(models_dir=tmp_path, workers=4)
    assert capacity.choose_worker_count(settings) == 4
    limit(monkeypatch, tmp_path, memory=3 * GIB, cores=2, quota=None)
    with pytest.raises(
        StartupError, match=r"--workers 4 needs about 3,520 MiB: 856 MiB for each .*, enough for --workers 3"
    ):
        capacity.choose_worker_count(settings)


def test_limits_are_divided(tmp_path: Path) -> None:
    whole = Settings(models_dir=tmp_path, threads=8, concurrency=5, max_connections=100, memory_budget=10**9, workers=4)
    each = capacity.divide_settings(whole, 4)
    assert (each.threads, each.concurrency, each.max_connections, each.memory_budget) == (2, 1, 25, 250_000_000)
    assert each.max_queue_size == whole.max_queue_size


def test_tls_tokens_and_a_remote_server(server: Server, tmp_path: Path) -> None:
    """The workers of the one service ask the workers of the other."""
    authority = Authority(tmp_path / "tls")
    files = authority.issue()
    token = "a token of this test"
    tokens = tmp_path / "tokens"
    tokens.write_text(f"ann predict sha256:{hashlib.sha256(token.encode()).hexdigest()}\n")
    tokens.chmod(0o600)
    front = Server(
        tmp_path, tmp_path / "log", "--workers", "2", "--remote", f"127.0.0.1:{server.grpc_port}",
        "--remote-model", "versioned", "--tls-cert", str(files.certificate), "--tls-key", str(files.key),
        "--auth-token-file", str(tokens), "--access-log", "--log-format", "json",
    )  # fmt: skip
    try:
        front.wait_until(lambda: len(serving_workers(front)) == 2)
        url = front.url.replace("http", "https")
        context = authority.client_context()
        front.wait_until(lambda: httpx.get(url + "/readyz", verify=context).status_code == 200)
        path, body = "/v1/models/versioned:predict", {"instances": [1.0]}
        pids: set[int] = set()
        while len(pids) < 2:  # connections to both workers
            with httpx.Client(base_url=url, verify=context, timeout=60) as http:
                assert http.post(path, json=body).status_code == 401
                headers = {"Authorization": f"Bearer {token}"}
                response = http.post(path, json=body, headers=headers)
                assert (response.status_code, len(response.json()["predictions"])) == (200, 1)
                pids |= {pid for pid in serving_workers(front) if connections_of(pid, front.port)}
        credentials = grpc.ssl_channel_credentials(authority.file.read_bytes())
        with grpc.secure_channel(f"localhost:{front.grpc_port}", credentials) as channel:
            request = predict_pb2.PredictRequest()
            request.model_spec.name = "versioned"
            request.inputs["x"].CopyFrom(tf.make_tensor_proto([1.0]))
            predict = prediction_service_pb2_grpc.PredictionServiceStub(channel).Predict
            metadata = [("authorization", f"Bearer {token}")]
            assert predict(request, timeout=60, metadata=metadata).model_spec.version.value >= 1
        assert front.stop() == 0
        lines = [json.loads(line) for line in front.log.splitlines()]
        assert {line.get("worker") for line in lines if line["message"] == "request"} == {1, 2}
    finally:
        front.process.kill()
        front.process.wait()
