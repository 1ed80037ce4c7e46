"""The command line and the life of the server process, with real processes on loopback ports."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from click.testing import CliRunner

from serving.__main__ import main
from serving.server_process import free_ports
from tests.serving.conftest import PROJECT, Server, picture
from tests.serving.saved_models import save_colour_classifier, write_warmup_records

StartServer = Callable[..., Server]
IMAGE: dict[str, Any] = {"content": picture("blue"), "headers": {"Content-Type": "image/png"}}


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    """The file that the gated model waits for."""
    return tmp_path / "gate"


@pytest.fixture
def gated_models_dir(tmp_path: Path, gate: Path) -> Path:
    """A model that answers when the gate is there, also its warm-up record."""
    path = save_colour_classifier(tmp_path / "gated" / "colours" / "4", gate=gate)
    write_warmup_records(path, [np.zeros((1, 32, 32, 3), np.uint8)])
    return tmp_path / "gated"


def refusal(*arguments: str, code: int = 1, **environment: str) -> str:
    """Run the command in this process; returns what it says as it refuses to start."""
    result = CliRunner().invoke(main, arguments, env=environment)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result.output


def test_help_names_every_setting() -> None:
    text = CliRunner().invoke(main, ["--help"]).output
    for option in (
        "--models-dir",
        "--host",
        "--rest-port",
        "--threads",
        "--max-request-bytes",
        "--max-image-pixels",
        "--max-images",
        "--drain-timeout-s",
        "--log-level",
        "--log-format",
        "--access-log",
        "--require-model",
    ):
        assert option in text
    assert "8501" in text


def test_help_has_a_plain_description_and_default_of_every_option() -> None:
    text = " ".join(CliRunner().invoke(main, ["--help"], terminal_width=1_000).output.split())
    assert not re.findall(r"\[default: \(|\)\]|\[\[|\]\]", text)
    assert "picture" not in text
    for option in main.params:
        assert getattr(option, "help", None), option.name
    for words in (
        "--threads INTEGER Threads that parse and decode large requests. [default: the number of cores]",
        "Long requests have calls of their own",
        "checks for new, changed and deleted versions",
        "ulimit -n",
        "A second signal ends the process at once",
        "504",
        "[default: 75 % of what the container or the machine leaves]",
        "Log messages of this level and above",
    ):
        assert words in text, words


WITHOUT_AFFINITY = """
import os, runpy, sys
del os.sched_getaffinity
sys.argv[0] = "serving"
runpy.run_module("serving", run_name="__main__", alter_sys=True)
"""


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system is without the function already")
def test_the_service_starts_where_the_system_does_not_tell_which_cores_it_may_use(
    models_dir: Path, start_server: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on macOS; the commands of training and the client, too."""

    real = subprocess.Popen

    def start(command: list[str], **options: Any) -> Any:
        assert command[1:3] == ["-m", "serving"]
        return real([command[0], "-c", WITHOUT_AFFINITY, *command[3:]], **options)

    with monkeypatch.context() as patched:
        patched.setattr("tests.serving.conftest.subprocess.Popen", start)
        server = start_server(models_dir)
    server.wait_for("/readyz")
    assert httpx.post(server.url + "/predict", **IMAGE).json()["predictions"][0]["label"] == "blue"
    assert re.search(r"memory budget: [1-9][0-9,]* MB for all requests\n", server.log)
    assert server.log.count("memory budget") == 1
    assert server.stop() == 0


@pytest.mark.parametrize("module", ["training", "client"])
def test_the_other_commands_need_no_such_function_either(module: str) -> None:
    code = WITHOUT_AFFINITY.replace('"serving"', f'"{module}"')
    done = subprocess.run([sys.executable, "-c", code, "--help"], cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_mistakes_are_told_in_one_line(tmp_path: Path, models_dir: Path) -> None:
    assert "there is no models folder" in refusal("--models-dir", str(tmp_path / "nowhere"))
    assert "--rest-port must be from 0 to 65535" in refusal("--rest-port", "65536")
    assert "cannot listen on 192.0.2.1:8501" in refusal("--models-dir", str(models_dir), "--host", "192.0.2.1")
    assert "not a valid integer" in refusal("--threads", "many", code=2)


def test_every_setting_can_come_from_the_environment() -> None:
    assert "/somewhere/else" in refusal(SERVING_MODELS_DIR="/somewhere/else")
    assert "--max-images must be" in refusal(SERVING_MAX_IMAGES="0")
    assert "--threads must be" in refusal(SERVING_THREADS="-3")
    assert "loud" in refusal(SERVING_LOG_LEVEL="loud", code=2)
    assert "not models-api" in refusal(SERVING_URL_PREFIX="models-api")


def test_mistakes_of_access_control_are_told_in_one_line(models_dir: Path) -> None:
    tokens = models_dir.parent / "tokens"
    tokens.write_text("a-token\n")
    ports = map(str, free_ports(3))  # one a run: the listening socket stays open until a garbage collection

    def refuse(*options: str) -> str:
        return refusal("--models-dir", str(models_dir), "--rest-port", next(ports), "--grpc-port", "0", *options)

    assert f"the token file {tokens}, line 1: expected NAME" in refuse("--auth-token-file", str(tokens))
    assert "--cors-origin takes a scheme and a host" in refuse("--cors-origin", "b.example")
    assert "--forwarded-allow-ips takes addresses" in refuse("--forwarded-allow-ips", "proxy")


def test_a_port_in_use_is_told(models_dir: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        output = refusal("--models-dir", str(models_dir), "--rest-port", str(taken.getsockname()[1]))
    assert "Address already in use" in output


def test_without_a_model_it_waits_for_one_and_says_so(
    tmp_path: Path, colours: Path, adder: Path, start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SERVING_REQUIRE_MODEL", "colours")
    models_dir = tmp_path / "empty"
    models_dir.mkdir()
    server = start_server(models_dir, "--poll-interval-s", "0.1", "--require-model", "colours")
    server.wait_until(lambda: "not ready:" in server.log)
    assert server.wait_for("/readyz", 503).json()["reason"] == "colours: no version to serve"
    assert f"waiting for a model: <name>/<version>/saved_model.pb in {models_dir}" in server.log
    # Broken at first: it stays up, and is ready when the files are mended.
    shutil.copytree(colours, models_dir / "colours" / "1", ignore=shutil.ignore_patterns("variables"))
    server.wait_until(lambda: "not ready: colours: cannot load" in server.log)
    shutil.copytree(adder, models_dir / "adder" / "1")
    server.wait_for("/v2/models/adder/ready")
    assert httpx.get(server.url + "/readyz").status_code == 503  # the other one is required
    shutil.copytree(colours / "variables", models_dir / "colours" / "1" / "variables")
    server.wait_for("/readyz")
    assert httpx.post(server.url + "/predict?model=colours", **IMAGE).json()["predictions"][0]["label"] == "blue"
    assert server.stop() == 0
    assert "Traceback" not in server.log


def test_a_start_with_broken_models_only_is_mended_by_their_files(
    models_dir: Path, colours: Path, start_server: StartServer
) -> None:
    for version in ("2", "10"):
        (models_dir / "colours" / version / "saved_model.pb").write_bytes(b"\xff garbage")
    server = start_server(models_dir, "--poll-interval-s", "0.1")
    server.wait_until(lambda: "not ready:" in server.log)
    assert "colours: Can't parse" in server.wait_for("/readyz", 503).json()["reason"]
    assert httpx.get(server.url + "/healthz").status_code == 200
    shutil.copy(colours / "saved_model.pb", models_dir / "colours" / "10")
    server.wait_for("/readyz")
    assert server.stop() == 0
    assert "Traceback" not in server.log


def test_it_answers_only_when_warmed_up_and_ends_when_the_last_answer_is_out(
    gated_models_dir: Path, gate: Path, start_server: StartServer
) -> None:
    server = start_server(gated_models_dir)
    # Loading, then held in the warm-up: alive, and honest about not being ready.
    assert server.wait_for("/healthz").json() == {"status": "alive"}
    assert server.wait_for("/readyz", 503).json()["reason"] == "loading colours"
    refused = httpx.post(server.url + "/predict", **IMAGE)
    assert refused.status_code == 503
    assert "still being loaded" in refused.json()["error"]
    gate.touch()
    ready = server.wait_for("/readyz").json()
    assert [(m["version"], m["state"], m["warmup_records"]) for m in ready["models"]] == [(4, "AVAILABLE", 1)]
    assert "1 warm-up records replayed" in server.log

    body = httpx.post(server.url + "/predict", **IMAGE).json()
    assert (body["model"]["version"], body["predictions"][0]["label"]) == (4, "blue")

    # One request held in the model, one in its upload; then the signal.
    gate.unlink()
    with ThreadPoolExecutor(1) as pool, socket.create_connection(("127.0.0.1", server.port)) as upload:
        held = pool.submit(httpx.post, server.url + "/predict", **IMAGE, timeout=60)
        image = IMAGE["content"]
        assert isinstance(image, bytes)
        upload.sendall(
            b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nExpect: 100-continue\r\n"
            b"Content-Length: %d\r\n\r\n" % len(image)
        )
        assert upload.recv(100).startswith(b"HTTP/1.1 100")  # the app has begun to read
        upload.sendall(image[:20])
        server.wait_until(lambda: server.in_flight() == 1)  # an upload counts when it is complete
        server.process.send_signal(signal.SIGTERM)
        server.wait_until(lambda: not server.accepts())
        upload.sendall(image[20:])
        gate.touch()
        assert held.result().json()["predictions"][0]["label"] == "blue"
        answer = upload.makefile("rb").read()
        assert answer.startswith(b"HTTP/1.1 200")
        assert b'"label":"blue"' in answer
    assert server.process.wait(timeout=60) == 0
    assert "Error" not in server.log


def test_it_says_when_it_gives_up_on_a_request(models_dir: Path, start_server: StartServer) -> None:
    server = start_server(models_dir, "--drain-timeout-s", "1")
    server.wait_for("/readyz")
    with socket.create_connection(("127.0.0.1", server.port)) as upload:
        upload.sendall(
            b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nExpect: 100-continue\r\n"
            b"Content-Length: 100\r\n\r\n"
        )
        assert upload.recv(100).startswith(b"HTTP/1.1 100")
        assert server.stop() == 0
    assert "graceful shutdown timed out after 1 s, 1 requests unfinished" in server.log


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_the_whole_group_while_loading_ends_it_well(
    models_dir: Path, start_server: StartServer, number: signal.Signals
) -> None:
    server = start_server(models_dir)
    server.wait_for("/healthz")
    os.killpg(server.process.pid, number)  # as a terminal does with Ctrl-C
    assert server.process.wait(timeout=60) == 0


NAMESPACE = ("unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child")


def can_make_a_namespace() -> bool:
    command = [*NAMESPACE, "true"]
    return bool(shutil.which(NAMESPACE[0])) and not subprocess.run(command, capture_output=True, check=False).returncode


@pytest.mark.skipif(not can_make_a_namespace(), reason="processes cannot have a namespace of their own here")
def test_the_first_process_of_a_container_ends_at_sigterm_while_it_starts(models_dir: Path) -> None:
    ports = (f"--rest-port={free_ports(1)[0]}", "--grpc-port=0")
    command = [*NAMESPACE, sys.executable, "-m", "serving", "--models-dir", str(models_dir), *ports]
    with subprocess.Popen(command, cwd=PROJECT) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        while process.poll() is None:
            with contextlib.suppress(OSError):  # it has ended meanwhile
                for child in children.read_text().split():
                    if "serving" in Path(f"/proc/{child}/cmdline").read_text():
                        os.kill(int(child), signal.SIGTERM)
            time.sleep(0.05)
    # 0 if only the server stopped it, later. `unshare` ends as its child did.
    assert process.returncode in (128 + signal.SIGTERM, -signal.SIGTERM)


def test_one_bad_model_leaves_the_rest_serving_and_broken_bytes_do_no_harm(
    models_dir: Path, adder: Path, start_server: StartServer
) -> None:
    shutil.copytree(adder, models_dir / "adder" / "1")
    (models_dir / "adder" / "1" / "saved_model.pb").write_bytes(b"")
    server = start_server(models_dir, "--access-log", "--max-request-bytes", "100000")
    (broken,) = (model for model in server.wait_for("/readyz").json()["models"] if model["name"] == "adder")
    assert broken["error"]
    url = server.url + "/predict?model=colours"
    assert httpx.post(url, **IMAGE).json()["predictions"][0]["label"] == "blue"

    def chunks() -> list[bytes]:
        return [b"x" * 10_000] * 100

    assert httpx.post(url, content=iter(chunks()), headers=IMAGE["headers"]).status_code == 413
    for garbage in (b"\0" * 1000, b"GET / HTTP/9.9\r\n\r\n", b"POST /predict HTTP/1.1\r\nContent-Length: -1\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(garbage)
            assert not connection.recv(12).startswith(b"HTTP/1.1 5")
    with ThreadPoolExecutor(8) as pool:
        answers = pool.map(lambda _: httpx.post(url, **IMAGE).status_code, range(40))
        assert set(answers) == {200}
    assert server.stop(signal.SIGINT) == 0
    assert "127.0.0.1 HTTP POST /predict 200 " in server.log
    assert "127.0.0.1 HTTP unrouted 400 " in server.log  # garbage
    assert "Traceback" not in server.log
