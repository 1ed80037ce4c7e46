"""`AsyncClient`: the results and errors of `Client`, without blocking the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

import client.images
from client import AsyncClient, Client, ClientError, Failure, ImageRejected, ImageSource, Prediction, ServerBusy
from client.http import make_httpx_client, run_async
from client.images import LoadedImage
from client.rest import RestApi
from tests.client.conftest import pixels_of, png_of
from tests.client.service import COLOURS, Handler, Service, busy, drip, hang_up, hang_up_midway, respond, stall


def predict(url: str, images: Any, **options: Any) -> list[Prediction | Failure]:
    async def run() -> list[Prediction | Failure]:
        async with AsyncClient(url, **options) as client:
            return [outcome async for outcome in client.predict_iter(images)]

    return asyncio.run(run())


def predict_normally(handler: Handler) -> None:
    handler.predict(handler.received.files)


def test_results_are_those_of_client(service: Service, images: list[Path], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not an image")
    forms: list[ImageSource] = [
        *images,
        tmp_path / "notes.txt",
        tmp_path / "missing.png",
        png_of("green"),
        pixels_of("blue"),
    ]
    forms.append(Image.fromarray(pixels_of("red")))
    with Client(service.url, batch_size=3) as client:
        expected = list(client.predict_iter(forms))
    requests = sorted(service.batches)
    service.received.clear()
    assert predict(service.url, forms, batch_size=3) == expected
    assert [outcome.index for outcome in expected if isinstance(outcome, Failure)] == [7, 8]
    assert sorted(service.batches) == requests


@pytest.mark.parametrize(
    "failure",
    [
        busy(),
        hang_up,
        hang_up_midway,
        respond(400, {"error": "several models", "models": ["a", "b"]}),
        respond(404, {"error": "no model cats"}),
        respond(500, {"error": "see the log"}),
        respond(200, b"<p>Welcome</p>", "text/html"),
        respond(200, b"\x1f\x8b broken", "application/json", Content_Encoding="gzip"),
        stall,
        drip,
    ],
)
def test_errors_are_those_of_client(service: Service, failure: Callable[[Handler], None]) -> None:
    options: dict[str, Any] = {"retries": 0, "timeout_s": 0.3 if failure in (stall, drip) else 30}
    service.script.extend([failure] * 2)
    with Client(service.url, **options) as client, pytest.raises(ClientError) as expected:
        client.predict(png_of("red"))
    with pytest.raises(type(expected.value)) as caught:
        predict(service.url, png_of("red"), **options)
    assert str(caught.value) == str(expected.value)
    assert len(service.received) == 2


def test_failures_are_retried_after_waits(service: Service) -> None:
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    async def run() -> list[Prediction | Failure]:
        api = RestApi(service.url, timeout_s=30, retries=3)
        async with make_httpx_client(httpx.AsyncClient, api) as http:
            return await run_async(api.predict([LoadedImage(0, None, png_of("red"))]), api, http, sleep=sleep)

    service.script.extend([busy(), hang_up, busy("2")])
    (outcome,) = asyncio.run(run())
    assert isinstance(outcome, Prediction)
    assert len(service.received) == 4
    assert 0.125 <= waits[0] <= 0.25 <= waits[1] <= 0.5
    assert waits[2] == 2.0
    service.script.extend([busy()] * 4)
    with pytest.raises(ServerBusy, match="tried 4 times"):
        asyncio.run(run())


def test_predict_raises_for_an_unreadable_image(service: Service) -> None:
    async def run() -> None:
        async with AsyncClient(service.url) as client:
            await client.predict([png_of("red"), b"bad"])

    with pytest.raises(ImageRejected, match="image 1 of those given"):
        asyncio.run(run())


def test_batches_are_sent_concurrently_and_yielded_in_order(service: Service) -> None:
    barrier = threading.Barrier(4)

    def wait_for_the_others(handler: Handler) -> None:
        barrier.wait(30)
        handler.predict(handler.received.files)

    service.script.extend([predict_normally, *[wait_for_the_others] * 4])
    outcomes = predict(service.url, [png_of(COLOURS[index % 3]) for index in range(5)], batch_size=1)
    assert [outcome.label for outcome in outcomes if isinstance(outcome, Prediction)] == [*COLOURS, "red", "green"]


def test_predict_iter_yields_before_all_images_are_read(service: Service) -> None:
    given: list[str] = []

    def read_endlessly() -> Iterator[bytes]:
        while True:
            given.append(COLOURS[len(given) % 3])
            yield png_of(given[-1])

    async def run() -> list[Prediction | Failure]:
        client = AsyncClient(service.url, batch_size=4)
        async with client, contextlib.aclosing(client.predict_iter(read_endlessly())) as outcomes:
            return [await anext(outcomes) for _ in range(10)]

    labels = [outcome.label for outcome in asyncio.run(run()) if isinstance(outcome, Prediction)]
    assert labels == given[:10]
    assert len(given) <= 25  # three more batches, and the image that ended the last one


def test_images_are_read_and_encoded_in_other_threads(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = client.images._encode_png
    threads: list[threading.Thread] = []

    def encode_and_record(image: Image.Image) -> bytes:
        threads.append(threading.current_thread())
        return encode(image)

    monkeypatch.setattr(client.images, "_encode_png", encode_and_record)

    def read() -> Iterator[Any]:
        threads.append(threading.current_thread())
        yield pixels_of("red")
        yield Image.fromarray(pixels_of("green"))

    outcomes = predict(service.url, read())
    assert [outcome.label for outcome in outcomes if isinstance(outcome, Prediction)] == ["red", "green"]
    assert len(threads) == 3
    assert threading.main_thread() not in threads


def test_closing_the_generator_cancels_the_requests(service: Service) -> None:
    service.script.extend([predict_normally, stall, stall])

    async def run() -> int:
        async with AsyncClient(service.url, batch_size=1) as client:
            async with contextlib.aclosing(client.predict_iter([png_of("red")] * 3)) as outcomes:
                await anext(outcomes)
                waiting = asyncio.create_task(anext(outcomes))
                for _ in range(3):
                    assert await asyncio.to_thread(service.arrived.acquire, timeout=30)
                waiting.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await waiting
            return len(asyncio.all_tasks())

    assert asyncio.run(run()) == 1


def test_nothing_is_sent_after_close(service: Service) -> None:
    async def run() -> None:
        client = AsyncClient(service.url)
        assert (await client.status()).ready
        await client.aclose()
        with pytest.raises(RuntimeError, match="closed"):
            await client.status()

    asyncio.run(run())
    assert len(service.received) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"timeout_s": 0}, "timeout_s must be more than 0 seconds, not 0"),
        ({"retries": -1}, "retries must be at least 0, not -1"),
        ({"model": ""}, "model must not be empty"),
    ],
)
def test_arguments_out_of_range_raise_a_value_error(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AsyncClient("http://127.0.0.1:8501", **options)
