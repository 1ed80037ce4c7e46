"""HTTP transport: runs the flows of `RestApi` over `httpx.Client` or `httpx.AsyncClient`."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any, TypeVar

import httpx

from client.batches import Batch
from client.errors import ConnectionFailed, RequestTimedOut, UnexpectedResponse
from client.options import is_local_host
from client.predictions import Failure, Prediction, ServiceStatus
from client.responses import Response
from client.rest import Flow, Request, RestApi, Result

CONNECT_TIMEOUT_S = 5.0
MAX_RESPONSE_BYTES = 64 * 1024 * 1024

Headers = Mapping[str, str]
Auth = httpx.Auth | tuple[str, str] | Callable[[httpx.Request], httpx.Request]
Verify = ssl.SSLContext | bool
HttpxClient = TypeVar("HttpxClient", httpx.Client, httpx.AsyncClient)


def make_httpx_client(
    kind: type[HttpxClient],
    api: RestApi,
    *,
    headers: Headers | None = None,
    auth: Auth | None = None,
    verify: Verify = True,
    transport: httpx.BaseTransport | httpx.AsyncBaseTransport | None = None,
) -> HttpxClient:
    """Return an httpx client for the requests of `api`; raise ValueError if the environment's proxies are invalid."""
    if transport is None and is_local_host(api.base_url.host):
        # With a transport, httpx ignores the proxies set in the environment.
        transport = (httpx.HTTPTransport if kind is httpx.Client else httpx.AsyncHTTPTransport)(verify=verify)
    options: dict[str, Any] = {"headers": headers, "auth": auth, "verify": verify, "transport": transport}
    try:
        return kind(base_url=api.base_url, **options)
    except (ImportError, ValueError) as error:
        raise ValueError(f"the proxy settings in the environment are invalid for {api.url}: {error}") from error


class HttpTransport:
    """Sends requests with an `httpx.Client`, which it closes."""

    def __init__(self, api: RestApi, http: httpx.Client, *, sleep: Callable[[float], None] = time.sleep) -> None:
        self._api, self._http, self._sleep = api, http, sleep
        self.close = http.close

    def predict_batch(self, batch: Batch) -> list[Prediction | Failure]:
        """Return an outcome for each item of a batch; failures are returned as they are."""
        return self._run(self._api.predict(batch))

    def status(self) -> ServiceStatus:
        """Return the status of the service."""
        return self._run(self._api.get_status())

    def _run(self, flow: Flow[Result]) -> Result:
        step = next(flow)
        while isinstance(step, Request):
            if step.delay_s:
                self._sleep(step.delay_s)
            body = _Body(self._api, step)
            outcome: Response | ConnectionFailed
            try:
                with _explain_errors(self._api), self._http.stream(**_stream_arguments(step)) as response:
                    for chunk in response.iter_bytes():
                        body.append(chunk)
                outcome = body.finish(response)
            except ConnectionFailed as error:
                outcome = error
            step = flow.send(outcome)
        return step


async def run_async(
    flow: Flow[Result],
    api: RestApi,
    http: httpx.AsyncClient,
    *,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> Result:
    """Run a flow of `api` like `HttpTransport`, without blocking the event loop."""
    # In a thread: encoding the images of the first request would block the event loop.
    step = await asyncio.to_thread(next, flow)
    while isinstance(step, Request):
        if step.delay_s:
            await sleep(step.delay_s)
        body = _Body(api, step)
        outcome: Response | ConnectionFailed
        try:
            with _explain_errors(api):
                async with http.stream(**_stream_arguments(step)) as response:
                    async for chunk in response.aiter_bytes():
                        body.append(chunk)
            outcome = body.finish(response)
        except ConnectionFailed as error:
            outcome = error
        step = flow.send(outcome)
    return step


class _Body:
    """Collects a response body, within the limits on its size and time."""

    def __init__(self, api: RestApi, request: Request) -> None:
        self._api = api
        self._deadline_s = request.deadline_s
        self._content = bytearray()

    def append(self, chunk: bytes) -> None:
        self._content += chunk
        if len(self._content) > MAX_RESPONSE_BYTES:
            raise UnexpectedResponse(f"the response of {self._api.url} exceeds {MAX_RESPONSE_BYTES:,} bytes")
        if time.monotonic() > self._deadline_s:
            raise _make_timeout_error(self._api)

    def finish(self, response: httpx.Response) -> Response:
        # Breaks the reference cycle of httpx's responses, which would keep the request's images in memory until the
        # next garbage collection: hundreds of megabytes for batches of photos.
        response.stream = httpx.ByteStream(b"")
        return Response(
            url=self._api.url,
            status=response.status_code,
            reason_phrase=response.reason_phrase,
            content_type=response.headers.get("content-type", ""),
            retry_after=response.headers.get("retry-after"),
            body=bytes(self._content),
        )


def _stream_arguments(request: Request) -> dict[str, Any]:
    remaining_s = max(request.deadline_s - time.monotonic(), 0.001)
    return {
        "method": request.method,
        "url": request.path,
        "params": request.params,
        "headers": request.headers,
        "content": request.content,
        "timeout": httpx.Timeout(remaining_s, connect=min(CONNECT_TIMEOUT_S, remaining_s)),
    }


@contextlib.contextmanager
def _explain_errors(api: RestApi) -> Iterator[None]:
    """Raise httpx's errors as those of this package."""
    try:
        yield
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        raise ConnectionFailed(
            f"cannot connect to {api.url} ({str(error) or 'timeout'}); {_explain_no_connection(error)}"
        ) from error
    except httpx.TimeoutException as error:
        raise _make_timeout_error(api) from error
    except httpx.TransportError as error:
        raise ConnectionFailed(
            f"the connection to {api.url} was closed ({str(error) or type(error).__name__}); "
            "check the log of the service"
        ) from error
    except httpx.DecodingError as error:
        raise UnexpectedResponse(f"the response of {api.url} cannot be decoded: {error}") from error


def _explain_no_connection(error: httpx.TransportError) -> str:
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        return "pass verify=ssl.create_default_context(cafile=...) (--ca) with the certificate authority of the service"
    return "start the service with `make serve`, or pass another address with url (--url)"


def _make_timeout_error(api: RestApi) -> RequestTimedOut:
    return RequestTimedOut(
        f"no complete response from {api.url} within {api.timeout_s:g} s; allow more time with timeout_s (--timeout), "
        "or send fewer images per request with batch_size (--batch-size)"
    )
