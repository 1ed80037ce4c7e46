"""The request log of a running service, and its parts."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from tensorflow_serving.apis import get_model_status_pb2

from serving.log_format import JsonFormatter, TextFormatter
from serving.log_output import MAX_QUEUED_LINES, BackgroundHandler, count_dropped_lines
from serving.request_context import RequestContext, current_request
from serving.request_log import access_logger, log_request, read_address
from tests.serving.conftest import Server, picture

ID = re.compile("[0-9a-f]{16}")
FIELDS = {
    *("time", "level", "logger", "message", "request_id", "trace_id", "caller", "client", "protocol", "method"),
    *("route", "model", "version", "images", "status", "queue_ms", "model_ms", "total_ms"),
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, colours: Path) -> Iterator[Server]:
    """A service that logs its requests as JSON, with one model."""
    folder = tmp_path_factory.mktemp("request-log")
    (folder / "models" / "colours").mkdir(parents=True)
    (folder / "models" / "colours" / "7").symlink_to(colours)
    server = Server(folder / "models", folder / "log", "--log-format", "json", "--access-log")
    try:
        server.wait_for("/readyz")
        yield server
    finally:
        server.process.kill()
        server.process.wait()


def lines(server: Server) -> list[dict[str, Any]]:
    """Return the log's lines, each of which is a JSON object."""
    return [json.loads(line) for line in server.log.splitlines()]


def find(server: Server, request_id: str) -> dict[str, Any]:
    """Wait for the line of a request."""
    found: list[dict[str, Any]] = []

    def has_line() -> bool:
        found[:] = [line for line in lines(server) if line.get("request_id") == request_id]
        return bool(found)

    server.wait_until(has_line)
    (line,) = found
    return line


def send(server: Server, data: bytes) -> tuple[int, str]:
    """Send bytes; returns the status and the ID of the response."""
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(data)
        head = b""
        while b"\r\n\r\n" not in head:
            more = connection.recv(65_536)
            assert more
            head += more
    sent = re.search(rb"\r\nX-Request-ID: ([!-~]+)\r\n", head)
    assert sent, head
    return int(head[9:12]), sent[1].decode()


def test_a_line_of_http_has_all_fields_and_no_contents(server: Server) -> None:
    headers = {"X-Request-ID": "a-trace/of:mine", "Content-Type": "image/png", "X-Secret": "hidden"}
    response = httpx.post(server.url + "/predict?model=colours", content=picture("red"), headers=headers)
    assert response.headers["X-Request-ID"] == "a-trace/of:mine"
    line = find(server, "a-trace/of:mine")
    assert line.keys() == FIELDS
    expected = {
        "level": "info",
        "logger": "serving.access",
        "message": "request",
        "protocol": "HTTP",
        "method": "POST",
        "client": "127.0.0.1",
        "route": "/predict",
        "model": "colours",
        "version": 7,
        "images": 1,
        "status": "200",
        "caller": None,
        "trace_id": None,
    }
    assert expected.items() <= line.items()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"])
    assert 0 < line["queue_ms"] + line["model_ms"] <= line["total_ms"]
    assert "hidden" not in server.log


def test_a_line_of_grpc_has_the_same_fields(server: Server) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        call = channel.unary_unary("/tensorflow.serving.ModelService/GetModelStatus")
        request = get_model_status_pb2.GetModelStatusRequest()
        request.model_spec.name = "colours"
        _, done = call.with_call(request.SerializeToString(), metadata=[("x-request-id", "from-grpc")])
        assert ("x-request-id", "from-grpc") in [(each.key, each.value) for each in done.trailing_metadata() or ()]
        request.model_spec.name = "nothing"
        with pytest.raises(grpc.RpcError) as failure:
            call(request.SerializeToString(), metadata=[("x-request-id", "not-found")])
        assert ("x-request-id", "not-found") in [(e.key, e.value) for e in failure.value.trailing_metadata()]
        _, done = call.with_call(request.SerializeToString().replace(b"nothing", b"colours"))
        assert not done.trailing_metadata()  # an ID is returned only if one was sent
    line = find(server, "from-grpc")
    assert line.keys() == FIELDS
    route = "/tensorflow.serving.ModelService/GetModelStatus"
    expected = {"protocol": "gRPC", "method": None, "client": "127.0.0.1", "route": route, "model": "colours"}
    assert {**expected, "status": "OK"}.items() <= line.items()
    assert find(server, "not-found")["status"] == "NOT_FOUND"


@pytest.mark.parametrize(
    ("status", "request_bytes"),
    [
        (400, b"no http\r\n\r\n"),
        (431, b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"a" * 70_000 + b"\r\n\r\n"),
        (501, b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n"),
        (400, b"GET / HTTP/1.1\r\nHost: x\r\nX-Request-Timeout-S: soon\r\n\r\n"),
        (400, b"POST /predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"),
    ],
)
def test_refusals_of_the_http_server_are_logged_counted_and_have_an_id(
    server: Server, status: int, request_bytes: bytes
) -> None:
    def count() -> float:
        page = httpx.get(server.url + "/metrics").text
        found = re.search(rf'serving_requests_total{{model="",route="unrouted",status="{status}"}} (\S+)', page)
        return float(found[1]) if found else 0

    before = count()
    got, request_id = send(server, request_bytes)
    assert (got, bool(ID.fullmatch(request_id))) == (status, True)
    expected = {"status": str(status), "route": "unrouted", "client": "127.0.0.1", "model": None}
    assert expected.items() <= find(server, request_id).items()
    assert count() == before + 1


def test_errors_of_the_app_have_an_id_and_a_clients_invalid_one_is_replaced(server: Server) -> None:
    for path, status in (("/nowhere", 404), ("/v1/nowhere", 400), ("/v2/models/nothing", 404), ("/healthz", 200)):
        for sent in ("", "two words", "a" * 129, "caf\u00e9", "a\tb"):
            headers = {b"X-Request-ID": sent.encode("latin-1")}
            response = httpx.get(server.url + path, headers=headers)
            assert response.status_code == status
            assert ID.fullmatch(response.headers["X-Request-ID"]), (path, sent)
    assert httpx.get(server.url, headers={"X-Request-ID": "x" * 128}).headers["X-Request-ID"] == "x" * 128


def test_library_and_event_lines_are_json_too(server: Server) -> None:
    events = [line for line in lines(server) if line["logger"] != "serving.access"]
    assert any("listening on" in line["message"] for line in events)
    assert not [line for line in events if line["level"] in ("warning", "error")]
    assert all({"time", "level", "logger", "message"} <= line.keys() for line in events)


# The formats


def record(message: object, *, error: Exception | None = None) -> logging.LogRecord:
    info = None if error is None else (type(error), error, None)
    return logging.LogRecord("library", logging.ERROR, "", 0, message, None, info)


HOSTILE = "x\r\n2026-01-01 CRITICAL root: forged\x1b[2J\x9b2J\u2028y\0"


@pytest.mark.parametrize("formatter", [TextFormatter(), JsonFormatter()], ids=["text", "json"])
def test_no_value_can_begin_a_line_or_control_a_terminal(formatter: logging.Formatter) -> None:
    token = current_request.set(RequestContext(request_id="not checked yet \x9b"))
    try:
        log = formatter.format(record(HOSTILE, error=ValueError(HOSTILE)))
    finally:
        current_request.reset(token)
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028]", log)
    first, *rest = log.split("\n")
    assert "forged" in first
    assert all(line.startswith("    ") for line in rest)
    if isinstance(formatter, JsonFormatter):
        assert not rest
        assert json.loads(log)["message"] == HOSTILE


def test_an_event_line_names_the_request_that_it_is_about() -> None:
    token = current_request.set(RequestContext(request_id="abc"))
    try:
        assert TextFormatter().format(record("failed")).endswith("ERROR library: failed (request abc)")
        assert json.loads(JsonFormatter().format(record("failed")))["request_id"] == "abc"
    finally:
        current_request.reset(token)


def test_names_that_are_not_unicode_are_escaped() -> None:
    name = os.fsdecode(b"caf\xe9")
    assert "caf\\xe9" in TextFormatter().format(record(name))
    assert json.loads(JsonFormatter().format(record(name)))["message"] == "caf\\xe9"


def test_a_text_line_quotes_what_could_be_mistaken_for_a_field(caplog: pytest.LogCaptureFixture) -> None:
    context = RequestContext(client="10.0.0.1", method="GET", route="/v2", status="200", model="x caller=root\n")
    context.request_id, context.caller = 'i"d', "ci"
    with caplog.at_level(logging.INFO, access_logger.name):
        log_request(context, 0.0015)
    assert (
        TextFormatter()
        .format(caplog.records[-1])
        .endswith(r'10.0.0.1 HTTP GET /v2 200 1.5 ms model="x caller=root\n" caller=ci id="i\"d"')
    )


@pytest.mark.parametrize(
    ("client", "address"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("::1", "::1"),
        ("ipv4:127.0.0.1:5000", "127.0.0.1"),
        ("ipv6:%5B::1%5D:5000", "::1"),
        ("unix:/tmp/socket", "unix:/tmp/socket"),
    ],
)
def test_the_address_of_a_client(client: str, address: str) -> None:
    assert read_address(client) == address


# The output


def test_the_limit_of_the_queue_is_documented() -> None:
    page = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()
    assert f"{MAX_QUEUED_LINES:,} lines are waiting" in " ".join(page.split())


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        with contextlib.suppress(OSError):
            os.close(end)


@pytest.mark.parametrize("collect_s", [0.0, 60.0])
def test_flush_writes_all_lines_in_order_without_waiting_for_more(pipe: tuple[int, int], collect_s: float) -> None:
    handler = BackgroundHandler(pipe[1], collect_s=collect_s)
    for number in range(500):
        handler.handle(record(f"line {number}"))
    handler.flush()
    assert os.read(pipe[0], 100_000).decode().splitlines() == [f"line {number}" for number in range(500)]


def test_a_full_pipe_blocks_nobody_and_the_dropped_lines_are_counted(pipe: tuple[int, int]) -> None:
    before = count_dropped_lines()
    handler = BackgroundHandler(pipe[1])
    text = "x" * 100
    sent = 3 * MAX_QUEUED_LINES
    for _ in range(sent):  # a pipe holds 64 KiB
        handler.handle(record(text))
    assert handler.dropped > 0
    assert count_dropped_lines() - before == handler.dropped
    read = b""
    while read.count(b"\n") < sent - handler.dropped:  # the rest arrives once it is read
        read += os.read(pipe[0], 1_000_000)
    assert set(read.split()) == {text.encode()}


def test_lines_without_a_reader_are_counted_as_dropped(pipe: tuple[int, int]) -> None:
    handler = BackgroundHandler(pipe[1])
    os.close(pipe[0])
    handler.handle(record("nobody reads this"))
    handler.flush()
    assert handler.dropped == 1
