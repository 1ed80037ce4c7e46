"""Every recorded exchange with a real TensorFlow Serving, replayed against this service."""

import base64
import gzip
import http.client
import json
import math
import os
import shutil
import socket
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from tests.serving.conftest import Server

GOLDEN = Path(__file__).parent / "golden"
EXCHANGES = [json.loads(line) for line in gzip.decompress((GOLDEN / "exchanges.jsonl.gz").read_bytes()).splitlines()]

# What is answered otherwise on purpose: the status here, and why. docs/tensorflow-serving.md says the same to users.
WRONG_SHAPE = "there: a wrong answer, or a kernel's refusal; here: the shape is checked against the signature"
OUT_OF_RANGE = "there: wrapped into another pixel value; here: refused"
OTHER_ROUTES = "this service has a page, health and metrics where the other has nothing"
DIFFERENT = {
    "wrong size 31x32": (400, WRONG_SHAPE),
    "rank 5": (400, WRONG_SHAPE),
    "element 300": (400, OUT_OF_RANGE),
    "element 256": (400, OUT_OF_RANGE),
    "element -1": (400, OUT_OF_RANGE),
    "all out of range 300": (400, OUT_OF_RANGE),
    "two json docs": (400, "there: what follows the document is ignored; here: refused"),
    "scalar sig row": (400, "there: rows are let through to a signature that has none; here: the shape is checked"),
    "GET /": (200, OTHER_ROUTES),
    "GET /healthz": (200, OTHER_ROUTES),
    "GET /monitoring/prometheus/metrics": (200, OTHER_ROUTES),
    "prometheus POST": (405, "there: any method gets the metrics; here: GET"),
    "HTTP/1.1 no Host": (400, "HTTP/1.1 requires a Host header (RFC 9112, section 3.2); there it may be left out"),
    "fragment on predict": (200, "a fragment is never part of a request; the HTTP server here drops it"),
    "batching 65 > max": (200, "there: a limit that was configured for the recording"),
    "batching good after empty": (200, "there: a good request pays for an empty one before it"),
}
# Answered with the same status, in other words: the text comes from TensorFlow's kernels, from the names of nodes in
# its graph, from the digits of a number that no double holds, or from a depth at which nothing is parsed here.
OTHER_WORDS = {
    "wrong channels 4",
    "CHW",
    "batching wrong channels",
    "batching wrong size",
    "png wrong size 40x40",
    "element 2^64",
    "deep nesting",
}


def ids(exchange):
    return f"{exchange['server']}-{exchange['name']}"


@dataclass(frozen=True)
class Target:
    """A server to send the requests to; `is_real` where it is TensorFlow Serving's own."""

    host: str
    port: int
    is_real: bool = False


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    """By the configuration: a server that follows its models folder, and one with a model config file and a label.

    TFSERVING_URL names a running server to use for all of them instead; it serves golden/models.config.
    """
    if url := os.environ.get("TFSERVING_URL"):
        address = urlsplit(url)
        is_real = httpx.get(url + "/healthz").status_code != 200
        target = Target(address.hostname, address.port or 80, is_real)
        yield {"default": target, "config-file": target}
        return
    folder = tmp_path_factory.mktemp("golden")
    for model in ("cifar10", "multi"):
        shutil.copytree(GOLDEN / model, folder / "models" / model)
    config = (GOLDEN / "models.config").read_text().replace('"/models/', f'"{folder}/models/')
    (folder / "models.config").write_text(config)
    servers = {
        "default": Server(folder / "models", folder / "log"),
        "config-file": Server(folder, folder / "log2", "--model-config-file", str(folder / "models.config")),
    }
    for server in servers.values():
        server.wait_for("/readyz")
    yield {name: Target("127.0.0.1", server.port) for name, server in servers.items()}
    for server in servers.values():
        assert server.stop() == 0


def request_body(request):
    body = request.get("body")
    if isinstance(body, dict) and "omitted_bytes" in body:
        body = json.dumps({"instances": [[[[0] * 3] * 32] * 32] * 1000}, separators=(",", ":"))
        assert len(body) == request["body"]["omitted_bytes"]
    if isinstance(body, dict):
        return base64.b64decode(body["base64"])
    return b"" if body is None else body.encode()


def send(target, request):
    """Send a recorded request; return (status, content type, body)."""
    if "raw" in request:
        raw = request["raw"]
        with socket.create_connection((target.host, target.port), timeout=60) as connection:
            connection.sendall(base64.b64decode(raw["base64"]) if isinstance(raw, dict) else raw.encode())
            response = http.client.HTTPResponse(connection, method="POST")
            response.begin()
            return response.status, response.getheader("Content-Type"), response.read()
    connection = http.client.HTTPConnection(target.host, target.port, timeout=60)
    connection.putrequest(request["method"], request["path"], skip_accept_encoding=True)
    body = request_body(request)
    for name, value in (request["headers"] or {}).items():
        connection.putheader(name, value)
    if body or request["method"] in ("POST", "PUT", "PATCH"):
        connection.putheader("Content-Length", str(len(body)))
    connection.endheaders(body)
    response = connection.getresponse()
    try:
        return response.status, response.getheader("Content-Type"), response.read()
    finally:
        connection.close()


def assert_same_json(ours, theirs):
    if isinstance(theirs, dict):
        assert isinstance(ours, dict)
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert_same_json(ours[key], value)
    elif isinstance(theirs, list):
        assert isinstance(ours, list)
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert_same_json(one, other)
    elif isinstance(theirs, float):
        assert isinstance(ours, float)  # 1.0 stays 1.0
        assert (math.isnan(ours) and math.isnan(theirs)) or ours == pytest.approx(theirs, rel=1e-5)
    else:
        assert ours == theirs
        assert type(ours) is type(theirs)


@pytest.mark.parametrize("exchange", EXCHANGES, ids=ids)
def test_it_answers_as_tensorflow_serving_does(targets, exchange):
    target = targets.get(exchange["server"], targets["default"])
    name, recorded = exchange["name"], exchange.get("response") or {}
    if target.is_real and ("outcome" in exchange or exchange["server"] not in ("default", "config-file")):
        pytest.skip("needs another configuration of the real server, or would end it")
    status, content_type, body = send(target, exchange["request"])
    if not target.is_real and (name in DIFFERENT or "outcome" in exchange):
        expected, _ = DIFFERENT.get(name, (400, "there: the process dies or hangs"))
        assert status == expected != recorded.get("status")
        if status == 400:
            assert json.loads(body)["error"]
        return
    assert status == recorded["status"]
    theirs = recorded.get("body")
    if isinstance(theirs, dict):
        theirs = base64.b64decode(theirs["base64"])
    if not theirs or exchange["request"].get("method") == "HEAD":
        return
    if not recorded["headers"]["Content-Type"].startswith("application/json"):
        return  # a page of the HTTP layer, or metrics: only their status is the contract
    assert content_type == "application/json"
    theirs = json.loads(theirs if isinstance(theirs, str) else theirs.decode("utf-8", "surrogateescape"))
    ours = json.loads(body.decode("utf-8", "surrogateescape"))
    if "error" in theirs:
        assert ours.keys() == {"error"}
        if name not in OTHER_WORDS:
            assert ours["error"].splitlines()[0] == theirs["error"].splitlines()[0]
    else:
        assert_same_json(ours, theirs)


def test_the_lists_of_differences_name_exchanges():
    names = {exchange["name"] for exchange in EXCHANGES}
    assert len(EXCHANGES) == 173
    assert names >= DIFFERENT.keys() | OTHER_WORDS


def test_the_servers_are_alive_after_all_of_it(targets):
    for target in targets.values():
        assert send(target, {"method": "GET", "path": "/v1/models/cifar10", "headers": {}})[0] == 200
