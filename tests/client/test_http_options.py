"""`headers`, `auth`, `verify` and `transport` of `Client` and `AsyncClient`, which are those of httpx."""

from __future__ import annotations

import asyncio
import ssl
import threading
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from client import AsyncClient, Client, ConnectionFailed, RequestRejected
from tests.client.conftest import png_of
from tests.client.service import Handler, Server, Service, respond

CERTIFICATE = Path(__file__).with_name("localhost.pem")
RED = png_of("red")

Predict = Callable[..., list[str]]


def predict(url: str, **options: Any) -> list[str]:
    with Client(url, **options) as client:
        return [prediction.label for prediction in client.predict(RED)]


def predict_async(url: str, **options: Any) -> list[str]:
    async def run() -> list[str]:
        async with AsyncClient(url, **options) as client:
            return [prediction.label for prediction in await client.predict(RED)]

    return asyncio.run(run())


both_clients = pytest.mark.parametrize("predict", [predict, predict_async])


@pytest.fixture
def tls_service() -> Iterator[Service]:
    """A service with a self-signed certificate."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(CERTIFICATE)
    with Server(("127.0.0.1", 0), Handler) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        server.service = Service(port=server.server_port)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server.service
        server.shutdown()
        thread.join()


@both_clients
def test_headers_are_sent(service: Service, predict: Predict) -> None:
    assert predict(service.url, headers={"Authorization": "Bearer secret"}) == ["red"]
    assert service.received[0].headers["Authorization"] == "Bearer secret"
    assert service.received[0].headers["Content-Type"].startswith("multipart/form-data; boundary=")


@both_clients
def test_auth_of_user_name_and_password(service: Service, predict: Predict) -> None:
    assert predict(service.url, auth=("ann", "secret")) == ["red"]
    assert service.received[0].headers["Authorization"] == "Basic YW5uOnNlY3JldA=="


class RenewToken(httpx.Auth):
    """Authentication that sends the request again with a new token after a 401."""

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        request.headers["Authorization"] = "old"
        response = yield request
        if response.status_code == 401:
            request.headers["Authorization"] = "new"
            yield request


@both_clients
def test_auth_may_send_the_request_again(service: Service, predict: Predict) -> None:
    service.script.append(respond(401, {"error": "the token has expired"}))
    assert predict(service.url, auth=RenewToken()) == ["red"]
    assert [request.headers["Authorization"] for request in service.received] == ["old", "new"]
    assert service.received[0].files == service.received[1].files


@both_clients
@pytest.mark.parametrize(
    ("response", "reason"),
    [
        (respond(401, {"error": "token required"}), "token required"),
        (respond(403, b"<h1>Forbidden</h1>", "text/html"), "403 Forbidden, text/html, '<h1>Forbidden</h1>'"),
    ],
)
def test_denied_access_names_auth_and_headers(
    service: Service, predict: Predict, response: Callable[[Handler], None], reason: str
) -> None:
    service.script.append(response)
    with pytest.raises(RequestRejected) as caught:
        predict(service.url)
    assert str(caught.value) == (
        f"the service at {service.url} denied access ({reason}); pass valid credentials with auth or headers (--token)"
    )
    assert len(service.received) == 1


@both_clients
def test_verify(tls_service: Service, predict: Predict) -> None:
    url = f"https://127.0.0.1:{tls_service.port}"
    with pytest.raises(ConnectionFailed, match=r"CERTIFICATE_VERIFY_FAILED.*; pass verify=ssl\.create_default_context"):
        predict(url, retries=0)
    assert predict(url, verify=ssl.create_default_context(cafile=CERTIFICATE)) == ["red"]
    assert predict(url, verify=False) == ["red"]
    assert len(tls_service.received) == 2


class LocalTransport(httpx.BaseTransport, httpx.AsyncBaseTransport):
    """Responds without a network."""

    def __init__(self) -> None:
        self.urls: list[str] = []
        self.is_closed = False

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        self.urls.append(str(request.url))
        assert RED in request.read()
        row = {"label": "red", "class_id": 0, "confidence": 1.0, "probabilities": {"red": 1.0}}
        return httpx.Response(200, json={"model": {"name": "local", "version": 1}, "predictions": [row]})

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        await request.aread()
        return self.handle_request(request)

    def close(self) -> None:
        self.is_closed = True

    async def aclose(self) -> None:
        self.is_closed = True


@both_clients
@pytest.mark.parametrize("host", ["127.0.0.1", "classifier.invalid"])
def test_transport_sends_the_requests_and_is_closed_as_by_httpx(predict: Predict, host: str) -> None:
    transport = LocalTransport()
    assert predict(f"http://{host}/vision", model="m", transport=transport) == ["red"]
    assert transport.urls == [f"http://{host}/vision/predict?model=m"]
    assert transport.is_closed
