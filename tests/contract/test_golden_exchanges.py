"""Replays all recorded exchanges with a real TensorFlow Serving against this service."""

import base64
import gzip
import http.client
import json
import math
import os
import re
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

# Intended differences: the status of this service, and the reason. docs/tensorflow-serving.md documents them.
WRONG_SHAPE = "there: a wrong result, or a kernel's error; here: the shape is validated against the signature"
NO_ROWS = "there: depends on the model, and may abort the server; here: refused"
FRAMING = "ambiguous, which allows request smuggling (RFC 9112, sections 5.2, 6.3)"
HTTP_VERSION = "the status for an unsupported HTTP version"
OUT_OF_RANGE = "there: wraps to another pixel value; here: refused"
OTHER_ROUTES = "this service has a page, health checks and metrics on these paths"
DIFFERENT = {
    "wrong size 31x32": (400, WRONG_SHAPE),
    "rank 5": (400, WRONG_SHAPE),
    "element 300": (400, OUT_OF_RANGE),
    "element 256": (400, OUT_OF_RANGE),
    "element -1": (400, OUT_OF_RANGE),
    "all out of range 300": (400, OUT_OF_RANGE),
    "two json docs": (400, "there: trailing text is ignored; here: refused"),
    "scalar sig row": (400, "there: accepted by a signature without rows; here: the shape is validated"),
    "GET /": (200, OTHER_ROUTES),
    "GET /healthz": (200, OTHER_ROUTES),
    "GET /monitoring/prometheus/metrics": (200, OTHER_ROUTES),
    "prometheus POST": (405, "there: any method returns the metrics; here: only GET"),
    "HTTP/1.1 no Host": (400, "HTTP/1.1 requires a Host header (RFC 9112, section 3.2); there it is optional"),
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
    "fragment on predict": (200, "a request target has no fragment; here: it is removed"),
    "batching 65 > max": (200, "there: a batching limit was configured for the recording"),
    "batching good after empty": (200, "there: an empty request breaks the valid one after it"),
}
# By the first cell of its row in docs/tensorflow-serving.md: which exchanges it explains.
DOCUMENTED = {
    "wrong rank, empty batch": {
        "scalar instances",
        "wrong rank 2",
        "batching wrong rank",
        "batching inputs empty",
        "one: empty columns by name",
    },
    "100,000 nested brackets": {"deep nesting 100k"},
    "31x32 images, rank 5, a list for a scalar": {
        "wrong size 31x32",
        "rank 5",
        "scalar: list",
        "one: rank 2 columns",
        "multi: rows, a has three",
    },
    "rows for a signature without a batch axis": {"scalar sig row"},
    "300 or -1 for `uint8`": {"element 300", "element 256", "element -1", "all out of range 300"},
    "text after the JSON document": {"two json docs"},
    "a request after an empty one, with batching on": {"batching good after empty"},
    "more rows than `max_batch_size`, with batching on": {"batching 65 > max"},
    "`GET /`, `/healthz`": {"GET /", "GET /healthz"},
    "`/monitoring/prometheus/metrics`": {"GET /monitoring/prometheus/metrics", "prometheus POST"},
    "HTTP/1.1 without a Host header": {"HTTP/1.1 no Host"},
    "`#fragment` in the request line": {"fragment on predict"},
    "two Content-Length headers, one with a plus, folded headers": {"wire: length with a plus", "wire: folded header"},
    "a chunk size that is not a number": {"wire: chunked, bad size"},
    "HTTP/0.9, HTTP/2.0 in the request line": {"wire: HTTP/0.9", "wire: HTTP/2.0"},
    "an empty line before the request line": {"wire: empty line first"},
}
# Recorded without a monitoring config, unlike the other exchanges.
OTHER_CONFIGURATION = {"GET /monitoring/prometheus/metrics"}
# Only one of the two servers closes the connection after the response: this one if the start of the next request is
# unknown, TensorFlow Serving after every error of its HTTP layer.
OTHER_CONNECTION_STATE = {
    "path: bad escape",
    "wire: two lengths",
    "wire: absolute address with a port and https",
    "wire: CONNECT",
    "wire: TRACE with a body",
}
# The same status with another message: the original has text of a TensorFlow kernel, node names of the graph, digits of
# a number beyond a double, or a nesting depth that is not parsed here.
OTHER_MESSAGE = {
    "wrong channels 4",
    "CHW",
    "batching wrong channels",
    "batching wrong size",
    "png wrong size 40x40",
    "element 2^64",
    "deep nesting",
    "multi: columns, flat a",
    "wire: two lengths",  # there: the first one counts; here: refused, as it allows request smuggling
}


def ids(exchange):
    return f"{exchange['server']}-{exchange['name']}"


def is_for_real_server(exchange):
    """Return whether a real server, configured as in docs/deploying.md, responds as recorded and survives."""
    is_configured = exchange["server"] in ("default", "config-file") and exchange["name"] not in OTHER_CONFIGURATION
    return is_configured and "outcome" not in exchange


@dataclass(frozen=True)
class Target:
    """A server to send requests to; `is_real` if it is TensorFlow Serving."""

    host: str
    port: int
    is_real: bool = False


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    """Servers by configuration: one that polls a models folder, and one with a model config file and a label.

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
    """A response, and whether the connection stays open."""

    status: int
    content_type: str
    body: bytes
    is_open: bool


def send(target, request, *, responses=1):
    """Send a recorded request; returns the responses, several for a pipelined raw request."""
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
    """A connection for several HTTPResponse objects, each of which tries to close it."""

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
def test_responses_equal_tensorflow_servings(targets, exchange):
    target = targets.get(exchange["server"], targets["default"])
    name, recorded = exchange["name"], exchange.get("response") or {}
    if target.is_real and not is_for_real_server(exchange):
        pytest.skip("needs another configuration of the real server, or would abort it")
    expected = [response for response in exchange.get("responses", [recorded]) if response.get("status")] or [recorded]
    received = send(target, exchange["request"], responses=len(expected))
    if not target.is_real and (name in DIFFERENT or "outcome" in exchange):
        status, _ = DIFFERENT.get(name, (400, "there: the process aborts or hangs"))
        assert received[0].status == status != recorded.get("status")
        if status == 400:
            assert json.loads(received[0].body)["error"]
        return
    for ours, theirs in zip(received, expected, strict=True):
        assert_same_response(ours, theirs, exchange)
    if not target.is_real and exchange.get("open_afterwards") is not None and name not in OTHER_CONNECTION_STATE:
        assert received[-1].is_open == exchange["open_afterwards"]


def assert_same_response(ours, theirs, exchange):
    assert ours.status == theirs["status"]
    body = theirs.get("body")
    if isinstance(body, dict):
        body = base64.b64decode(body["base64"])
    if not body or exchange["request"].get("method") == "HEAD":
        return
    if not theirs["headers"]["Content-Type"].startswith("application/json"):
        return  # HTML errors and metrics: only the status is compared
    assert ours.content_type == "application/json"
    theirs = json.loads(body if isinstance(body, str) else body.decode("utf-8", "surrogateescape"))
    ours = json.loads(ours.body.decode("utf-8", "surrogateescape"))
    if "error" in theirs:
        assert ours.keys() == {"error"}
        if exchange["name"] not in OTHER_MESSAGE:
            assert ours["error"].splitlines()[0] == theirs["error"].splitlines()[0]
    else:
        assert_same_json(ours, theirs)


def test_an_empty_query_is_part_of_the_path(targets):
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
def test_the_status_error_names_the_unknown_version(targets, model, error):
    number = error.split()[4]
    path = f"/v1/models/{model}/versions/{number}"
    (response,) = send(targets["default"], {"method": "GET", "path": path, "headers": {}})
    assert (response.status, json.loads(response.body)) == (404, {"error": error})


def test_every_listed_difference_is_a_recorded_exchange():
    names = {exchange["name"] for exchange in EXCHANGES}
    assert len(EXCHANGES) == 173 + 141
    assert names >= DIFFERENT.keys() | OTHER_MESSAGE | OTHER_CONNECTION_STATE | OTHER_CONFIGURATION


def test_every_difference_has_a_row_in_the_documentation():
    page = (GOLDEN.parents[2] / "docs" / "tensorflow-serving.md").read_text()
    section = page.partition("## What is different on purpose")[2].partition("\n## ")[0]
    table = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| ")]
    rows = {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in table}
    died = {exchange["name"]: 400 for exchange in EXCHANGES if "outcome" in exchange}
    statuses = {name: status for name, (status, _) in DIFFERENT.items()} | died
    explained = [name for names in DOCUMENTED.values() for name in names]
    assert sorted(explained) == sorted(statuses)
    assert not DOCUMENTED.keys() - rows.keys()
    for request, names in DOCUMENTED.items():
        _, here, why = rows[request]
        told = {int(status) for status in re.findall(r"\b[1-5]\d\d\b", here)}
        for name in names:
            assert statuses[name] in (told or {200}), f"the row of {request} says otherwise of {name}"
        assert why


def test_exchanges_for_the_real_server_are_consistent():
    """The same request was never recorded with different responses."""
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


def test_the_servers_are_alive_after_all_exchanges(targets):
    for target in targets.values():
        (response,) = send(target, {"method": "GET", "path": "/v1/models/cifar10", "headers": {}})
        assert response.status == 200
