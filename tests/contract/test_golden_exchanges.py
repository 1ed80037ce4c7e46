"""Every recorded exchange with a real TensorFlow Serving, replayed against this service."""

import base64
import gzip
import http.client
import json
import math
import shutil
import socket
from pathlib import Path

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


# As the recordings' server was configured.
MODEL_CONFIG = """
model_config_list {{
  config {{ name: "cifar10" base_path: "{models}/cifar10" model_platform: "tensorflow"
            version_labels {{ key: "stable" value: 1 }} }}
  config {{ name: "multi" base_path: "{models}/multi" model_platform: "tensorflow" }}
}}
"""


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    """By the configuration: one that follows its models folder, one with a model config file and a label."""
    folder = tmp_path_factory.mktemp("golden")
    for model in ("cifar10", "multi"):
        shutil.copytree(GOLDEN / model, folder / "models" / model)
    (folder / "models.config").write_text(MODEL_CONFIG.format(models=folder / "models"))
    servers = {
        "default": Server(folder / "models", folder / "log"),
        "config-file": Server(folder, folder / "log2", "--model-config-file", str(folder / "models.config")),
    }
    for server in servers.values():
        server.wait_for("/readyz")
    yield servers
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


def send(server, request):
    """Send a recorded request; return (status, content type, body)."""
    if "raw" in request:
        raw = request["raw"]
        with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
            connection.sendall(base64.b64decode(raw["base64"]) if isinstance(raw, dict) else raw.encode())
            response = http.client.HTTPResponse(connection, method="POST")
            response.begin()
            return response.status, response.getheader("Content-Type"), response.read()
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
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
def test_it_answers_as_tensorflow_serving_does(servers, exchange):
    server = servers.get(exchange["server"], servers["default"])
    name, recorded = exchange["name"], exchange.get("response") or {}
    status, content_type, body = send(server, exchange["request"])
    if name in DIFFERENT or "outcome" in exchange:
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


def test_the_services_are_alive_after_all_of_it(servers):
    for server in servers.values():
        assert server.process.poll() is None
        assert send(server, {"method": "GET", "path": "/readyz", "headers": {}})[0] == 200
