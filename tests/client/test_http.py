"""`HttpTransport` with a misbehaving server: retries, timeouts and error messages."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import httpx
import pytest
from PIL import Image

from client.errors import (
    ClientError,
    ConnectionFailed,
    ModelNotFound,
    RequestRejected,
    RequestTimedOut,
    ServerBusy,
    ServerFailed,
    UnexpectedResponse,
)
from client.grpc import GrpcTransport
from client.http import HttpTransport, make_httpx_client
from client.images import LoadedImage
from client.options import DEFAULT_RETRIES, DEFAULT_TIMEOUT_S, LONGEST_WAIT_S, choose_wait_s
from client.predictions import ModelStatus, Prediction, ServiceStatus
from client.rest import RestApi
from tests.client.conftest import png_of
from tests.client.service import (
    Handler,
    Server,
    Service,
    busy,
    classify,
    drip,
    hang_up,
    hang_up_midway,
    respond,
    stall,
)

RED = LoadedImage(index=0, file="red.png", content=png_of("red"))
GREEN = LoadedImage(index=1, file="green.png", content=png_of("green"))


def connect(
    url: str,
    *,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    retries: int = DEFAULT_RETRIES,
    sleep: Callable[[float], None] = time.sleep,
    **options: Any,
) -> HttpTransport:
    api = RestApi(url, timeout_s=timeout_s, retries=retries, **options)
    return HttpTransport(api, make_httpx_client(httpx.Client, api), sleep=sleep)


class Waits(list[float]):
    """Replaces time.sleep and records the waits."""

    def __call__(self, seconds: float) -> None:
        self.append(seconds)


@pytest.fixture
def waits() -> Waits:
    return Waits()


def labels(transport: HttpTransport, *images: LoadedImage) -> list[str]:
    return [outcome.label for outcome in transport.predict_batch(images) if isinstance(outcome, Prediction)]


@pytest.mark.parametrize("failure", [busy(), hang_up, hang_up_midway, respond(503, b"<h1>starting</h1>", "text/html")])
def test_temporary_failures_are_retried(service: Service, waits: Waits, failure: Callable[[Handler], None]) -> None:
    service.script.extend([failure, failure])
    transport = connect(service.url, sleep=waits)
    assert labels(transport, RED, GREEN) == ["red", "green"]
    assert len(service.received) == 3
    assert 0.125 <= waits[0] <= 0.25 <= waits[1] <= 0.5


@pytest.mark.parametrize(
    ("failure", "kind", "message"),
    [
        (
            busy(),
            ServerBusy,
            "is not ready: colours is being loaded; check with `\\S+ -m client status --url http://127.0.0.1:[0-9]+`",
        ),
        (hang_up, ConnectionFailed, "connection to http://127.0.0.1:[0-9]+ was closed"),
        (hang_up_midway, ConnectionFailed, "connection to http://127.0.0.1:[0-9]+ was closed"),
    ],
)
@pytest.mark.parametrize("retries", [0, 1, 3])
def test_retries_are_bounded(
    service: Service,
    waits: Waits,
    failure: Callable[[Handler], None],
    kind: type[ClientError],
    message: str,
    retries: int,
) -> None:
    service.script.extend([failure] * 10)
    with pytest.raises(kind, match=message) as caught:
        connect(service.url, retries=retries, sleep=waits).predict_batch([RED])
    assert len(service.received) == retries + 1
    assert len(waits) == retries
    assert (f"tried {retries + 1} times" in str(caught.value)) == (retries > 0)


@pytest.mark.parametrize(
    ("response", "kind", "message"),
    [
        (
            respond(404, {"error": "no model cats; served: colours"}),
            ModelNotFound,
            "no model cats; served: colours .*-m client status --url http:",
        ),
        (respond(400, {"error": "several models are served"}), RequestRejected, r"rejected .* \(400\): several models"),
        (
            respond(400, {"error": "several; use the query parameter model", "models": ["a", "b"]}),
            RequestRejected,
            r"has several models; choose one with model \(--model\): a, b$",
        ),
        (respond(415, {"error": "send images"}), RequestRejected, r"\(415\): send images"),
        (respond(500, {"error": "see the log"}), ServerFailed, r"failed \(500\): see the log"),
        (
            respond(502, b"<html>Bad Gateway</html>", "text/html"),
            UnexpectedResponse,
            "got 502 Bad Gateway, text/html, '<html>Bad Gateway</html>'",
        ),
        (respond(404, b"<html>", "text/html"), UnexpectedResponse, "expected predictions or an error as JSON"),
        (respond(301, b"", "text/html"), UnexpectedResponse, "got 301 Moved Permanently"),
        (
            respond(200, b"<html>Welcome</html>", "text/html"),
            UnexpectedResponse,
            "expected predictions as JSON .*Welcome",
        ),
        (respond(200, b'{"model"'), UnexpectedResponse, "expected predictions as JSON"),
        (respond(200, b"[" * 100_000), UnexpectedResponse, "expected predictions as JSON"),
        (respond(200, b"\xff\xfe\x00"), UnexpectedResponse, "expected predictions as JSON"),
        (respond(200, {"predictions": [[0.1, 0.9]]}), UnexpectedResponse, "expected predictions as JSON"),
        (
            respond(200, {"model": {"name": "m", "version": 1}, "predictions": []}),
            UnexpectedResponse,
            "expected 1 predictions from http://127.0.0.1:[0-9]+, got 0",
        ),
        (
            respond(200, {"model": {"name": "m", "version": 1}, "predictions": [{"label": "cat"}]}),
            UnexpectedResponse,
            "expected label, class_id, confidence and probabilities .* got {'label': 'cat'}",
        ),
        (
            respond(
                200,
                {
                    "model": {"name": "m", "version": 1},
                    "predictions": [
                        {"label": "cat", "class_id": 0, "confidence": 1.0, "probabilities": {"cat": None}}  # NaN
                    ],
                },
            ),
            UnexpectedResponse,
            "expected label, class_id, confidence and probabilities",
        ),
        (
            respond(400, {"error": "1 bad", "errors": [{"index": 4, "file": "a", "error": "b"}]}),
            UnexpectedResponse,
            "expected the index, below 1, and the error",
        ),
        (
            stall,
            RequestTimedOut,
            r"no complete response from .* within 0.3 s; allow more time with timeout_s \(--timeout\)",
        ),
        (drip, RequestTimedOut, "no complete response"),
    ],
)
def test_other_failures_are_not_retried(
    service: Service, waits: Waits, response: Callable[[Handler], None], kind: type[ClientError], message: str
) -> None:
    service.script.extend([response] * 10)
    transport = connect(service.url, timeout_s=0.3 if response in (stall, drip) else 30, sleep=waits)
    with pytest.raises(kind, match=message):
        transport.predict_batch([RED])
    assert len(service.received) == 1
    assert waits == []


def test_number_of_predictions_is_checked(service: Service) -> None:
    row = classify(Image.new("RGB", (2, 2)))
    service.script.append(respond(200, {"model": {"name": "m", "version": 1}, "predictions": [row]}))
    with pytest.raises(UnexpectedResponse, match="expected 2 predictions"):
        connect(service.url).predict_batch([RED, GREEN])


def test_response_size_is_limited(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("client.http.MAX_RESPONSE_BYTES", 1000)
    service.script.append(respond(200, b" " * 1001))
    with pytest.raises(UnexpectedResponse, match="exceeds 1,000 bytes"):
        connect(service.url).predict_batch([RED])


def test_retry_after_is_respected_up_to_a_limit(service: Service, waits: Waits) -> None:
    in_an_hour = format_datetime(datetime.now(UTC) + timedelta(hours=1), usegmt=True)
    service.script.extend([busy("2"), busy("3600"), busy(in_an_hour), busy("soon"), busy("-5"), busy("")])
    assert labels(connect(service.url, retries=6, sleep=waits), RED) == ["red"]
    assert waits[:3] == [2.0, LONGEST_WAIT_S, LONGEST_WAIT_S]
    assert all(0 < wait <= LONGEST_WAIT_S for wait in waits[3:])


def test_waits_grow_exponentially_with_jitter() -> None:
    for attempt, longest in enumerate((0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 10.0, 10.0), start=1):
        drawn = [choose_wait_s(attempt) for _ in range(50)]
        assert all(longest / 2 <= wait <= longest for wait in drawn)
    assert len({choose_wait_s(3) for _ in range(50)}) > 1
    assert choose_wait_s(10_000) <= LONGEST_WAIT_S


def test_timeout_includes_retries(service: Service) -> None:
    service.script.extend([busy("5")] * 10)
    waits = Waits()
    with pytest.raises(ServerBusy):
        connect(service.url, timeout_s=3, retries=100, sleep=waits).predict_batch([RED])
    assert waits == []  # a wait beyond the timeout is not started
    assert len(service.received) == 1


def test_connection_refused_says_how_to_start_the_service(closed_port: int, waits: Waits) -> None:
    with pytest.raises(ConnectionFailed) as caught:
        connect(f"http://127.0.0.1:{closed_port}", retries=2, sleep=waits).predict_batch([RED])
    assert f"cannot connect to http://127.0.0.1:{closed_port} (" in str(caught.value)
    assert "Connection refused" in str(caught.value)
    assert "start the service with `make serve`" in str(caught.value)
    assert len(waits) == 2


def test_service_that_starts_during_the_retries_is_reached() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started: list[Server] = []

    def start_server(_: float) -> None:
        if not started:
            server = Server(("127.0.0.1", port), Handler)
            server.service = Service(port=port)
            threading.Thread(target=server.serve_forever, daemon=True).start()
            started.append(server)

    try:
        assert labels(connect(f"http://127.0.0.1:{port}", sleep=start_server), RED) == ["red"]
    finally:
        for server in started:
            server.shutdown()
            server.server_close()


def test_connection_attempt_times_out() -> None:
    with socket.socket() as full, socket.socket() as first, socket.socket() as second:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for waiting in (first, second):  # fill the queue; the next connection is not accepted
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        url = f"http://127.0.0.1:{full.getsockname()[1]}"
        with pytest.raises(ConnectionFailed, match="cannot connect"):  # long before the system's timeout
            connect(url, timeout_s=0.2).predict_batch([RED])


def test_environment_proxies_are_not_used_for_this_machine(
    service: Service, monkeypatch: pytest.MonkeyPatch, closed_port: int
) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{closed_port}")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    for host in ("127.0.0.1", "localhost", "0.0.0.0"):
        assert labels(connect(f"http://{host}:{service.port}", retries=0), RED) == ["red"]


def test_environment_proxies_are_used_for_other_machines(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", service.url)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert labels(connect("http://classifier.invalid:8501", retries=0), RED) == ["red"]
    assert service.received[0].path == "/predict"


def test_invalid_proxy_settings_raise_a_value_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "gopher://127.0.0.1:70")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with pytest.raises(ValueError, match="proxy settings in the environment are invalid"):
        connect("http://classifier.invalid:8501")


@pytest.mark.parametrize(
    "url",
    ["localhost:8501", "127.0.0.1:8501", "", "http://", "ftp://host", "http://host:x", "http://h/?a=1", "cat.png"],
)
def test_invalid_urls_raise_a_value_error(url: str) -> None:
    with pytest.raises(ValueError, match="expected an address such as http:"):
        connect(url)


def test_url_may_have_a_path_and_its_password_is_not_shown(service: Service) -> None:
    url = f"http://ann:secret@127.0.0.1:{service.port}/vision/"
    assert labels(connect(url), RED) == ["red"]
    assert service.received[0].path == "/vision/predict"
    service.script.append(respond(500, {"error": "no"}))
    with pytest.raises(ServerFailed) as caught:
        connect(url).predict_batch([RED])
    assert f"127.0.0.1:{service.port}" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_closed_connection_is_reopened(service: Service, waits: Waits) -> None:
    def respond_and_close(handler: Handler) -> None:
        handler.predict(handler.received.files)
        handler.close_connection = True  # without "Connection: close", like a restarting server

    service.script.append(respond_and_close)
    transport = connect(service.url, sleep=waits)
    assert labels(transport, RED) == ["red"]
    assert labels(transport, GREEN) == ["green"]
    assert len({request.connection for request in service.received}) == 2


def test_transport_is_thread_safe(service: Service) -> None:
    transport = connect(service.url)
    results: list[list[str]] = []

    def predict() -> None:
        for _ in range(5):
            results.append(labels(transport, RED, GREEN))

    threads = [threading.Thread(target=predict) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [["red", "green"]] * 20


def test_status_is_not_retried(service: Service, waits: Waits, closed_port: int) -> None:
    transport = connect(service.url, sleep=waits)
    assert transport.status() == ServiceStatus(True, None, (ModelStatus("colours", 7, "AVAILABLE"),))
    loading = {
        "ready": False,
        "reason": "colours is being loaded",
        "models": [{"name": "colours", "version": 7, "state": "LOADING", "warmup_records": 0, "error": None}],
    }
    service.script.append(respond(503, loading))
    assert transport.status() == ServiceStatus(
        False, "colours is being loaded", (ModelStatus("colours", 7, "LOADING"),)
    )
    for response in (
        respond(200, b"<html>", "text/html"),
        respond(503, b"<html>", "text/html"),
        respond(200, {"ready": True, "models": [1]}),
        respond(404, b"<html>", "text/html"),
    ):
        service.script.append(response)
        with pytest.raises(UnexpectedResponse, match="check that this is the address of the service"):
            transport.status()
    with pytest.raises(ConnectionFailed, match="make serve"):
        connect(f"http://127.0.0.1:{closed_port}", sleep=waits).status()
    assert waits == []


def test_nothing_is_sent_after_close(service: Service) -> None:
    transport = connect(service.url)
    assert labels(transport, RED) == ["red"]
    transport.close()
    with pytest.raises(RuntimeError, match="closed"):
        transport.status()
    assert len(service.received) == 1


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"model": ""}, "model must not be empty"),
        ({"model": "m", "version": -1}, "version must be from 0 to 9223372036854775807, not -1"),
        ({"model": "m", "version": 2**63}, "version must be from 0 to 9223372036854775807, not 9223372036854775808"),
    ],
)
def test_invalid_model_or_version_raises_a_value_error(chosen: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        connect("http://127.0.0.1:1", **chosen)
    if chosen["model"]:
        with pytest.raises(ValueError, match=message):
            GrpcTransport("127.0.0.1:1", **chosen)
