"""schemathesis, with all its checks, against the running service.

About 70 requests, and 2,000 with `make test-openapi`. schemathesis.toml has the data, and which checks are relaxed why.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from schemathesis.checks import CHECKS

from tests.serving.access.test_tokens import hash_of, write
from tests.serving.conftest import PROJECT, Server, adder, colours

__all__ = ["adder", "colours"]  # fixtures of tests/serving

pytestmark = pytest.mark.slow

CONFIG = Path(__file__).parent / "schemathesis.toml"
REQUESTS = int(os.environ.get("OPENAPI_REQUESTS", "0"))
FEW = ("--phases", "fuzzing", "--max-examples", "3")
MANY = ("--max-examples", "40")  # in each phase that generates data, of each operation
TOKEN = "secret"
PROGRAM = "from schemathesis.cli import schemathesis; schemathesis()"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, colours: Path, adder: Path) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("openapi")
    shutil.copytree(colours, folder / "models" / "colours" / "7")
    shutil.copytree(adder, folder / "models" / "adder" / "1")
    tokens = write(folder / "tokens", f"shop admin,predict {hash_of(TOKEN)}")
    server = Server(folder / "models", folder / "log", "--auth-token-file", str(tokens))
    server.wait_for("/readyz")
    yield server
    assert server.stop() == 0


def read_report(report: Path) -> tuple[list[dict[str, Any]], set[str]]:
    """Return the requests with their responses, and the names of the checks."""
    events = map(json.loads, report.read_text().splitlines())
    recorders = [event["ScenarioFinished"]["recorder"] for event in events if "ScenarioFinished" in event]
    interactions = [each for recorder in recorders for each in recorder.get("interactions", {}).values()]
    checks = [check for recorder in recorders for checks in recorder.get("checks", {}).values() for check in checks]
    return interactions, {check["name"] for check in checks}


@pytest.mark.timeout(1_800)
def test_the_service_conforms_to_its_description(service: Server, tmp_path: Path) -> None:
    report = tmp_path / "report.ndjson"
    options = ("--continue-on-failure", "--no-shrink", "--report-ndjson-path", str(report))
    run: tuple[str, ...] = ("--no-color", "--config-file", str(CONFIG), "run", f"{service.url}/openapi.json", *options)
    run += ("--header", f"Authorization: Bearer {TOKEN}")  # the check ignored_auth leaves it out
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *run, *(MANY if REQUESTS else FEW)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(PROJECT), "SCHEMATHESIS_HOOKS": "tests.contract.openapi_hooks"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    interactions, checks = read_report(report)
    assert checks >= set(CHECKS.get_all_names())
    assert len(interactions) >= max(REQUESTS, 50)
    statuses = [(each["response"]["status_code"], each["request"]) for each in interactions]
    assert {200, 400, 404} <= {status for status, _ in statuses}
    for status, request in statuses:  # the expected ones of schemathesis.toml, and only for their reasons
        has_deadline = "X-Request-Timeout-S" in request["headers"]
        is_unknown_method = request["method"] in ("TRACE", "QUERY")
        assert status < 500 or (status == 501 and is_unknown_method) or (status == 504 and has_deadline), request
    print(done.stdout)
    assert "unhandled" not in service.log
    assert "Traceback" not in service.log


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"GET /healthz HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
        (
            b"POST /predict?model=colours HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer %b\r\n%b\r\n\r\n"
            % (TOKEN.encode(), b"Content-Type: image/png\r\nContent-Length: 999999999999"),
            413,
        ),
        (b"GET /healthz HTTP/1.1\r\nHost: a\r\nX-Long: %b\r\n\r\n" % (b"a" * 70_000), 431),
        (b"GET /healthz HTTP/2.0\r\nHost: a\r\n\r\n", 505),
    ],
)
def test_refusals_of_the_http_server_are_as_described(service: Server, request_bytes: bytes, status: int) -> None:
    """schemathesis sends well-formed HTTP only."""
    document = httpx.get(service.url + "/openapi.json", headers={"Authorization": f"Bearer {TOKEN}"}).json()
    method, path = request_bytes.decode().split()[:2]
    described = document["paths"][path.partition("?")[0]][method.lower()]["responses"][str(status)]
    with socket.create_connection(("127.0.0.1", service.port)) as connection:
        connection.sendall(request_bytes)
        response = http.client.HTTPResponse(connection)
        response.begin()
        (media_type,) = described["content"]
        assert (response.status, response.headers.get_content_type()) == (status, media_type)
        assert described["content"][media_type]["schema"] == {"$ref": "#/components/schemas/Error"}
        assert document["components"]["schemas"]["Error"]["required"] == ["error"]
        assert isinstance(json.loads(response.read())["error"], str)
