"""The service in front of several backends: balancing, health, versions that differ, retries and their limits."""

from __future__ import annotations

import logging
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from flask.testing import FlaskClient

from serving.api.flask_app import ServingApp
from serving.errors import StartupError
from serving.inference import remote_addresses, remote_channels
from serving.inference.remote_addresses import AddressResolver, parse_addresses
from serving.inference.remote_channels import make_target
from serving.server_process import free_ports
from serving.settings import Settings
from tests.serving.inference.backend import Backend, make_remote_app, predict, v2_request

STATUS = "/v1/models/m"


@pytest.fixture
def backends() -> Iterator[tuple[Backend, Backend]]:
    """Two servers with the health service and version 1 of the model."""
    pair = Backend(checked=True), Backend(checked=True)
    yield pair
    for backend in pair:
        backend.stop()


def make_front(*backends: Backend, address: str | None = None) -> tuple[ServingApp, FlaskClient]:
    app = make_remote_app(address or ",".join(backend.address for backend in backends))
    app.inference.repository.load()
    return app, app.test_client()


def wait_until(condition: Callable[[], bool]) -> None:
    end_s = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.02)


def count(client: FlaskClient, backends: tuple[Backend, ...], requests: int = 20) -> tuple[int, ...]:
    """Send requests, which must succeed; returns how many of them each backend got."""
    for backend in backends:
        backend.rows.clear()
    assert {predict(client).status_code for _ in range(requests)} == {200}
    return tuple(len(backend.rows) for backend in backends)


def answering_version(client: FlaskClient, path: str = "/v2/models/m/infer") -> str:
    response = client.post(path, json=v2_request(1))
    assert response.status_code == 200, response.text
    document = response.get_json()
    (data,) = [output["data"] for output in document["outputs"] if output["name"] == "y"]
    assert data == [float(document["model_version"]) + 1] * 2  # as the backend computes it
    return str(document["model_version"])


def test_requests_go_to_all_backends_in_turns(backends: tuple[Backend, Backend]) -> None:
    _, client = make_front(*backends)
    wait_until(lambda: count(client, backends) == (10, 10))
    assert client.get(STATUS).get_json()["model_version_status"] == [
        {"version": "1", "state": "AVAILABLE", "status": {"error_code": "OK", "error_message": ""}}
    ]


def test_a_name_with_several_addresses_stands_for_several_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    first = Backend("127.0.0.1")
    second = Backend("127.0.0.2", first.port)
    addresses = ["127.0.0.1", "127.0.0.2"]

    def look_up(host: str, port: int, **_: Any) -> list[Any]:
        assert host == "backends.example"
        assert port == first.port
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(remote_addresses, "RESOLVE_INTERVAL_S", 0.0)
    app, client = make_front(address=f"backends.example:{first.port}")
    wait_until(lambda: count(client, (first, second)) == (10, 10))
    addresses.remove("127.0.0.1")  # as in a rolling update
    app.inference.repository.poll()
    first.stop()
    assert count(client, (first, second)) == (0, 20)
    second.stop()


def test_a_backend_that_is_not_serving_gets_no_requests(backends: tuple[Backend, Backend]) -> None:
    first, second = backends
    _, client = make_front(first, second)
    wait_until(lambda: count(client, backends) == (10, 10))
    first.set_serving(False)
    wait_until(lambda: count(client, backends) == (0, 20))
    first.set_serving(True)
    wait_until(lambda: count(client, backends) == (10, 10))


def test_backends_without_a_health_service_are_taken_as_healthy() -> None:
    """As a stock TensorFlow Serving is: its Watch is UNIMPLEMENTED."""
    pair = Backend(), Backend()
    _, client = make_front(*pair)
    wait_until(lambda: count(client, pair) == (10, 10))
    for backend in pair:
        backend.stop()


def test_a_lost_backend_fails_no_request_and_rejoins(
    backends: tuple[Backend, Backend], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    first, second = backends
    app, client = make_front(first, second)
    repository = app.inference.repository
    first.stop()
    assert count(client, backends) == (0, 20)
    repository.poll()
    (status,) = client.get(STATUS).get_json()["model_version_status"]
    note = f"1 of 2 remote servers have this version: {second.address}"
    assert (status["state"], status["status"]) == ("AVAILABLE", {"error_code": "OK", "error_message": note})
    again = Backend(port=first.port, checked=True)

    def rejoins() -> bool:
        repository.poll()
        return count(client, (again, second)) == (10, 10)

    wait_until(rejoins)
    again.stop()
    lines = [record.getMessage() for record in caplog.records]
    assert sum(f"TensorFlow Serving at {first.address} cannot be reached" in line for line in lines) == 1
    assert f"TensorFlow Serving at {first.address} responds again" in lines


def test_a_front_starts_with_the_backends_that_can_be_reached(backends: tuple[Backend, Backend]) -> None:
    address = f"127.0.0.1:{free_ports(1)[0]},{backends[0].address}"
    app, client = make_front(address=address)
    assert app.inference.repository.ready
    assert count(client, backends) == (20, 0)


def test_the_default_version_is_the_newest_of_those_that_most_backends_have(backends: tuple[Backend, Backend]) -> None:
    first, second = backends
    app, client = make_front(first, second)
    repository = app.inference.repository
    seen = []
    for versions in (([1], [1]), ([1, 2], [1]), ([1, 2], [1, 2]), ([2], [1, 2]), ([2], [2]), ([3], [2])):
        first.versions, second.versions = versions
        repository.poll()
        seen.append(answering_version(client))
        metadata = client.get(f"{STATUS}/metadata").get_json()
        assert metadata["model_spec"]["version"] == seen[-1]
    assert seen == ["1", "1", "2", "2", "2", "3"]


def test_requests_for_a_version_go_to_the_backends_that_have_it(backends: tuple[Backend, Backend]) -> None:
    first, second = backends
    first.versions, second.versions = [1, 2], [2, 3]
    _, client = make_front(first, second)
    for version, expected in ((1, (6, 0)), (3, (0, 6))):
        for backend in backends:
            backend.rows.clear()
        path = f"/v2/models/m/versions/{version}/infer"
        assert {answering_version(client, path) for _ in range(6)} == {str(version)}
        assert (len(first.rows), len(second.rows)) == expected
    assert answering_version(client) == "2"
    statuses = client.get(STATUS).get_json()["model_version_status"]
    assert [(status["version"], status["state"]) for status in statuses] == [
        (str(version), "AVAILABLE") for version in (3, 2, 1)
    ]
    notes = [status["status"]["error_message"] for status in statuses]
    assert notes == [
        f"1 of 2 remote servers have this version: {second.address}",
        "",
        f"1 of 2 remote servers have this version: {first.address}",
    ]


def test_a_version_that_one_backend_has_just_unloaded_is_found_at_another(backends: tuple[Backend, Backend]) -> None:
    first, second = backends
    _, client = make_front(first, second)
    wait_until(lambda: count(client, backends) == (10, 10))
    first.versions = [2]  # the next poll will see it
    path = "/v2/models/m/versions/1/infer"
    assert {answering_version(client, path) for _ in range(10)} == {"1"}
    assert len(first.rows) <= 11  # one NOT_FOUND, after which its requests go to the other


@pytest.mark.parametrize("number", [1, 2])
def test_a_default_request_gets_the_version_that_has_replaced_the_one_before(number: int) -> None:
    """Between two polls, also with a single backend; a request that names the version gets 404."""
    pair = [Backend() for _ in range(number)]
    _, client = make_front(*pair)
    assert answering_version(client) == "1"
    for backend in pair:
        backend.versions = [2]
    assert answering_version(client) == "2"
    assert client.post("/v2/models/m/versions/1/infer", json=v2_request(1)).status_code == 404
    for backend in pair:
        backend.stop()


def test_the_parts_of_a_request_are_of_one_version(backends: tuple[Backend, Backend]) -> None:
    for backend in backends:
        backend.limit = 2
    app, client = make_front(*backends)
    assert predict(client, 3).status_code == 200  # the limit is known
    for backend in backends:
        backend.rows.clear()

    def swap(_: Any) -> None:
        for backend in backends:
            backend.versions = [2]

    for backend in backends:
        backend.edit_response = swap  # after the first part
    response = predict(client, 7)
    assert (response.get_json() or {})["outputs"]["y"] == [[3.0 * i, 1.5] for i in range(7)]
    assert sum(backends[0].rows + backends[1].rows) > 7  # the first part was repeated
    assert [version.version for version in app.inference.repository.available("m")] == [2]


def test_the_limit_on_rows_of_this_service_as_a_backend_is_found_too(backends: tuple[Backend, Backend]) -> None:
    first, second = backends
    message = "the request has {rows:,} rows; at most {limit:,} are allowed, so split the request"
    for backend, limit in ((first, 1_000), (second, 1_500)):
        backend.limit, backend.limit_refusal = limit, (grpc.StatusCode.RESOURCE_EXHAUSTED, message)
    _, client = make_front(first, second)
    response = predict(client, 4_100)
    assert (response.get_json() or {})["outputs"]["y"] == [[2.0 * i, 1.0] for i in range(4_100)]


def test_an_overloaded_backend_is_passed_on_and_not_retried(backends: tuple[Backend, Backend]) -> None:
    _, client = make_front(*backends)
    for backend in backends:
        backend.refusal, backend.code = "too many requests", grpc.StatusCode.RESOURCE_EXHAUSTED
        backend.rows.clear()
    response = predict(client)
    assert (response.status_code, response.headers["Retry-After"]) == (429, "1")
    assert len(backends[0].rows + backends[1].rows) == 1


def test_retries_end_when_too_many_requests_fail(
    backends: tuple[Backend, Backend], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(remote_channels.RETRY_THROTTLING, "maxTokens", 40)
    _, client = make_front(*backends)
    for backend in backends:
        backend.refusal, backend.code = "overloaded", grpc.StatusCode.UNAVAILABLE
        backend.rows.clear()
    assert {predict(client).status_code for _ in range(50)} == {503}
    attempts = len(backends[0].rows + backends[1].rows)
    assert 50 < attempts <= 50 + 20  # after 20 failed attempts no request is retried


def test_a_backend_of_which_every_call_fails_is_left_out(
    backends: tuple[Backend, Backend], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(remote_channels.OUTLIERS, "interval", "0.2s")
    monkeypatch.setitem(remote_channels.OUTLIERS, "baseEjectionTime", "60s")
    first, _ = backends
    _, client = make_front(*backends)
    first.refusal, first.code = "out of memory", grpc.StatusCode.INTERNAL

    def is_left_out() -> bool:
        first.rows.clear()
        statuses = Counter(predict(client).status_code for _ in range(50))
        return statuses == {200: 50} and not first.rows

    assert not is_left_out()
    wait_until(is_left_out)


def test_a_single_backend_is_used_whatever_its_health() -> None:
    backend = Backend(checked=True)
    backend.set_serving(False)  # a required model is missing; others are served
    _, client = make_front(backend)
    assert count(client, (backend,)) == (20,)
    backend.stop()


@pytest.mark.parametrize(
    "text", ["", "tf", "tf:", ":8500", "tf:0", "tf:65536", "tf:8500,", "tf:8500 tf2:8500", "::1:8500", "http://tf:8500"]
)
def test_an_address_that_is_none_is_refused_at_startup(text: str) -> None:
    with pytest.raises(StartupError, match="expected HOST:PORT"):
        parse_addresses(text)
    if text:
        with pytest.raises(StartupError, match="expected HOST:PORT"):
            Settings(remote=text)


def test_a_backend_that_is_given_twice_is_refused_at_startup() -> None:
    with pytest.raises(StartupError, match="tf:8500 is given more than once"):
        Settings(remote="tf:8500,tf2:8500, tf:8500")


def test_addresses_of_both_kinds_share_a_channel() -> None:
    assert parse_addresses("tf-1.svc:8500, [::1]:8501") == (("tf-1.svc", 8500), ("::1", 8501))
    assert make_target(["10.0.0.1:8500", "10.0.0.2:8500"]) == "ipv4:10.0.0.1:8500,10.0.0.2:8500"
    assert make_target(["10.0.0.1:8500", "[::1]:8501"]) == "ipv6:[::ffff:10.0.0.1]:8500,[::1]:8501"
    first = Backend("127.0.0.1")
    try:
        second = Backend("[::1]")
    except RuntimeError:
        first.stop()
        pytest.skip("this machine has no IPv6")
    _, client = make_front(first, second)
    wait_until(lambda: count(client, (first, second)) == (10, 10))
    for backend in (first, second):
        backend.stop()


def test_a_host_with_both_kinds_of_addresses_is_one_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    def look_up(_: str, port: int, **__: Any) -> list[Any]:
        return [
            (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::1", port, 0, 0)),
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port)),
        ]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    assert AddressResolver("localhost:8500").resolve() == ("127.0.0.1:8500",)


def test_a_name_that_cannot_be_resolved_keeps_its_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_addresses, "RESOLVE_INTERVAL_S", 0.0)
    resolver = AddressResolver("127.0.0.1:8500,backend.invalid:8500")
    assert resolver.resolve() == ("127.0.0.1:8500",)
    assert "backend.invalid cannot be resolved" in resolver.problem

    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(5, "no name server")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    assert resolver.resolve() == ("127.0.0.1:8500",)
    app = make_remote_app("backend.invalid:8500")
    app.inference.repository.load()
    assert "backend.invalid cannot be resolved" in (app.inference.repository.not_ready_because or "")
