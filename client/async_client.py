"""`AsyncClient`: `Client` for asyncio."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Iterable
from typing import Self

import httpx

from client.batches import Batch, map_in_order_async, read_batches, require_success, validate_batch_size
from client.client import REQUESTS_IN_FLIGHT
from client.http import Auth, Headers, Verify, make_httpx_client, run_async
from client.images import ImageSource
from client.options import DEFAULT_BATCH_SIZE, DEFAULT_RETRIES, DEFAULT_TIMEOUT_S
from client.predictions import Failure, Prediction, ServiceStatus
from client.rest import RestApi


class AsyncClient:
    """A client of the service's HTTP API for asyncio, over `httpx.AsyncClient`.

    The arguments and errors are those of `Client`, and the methods are coroutines. Images are read and encoded in
    worker threads, without blocking the event loop. `aclose()` or the end of an `async with` block closes the
    connections.

    Args:
        url: see `Client`, like the other arguments.
        transport: an `httpx.AsyncBaseTransport` that sends the requests. As in httpx, `aclose()` closes it.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> import asyncio
        >>> from client import AsyncClient
        >>> async def classify(file):
        ...     async with AsyncClient("http://127.0.0.1:8501") as client:
        ...         (prediction,) = await client.predict(file)
        ...         return prediction.label
        >>> asyncio.run(classify("red.png"))
        'red'
    """

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        version: int | None = None,
        headers: Headers | None = None,
        auth: Auth | None = None,
        verify: Verify = True,
        transport: httpx.AsyncBaseTransport | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        retries: int = DEFAULT_RETRIES,
        batch_size: int = DEFAULT_BATCH_SIZE,
    ) -> None:
        self._batch_size = validate_batch_size(batch_size)
        self._api = RestApi(url, model=model, version=version, timeout_s=timeout_s, retries=retries)
        self._http = make_httpx_client(
            httpx.AsyncClient, self._api, headers=headers, auth=auth, verify=verify, transport=transport
        )

    async def predict(self, images: ImageSource | Iterable[ImageSource]) -> list[Prediction]:
        """Classify one or more images; see `Client.predict`."""
        async with contextlib.aclosing(self.predict_iter(images)) as outcomes:
            return [require_success(outcome) async for outcome in outcomes]

    def predict_iter(self, images: ImageSource | Iterable[ImageSource]) -> AsyncGenerator[Prediction | Failure, None]:
        """Classify images one batch after the other, for `async for`; see `Client.predict_iter`.

        Example:
            >>> import asyncio
            >>> from client import AsyncClient, find_images
            >>> async def count(folder):
            ...     async with AsyncClient("http://127.0.0.1:8501") as client:
            ...         return sum([1 async for _ in client.predict_iter(find_images(folder))])
            >>> asyncio.run(count("photos"))
            2
        """
        batches = read_batches(images, self._batch_size)
        return map_in_order_async(self._predict_batch, batches, in_flight=REQUESTS_IN_FLIGHT)

    async def _predict_batch(self, batch: Batch) -> list[Prediction | Failure]:
        return await run_async(self._api.predict(batch), self._api, self._http)

    async def status(self) -> ServiceStatus:
        """Return whether the service is ready, and its models; see `Client.status`."""
        return await run_async(self._api.get_status(), self._api, self._http)

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()
