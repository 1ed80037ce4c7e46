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
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from tests.serving.conftest import Server

GOLDEN = Path(__file__).parent / "golden"
EXCHANGES = [
    json.loads(line)
    for file in ("exchanges.jsonl.gz", "exchanges-2.jsonl.gz")
    for line in gzip.decompress((GOLDEN / file).read_bytes()).splitlines()
]

# What is answered otherwise on purpose: the status here, and why. docs/tensorflow-serving.md says the same to users.
WRONG_SHAPE = "there: a wrong answer, or a kernel's refusal; here: the shape is checked against the signature"
NO_ROWS = "there: answered by models that can, fatal to others; here: refused"
FRAMING = "proxies and servers read it differently, which lets requests be smuggled (RFC 9112, sections 5.2, 6.3)"
HTTP_VERSION = "the status for a version of HTTP that is not supported"
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
    "one: rank 2 columns": (400, WRONG_SHAPE),
    "scalar: list": (400, WRONG_SHAPE),
    "multi: rows, a has three": (400, WRONG_SHAPE),
    "one: empty columns by name": (400, NO_ROWS),
    "wire: chunked, bad size": (400, "the chunk is malformed, not too large"),
    "wire: length with a plus": (400, FRAMING),
    "wire: folded header": (400, FRAMING),
    "wire: HTTP/0.9": (505, HTTP_VERSION),
    "wire: HTTP/2.0": (505, HTTP_VERSION),
    "wire: empty line first": (200, "servers should ignore an empty line before a request (RFC 9112, section 2.2)"),
    "fragment on predict": (200, "a fragment is never part of a request; the HTTP server here drops it"),
    "batching 65 > max": (200, "there: a limit that was configured for the recording"),
    "batching good after empty": (200, "there: a good request pays for an empty one before it"),
}
# Recorded without a monitoring config, which other exchanges were recorded with.
OTHER_CONFIGURATION = {"GET /monitoring/prometheus/metrics"}
# The same response, but only one of the two servers closes the connection after it: this one where it cannot tell where
# the next request begins, and there after every error of the HTTP layer.
CLOSED_OTHERWISE = {
    "path: bad escape",
    "wire: two lengths",
    "wire: absolute address with a port and https",
    "wire: CONNECT",
    "wire: TRACE with a body",
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
    "multi: columns, flat a",
    "wire: two lengths",  # there: the first is believed; here: refused, as requests could be smuggled
}


def ids(exchange):
    return f"{exchange['server']}-{exchange['name']}"


def is_for_real_server(exchange):
    """Whether a real server answers it as recorded, in the configuration of docs/deploying.md, and stays alive."""
    is_configured = exchange["server"] in ("default", "config-file") and exchange["name"] not in OTHER_CONFIGURATION
    return is_configured and "outcome" not in exchange


@dataclass(frozen=True)
class Target:
    """A server to send the requests to; `is_real` where it is TensorFlow Serving's own."""

    host: str
    port: int
    is_real: bool = False


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    """By the configuration: a server that follows its models folder, and one with a model config file and a label.

    TFSERVING_URL names a running server to use for all of them instead. It serves golden/models.config, with metrics;
    docs/deploying.md has the command.
    """
    if url := os.environ.get("TFSERVING_URL"):
        address = urlsplit(url)
        is_real = httpx.get(url + "/healthz").status_code != 200
        target = Target(address.hostname or "127.0.0.1", address.port or 80, is_real)
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


@dataclass(frozen=True)
class Response:
    """What came back, and whether the connection can be used again."""

    status: int
    content_type: str
    body: bytes
    is_open: bool


def send(target, request, *, responses=1):
    """Send a recorded request; return the responses, of which a raw one may have several."""
    if "raw" in request:
        raw = request["raw"]
        with socket.create_connection((target.host, target.port), timeout=60) as sock:
            sock.sendall(base64.b64decode(raw["base64"]) if isinstance(raw, dict) else raw.encode())
            pipeline = Pipeline(sock)
            received = []
            for _ in range(responses):
                response = http.client.HTTPResponse(pipeline, method="POST")  # type: ignore[arg-type]
                response.begin()
                received.append(read_response(response))
            return received
    connection = http.client.HTTPConnection(target.host, target.port, timeout=60)
    connection.putrequest(request["method"], request["path"], skip_accept_encoding=True)
    body = request_body(request)
    for name, value in (request["headers"] or {}).items():
        connection.putheader(name, value)
    if body or request["method"] in ("POST", "PUT", "PATCH"):
        connection.putheader("Content-Length", str(len(body)))
    connection.endheaders(body)
    try:
        return [read_response(connection.getresponse())]
    finally:
        connection.close()


def read_response(response):
    content_type = response.getheader("Content-Type")
    return Response(response.status, content_type, response.read(), is_open=not response.will_close)


class Pipeline:
    """A connection for one HTTPResponse after another, which each close what they read from."""

    def __init__(self, connection):
        self._file = connection.makefile("rb")

    def makefile(self, _):
        return self

    def close(self):
        pass

    def __getattr__(self, name):
        return getattr(self._file, name)


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
    if target.is_real and not is_for_real_server(exchange):
        pytest.skip("needs another configuration of the real server, or would end it")
    expected = [response for response in exchange.get("responses", [recorded]) if response.get("status")] or [recorded]
    received = send(target, exchange["request"], responses=len(expected))
    if not target.is_real and (name in DIFFERENT or "outcome" in exchange):
        status, _ = DIFFERENT.get(name, (400, "there: the process dies or hangs"))
        assert received[0].status == status != recorded.get("status")
        if status == 400:
            assert json.loads(received[0].body)["error"]
        return
    for ours, theirs in zip(received, expected, strict=True):
        assert_same_response(ours, theirs, exchange)
    if not target.is_real and exchange.get("open_afterwards") is not None and name not in CLOSED_OTHERWISE:
        assert received[-1].is_open == exchange["open_afterwards"]


def assert_same_response(ours, theirs, exchange):
    assert ours.status == theirs["status"]
    body = theirs.get("body")
    if isinstance(body, dict):
        body = base64.b64decode(body["base64"])
    if not body or exchange["request"].get("method") == "HEAD":
        return
    if not theirs["headers"]["Content-Type"].startswith("application/json"):
        return  # a page of the HTTP layer, or metrics: only their status is the contract
    assert ours.content_type == "application/json"
    theirs = json.loads(body if isinstance(body, str) else body.decode("utf-8", "surrogateescape"))
    ours = json.loads(ours.body.decode("utf-8", "surrogateescape"))
    if "error" in theirs:
        assert ours.keys() == {"error"}
        if exchange["name"] not in OTHER_WORDS:
            assert ours["error"].splitlines()[0] == theirs["error"].splitlines()[0]
    else:
        assert_same_json(ours, theirs)


def test_an_empty_query_is_part_of_the_path_too(targets):
    for method, path, status, error in (
        ("GET", "/v1/models/multi?", 404, "Could not find any versions of model multi?"),
        ("GET", "/v1/models/multi/metadata?", 400, "Malformed request: GET /v1/models/multi/metadata?"),
        ("POST", "/v1/models/multi:predict?", 400, "Malformed request: POST /v1/models/multi:predict?"),
    ):
        (response,) = send(targets["default"], {"method": method, "path": path, "headers": {}, "body": "{}"})
        assert (response.status, json.loads(response.body)) == (status, {"error": error})


@pytest.mark.parametrize(
    ("model", "error"),
    [("nope", "Could not find version 1 of model nope"), ("multi", "Could not find version 7 of model multi")],
)
def test_the_status_of_an_unknown_version_names_it_whatever_the_model(targets, model, error):
    number = error.split()[4]
    path = f"/v1/models/{model}/versions/{number}"
    (response,) = send(targets["default"], {"method": "GET", "path": path, "headers": {}})
    assert (response.status, json.loads(response.body)) == (404, {"error": error})


def test_the_lists_of_differences_name_exchanges():
    names = {exchange["name"] for exchange in EXCHANGES}
    assert len(EXCHANGES) == 173 + 141
    assert names >= DIFFERENT.keys() | OTHER_WORDS | CLOSED_OTHERWISE | OTHER_CONFIGURATION


def test_a_real_server_can_answer_all_that_it_is_sent():
    """In one configuration: the same request was never recorded with different responses."""
    recorded: dict[str, Any] = {}
    for exchange in filter(is_for_real_server, EXCHANGES):
        response = exchange["response"]
        key = json.dumps(exchange["request"], sort_keys=True)
        if (before := recorded.setdefault(key, response)) is not response:
            assert_same_response(
                Response(before["status"], "application/json", to_bytes(before), True), response, exchange
            )


def to_bytes(recorded):
    body = recorded.get("body") or ""
    return base64.b64decode(body["base64"]) if isinstance(body, dict) else body.encode()


def test_the_servers_are_alive_after_all_of_it(targets):
    for target in targets.values():
        (response,) = send(target, {"method": "GET", "path": "/v1/models/cifar10", "headers": {}})
        assert response.status == 200
