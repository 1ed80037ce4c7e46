"""The transport against a real server that misbehaves: what is tried again, how often, and what is told."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest
from PIL import Image

from client.backoff import LONGEST_WAIT_S, choose_wait_s
from client.errors import (
    ClientError,
    ConnectionFailed,
    ModelNotFound,
    RequestRejected,
    RequestTimedOut,
    ServerBusy,
    ServerFailed,
    UnexpectedReply,
)
from client.grpc import GrpcTransport
from client.images import Picture
from client.predictions import ModelStatus, Prediction, ServiceStatus
from client.rest import RestTransport
from tests.client.conftest import png_of
from tests.client.service import Handler, Server, Service, busy, classify, drip, hang_up, hang_up_midway, reply, stall

RED = Picture(index=0, file="red.png", content=png_of("red"))
GREEN = Picture(index=1, file="green.png", content=png_of("green"))


class Waits(list[float]):
    """Stands for time.sleep: notes how long it was to be."""

    def __call__(self, seconds: float) -> None:
        self.append(seconds)


@pytest.fixture
def waits() -> Waits:
    return Waits()


def labels(transport: RestTransport, *pictures: Picture) -> list[str]:
    return [outcome.label for outcome in transport.predict_batch(pictures) if isinstance(outcome, Prediction)]


@pytest.mark.parametrize("trouble", [busy(), hang_up, hang_up_midway, reply(503, b"<h1>starting</h1>", "text/html")])
def test_what_may_pass_is_tried_again(service: Service, waits: Waits, trouble: Callable[[Handler], None]) -> None:
    service.script.extend([trouble, trouble])
    transport = RestTransport(service.url, sleep=waits)
    assert labels(transport, RED, GREEN) == ["red", "green"]
    assert len(service.received) == 3
    assert 0.125 <= waits[0] <= 0.25 <= waits[1] <= 0.5


@pytest.mark.parametrize(
    ("trouble", "kind", "message"),
    [
        (
            busy(),
            ServerBusy,
            "is not ready: colours is being loaded; `\\S+ -m client status --url http://127.0.0.1:[0-9]+` tells",
        ),
        (hang_up, ConnectionFailed, "connection to http://127.0.0.1:[0-9]+ broke"),
        (hang_up_midway, ConnectionFailed, "connection to http://127.0.0.1:[0-9]+ broke"),
    ],
)
@pytest.mark.parametrize("retries", [0, 1, 3])
def test_retries_are_bounded(
    service: Service,
    waits: Waits,
    trouble: Callable[[Handler], None],
    kind: type[ClientError],
    message: str,
    retries: int,
) -> None:
    service.script.extend([trouble] * 10)
    with pytest.raises(kind, match=message) as caught:
        RestTransport(service.url, retries=retries, sleep=waits).predict_batch([RED])
    assert len(service.received) == retries + 1
    assert len(waits) == retries
    assert (f"tried {retries + 1} times" in str(caught.value)) == (retries > 0)


@pytest.mark.parametrize(
    ("answer", "kind", "message"),
    [
        (
            reply(404, {"error": "no model cats; served: colours"}),
            ModelNotFound,
            "no model cats; served: colours .*-m client status --url http:",
        ),
        (reply(400, {"error": "several models are served"}), RequestRejected, r"refuses .* \(400\): several models"),
        (
            reply(400, {"error": "several; use the query parameter model", "models": ["a", "b"]}),
            RequestRejected,
            r"has several models; choose one with model \(--model\): a, b$",
        ),
        (reply(415, {"error": "send pictures"}), RequestRejected, r"\(415\): send pictures"),
        (reply(429, {"error": "slower"}), RequestRejected, r"\(429\): slower"),
        (reply(500, {"error": "see the log"}), ServerFailed, r"failed \(500\): see the log"),
        (
            reply(502, b"<html>Bad Gateway</html>", "text/html"),
            UnexpectedReply,
            "got 502 Bad Gateway, text/html, '<html>Bad Gateway</html>'",
        ),
        (reply(404, b"<html>", "text/html"), UnexpectedReply, "expected predictions or an error as JSON"),
        (reply(301, b"", "text/html"), UnexpectedReply, "got 301 Moved Permanently"),
        (reply(200, b"<html>Welcome</html>", "text/html"), UnexpectedReply, "expected predictions as JSON .*Welcome"),
        (reply(200, b'{"model"'), UnexpectedReply, "expected predictions as JSON"),
        (reply(200, b"[" * 100_000), UnexpectedReply, "expected predictions as JSON"),
        (reply(200, b"\xff\xfe\x00"), UnexpectedReply, "expected predictions as JSON"),
        (reply(200, {"predictions": [[0.1, 0.9]]}), UnexpectedReply, "expected predictions as JSON"),
        (
            reply(200, {"model": {"name": "m", "version": 1}, "predictions": []}),
            UnexpectedReply,
            "expected 1 predictions from http://127.0.0.1:[0-9]+, got 0",
        ),
        (
            reply(200, {"model": {"name": "m", "version": 1}, "predictions": [{"label": "cat"}]}),
            UnexpectedReply,
            "expected label, class_id, confidence and probabilities .* got {'label': 'cat'}",
        ),
        (
            reply(
                200,
                {
                    "model": {"name": "m", "version": 1},
                    "predictions": [
                        {"label": "cat", "class_id": 0, "confidence": 1.0, "probabilities": {"cat": None}}  # NaN
                    ],
                },
            ),
            UnexpectedReply,
            "expected label, class_id, confidence and probabilities",
        ),
        (
            reply(400, {"error": "1 bad", "errors": [{"index": 4, "file": "a", "error": "b"}]}),
            UnexpectedReply,
            "expected the index, below 1, and the error",
        ),
        (stall, RequestTimedOut, r"no whole answer from .* within 0.3 s; allow more time with timeout_s \(--timeout\)"),
        (drip, RequestTimedOut, "no whole answer"),
    ],
)
def test_nothing_else_is_tried_again(
    service: Service, waits: Waits, answer: Callable[[Handler], None], kind: type[ClientError], message: str
) -> None:
    service.script.extend([answer] * 10)
    transport = RestTransport(service.url, timeout_s=0.3 if answer in (stall, drip) else 30, sleep=waits)
    with pytest.raises(kind, match=message):
        transport.predict_batch([RED])
    assert len(service.received) == 1
    assert waits == []


def test_the_reply_must_be_for_as_many_pictures(service: Service) -> None:
    row = classify(Image.new("RGB", (2, 2)))
    service.script.append(reply(200, {"model": {"name": "m", "version": 1}, "predictions": [row]}))
    with pytest.raises(UnexpectedReply, match="expected 2 predictions"):
        RestTransport(service.url).predict_batch([RED, GREEN])


def test_an_endless_reply_is_given_up(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("client.rest.MAX_REPLY_BYTES", 1000)
    service.script.append(reply(200, b" " * 1001))
    with pytest.raises(UnexpectedReply, match="more than 1,000 bytes"):
        RestTransport(service.url).predict_batch([RED])


def test_retry_after_is_honoured_and_capped(service: Service, waits: Waits) -> None:
    in_an_hour = format_datetime(datetime.now(UTC) + timedelta(hours=1), usegmt=True)
    service.script.extend([busy("2"), busy("3600"), busy(in_an_hour), busy("soon"), busy("-5"), busy("")])
    assert labels(RestTransport(service.url, retries=6, sleep=waits), RED) == ["red"]
    assert waits[:3] == [2.0, LONGEST_WAIT_S, LONGEST_WAIT_S]
    assert all(0 < wait <= LONGEST_WAIT_S for wait in waits[3:])


def test_waits_double_up_to_a_limit_and_are_not_alike() -> None:
    for attempt, longest in enumerate((0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 10.0, 10.0), start=1):
        drawn = [choose_wait_s(attempt) for _ in range(50)]
        assert all(longest / 2 <= wait <= longest for wait in drawn)
    assert len({choose_wait_s(3) for _ in range(50)}) > 1
    assert choose_wait_s(10_000) <= LONGEST_WAIT_S


def test_the_time_for_all_attempts_together_is_bounded(service: Service) -> None:
    service.script.extend([busy("5")] * 10)
    waits = Waits()
    with pytest.raises(ServerBusy):
        RestTransport(service.url, timeout_s=3, retries=100, sleep=waits).predict_batch([RED])
    assert waits == []  # a wait that would outlast the time is not begun
    assert len(service.received) == 1


def test_a_service_that_is_not_there_says_how_to_start_it(closed_port: int, waits: Waits) -> None:
    with pytest.raises(ConnectionFailed) as caught:
        RestTransport(f"http://127.0.0.1:{closed_port}", retries=2, sleep=waits).predict_batch([RED])
    assert f"cannot connect to http://127.0.0.1:{closed_port} (" in str(caught.value)
    assert "Connection refused" in str(caught.value)
    assert "Start it with `make serve`" in str(caught.value)
    assert len(waits) == 2


def test_a_service_that_comes_up_meanwhile_is_reached() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started: list[Server] = []

    def start_it(_: float) -> None:
        if not started:
            server = Server(("127.0.0.1", port), Handler)
            server.service = Service(port=port)
            threading.Thread(target=server.serve_forever, daemon=True).start()
            started.append(server)

    try:
        assert labels(RestTransport(f"http://127.0.0.1:{port}", sleep=start_it), RED) == ["red"]
    finally:
        for server in started:
            server.shutdown()
            server.server_close()


def test_a_connection_that_is_never_accepted_times_out() -> None:
    with socket.socket() as full, socket.socket() as first, socket.socket() as second:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for waiting in (first, second):  # as many as the queue holds; the next stays without an answer
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        url = f"http://127.0.0.1:{full.getsockname()[1]}"
        with pytest.raises(ConnectionFailed, match="cannot connect"):  # and not only after the system's minutes
            RestTransport(url, timeout_s=0.2).predict_batch([RED])


def test_the_proxies_of_the_environment_are_not_for_this_machine(
    service: Service, monkeypatch: pytest.MonkeyPatch, closed_port: int
) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{closed_port}")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    for host in ("127.0.0.1", "localhost", "0.0.0.0"):
        assert labels(RestTransport(f"http://{host}:{service.port}", retries=0), RED) == ["red"]


def test_the_proxies_of_the_environment_are_used_for_other_machines(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", service.url)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert labels(RestTransport("http://classifier.invalid:8501", retries=0), RED) == ["red"]
    assert service.received[0].path == "/predict"


def test_proxy_settings_that_cannot_be_used_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "gopher://127.0.0.1:70")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with pytest.raises(ValueError, match="the environment's proxy settings cannot be used"):
        RestTransport("http://classifier.invalid:8501")


@pytest.mark.parametrize(
    "url",
    ["localhost:8501", "127.0.0.1:8501", "", "http://", "ftp://host", "http://host:x", "http://h/?a=1", "cat.png"],
)
def test_an_address_that_is_none_is_told(url: str) -> None:
    with pytest.raises(ValueError, match="expected an address such as http:"):
        RestTransport(url)


def test_an_address_may_have_a_path_and_a_password_that_is_not_shown(service: Service) -> None:
    url = f"http://ann:secret@127.0.0.1:{service.port}/vision/"
    assert labels(RestTransport(url), RED) == ["red"]
    assert service.received[0].path == "/vision/predict"
    service.script.append(reply(500, {"error": "no"}))
    with pytest.raises(ServerFailed) as caught:
        RestTransport(url).predict_batch([RED])
    assert f"127.0.0.1:{service.port}" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_connection_that_was_closed_in_between_is_opened_again(service: Service, waits: Waits) -> None:
    def answer_and_close(handler: Handler) -> None:
        handler.predict(handler.received.files)
        handler.close_connection = True  # without telling so in a header, as a restarting server does

    service.script.append(answer_and_close)
    transport = RestTransport(service.url, sleep=waits)
    assert labels(transport, RED) == ["red"]
    assert labels(transport, GREEN) == ["green"]
    assert len({request.connection for request in service.received}) == 2


def test_several_threads_may_share_one(service: Service) -> None:
    transport = RestTransport(service.url)
    results: list[list[str]] = []

    def ask() -> None:
        for _ in range(5):
            results.append(labels(transport, RED, GREEN))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [["red", "green"]] * 20


def test_status_is_asked_once(service: Service, waits: Waits, closed_port: int) -> None:
    transport = RestTransport(service.url, sleep=waits)
    assert transport.status() == ServiceStatus(True, None, (ModelStatus("colours", 7, "AVAILABLE"),))
    loading = {
        "ready": False,
        "reason": "colours is being loaded",
        "models": [{"name": "colours", "version": 7, "state": "LOADING", "warmup_records": 0, "error": None}],
    }
    service.script.append(reply(503, loading))
    assert transport.status() == ServiceStatus(
        False, "colours is being loaded", (ModelStatus("colours", 7, "LOADING"),)
    )
    for answer in (
        reply(200, b"<html>", "text/html"),
        reply(503, b"<html>", "text/html"),
        reply(200, {"ready": True, "models": [1]}),
        reply(404, b"<html>", "text/html"),
    ):
        service.script.append(answer)
        with pytest.raises(UnexpectedReply, match="is this the address of the service"):
            transport.status()
    with pytest.raises(ConnectionFailed, match="make serve"):
        RestTransport(f"http://127.0.0.1:{closed_port}", sleep=waits).status()
    assert waits == []


def test_nothing_is_sent_after_closing(service: Service) -> None:
    transport = RestTransport(service.url)
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
def test_a_model_and_a_version_that_no_service_has_are_refused_before_anything_is_sent(
    chosen: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        RestTransport("http://127.0.0.1:1", **chosen)
    if chosen["model"]:
        with pytest.raises(ValueError, match=message):
            GrpcTransport("127.0.0.1:1", **chosen)
