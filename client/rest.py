"""The REST client: pictures to the service's `POST /predict`, in batches."""

from __future__ import annotations

import ipaddress
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any

import httpx

from client.errors import (
    ConnectionFailed,
    ImageRejected,
    ModelNotFound,
    RequestRefused,
    RequestTimedOut,
    ServiceNotReady,
    UnexpectedReply,
)
from client.images import EncodedImage, Picture, encode_image
from client.predictions import Prediction

DEFAULT_URL = "http://127.0.0.1:8501"
# Big photos make a batch early, so that no request grows beyond what a service takes.
_MAX_BATCH_BYTES = 8 << 20
_FIRST_BACKOFF_S = 0.25
_MAX_BACKOFF_S = 8.0


class Client:
    """A connection to a service, kept open between requests. Also a context manager.

    Args:
        url: the service's address.
        model: the model to ask; may be left out where the service has one.
        version: the version of it; the newest if left out.
        batch_size: pictures a request, at most.
        timeout_s: how long to wait for a reply.
        connect_timeout_s: how long to wait for a connection.
        retries: how often a request is sent again after a connection that failed or a 503; nothing else is
            tried again. Waits twice as long before each, or as long as the service asks for.
        transport: what carries the requests, for tests.
        sleep: what waits between retries, for tests.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        model: str | None = None,
        version: int | None = None,
        batch_size: int = 32,
        timeout_s: float = 30.0,
        connect_timeout_s: float = 5.0,
        retries: int = 4,
        transport: httpx.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if batch_size < 1 or retries < 0 or timeout_s <= 0 or connect_timeout_s <= 0:
            raise ValueError("batch_size and the timeouts must be positive, and retries not negative")
        self.url = url.rstrip("/")
        self._query = {
            name: str(value) for name, value in (("model", model), ("version", version)) if value is not None
        }
        self._batch_size = batch_size
        self._timeout_s = timeout_s
        self._retries = retries
        self._sleep = sleep
        try:
            self._http = httpx.Client(
                base_url=self.url,
                timeout=httpx.Timeout(timeout_s, connect=connect_timeout_s),
                # A proxy from the environment cannot reach this machine's own addresses.
                trust_env=not _is_loopback(httpx.URL(self.url).host),
                transport=transport,
            )
        except (httpx.InvalidURL, TypeError) as error:
            raise ValueError(f"{url!r} is no address: expected something like {DEFAULT_URL}") from error

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._http.close()

    def predict(self, pictures: Picture | Iterable[Picture]) -> list[Prediction]:
        """Classify pictures and return a prediction for each, in their order.

        Args:
            pictures: one, or several: paths, contents of image files, uint8 pixels (height, width, 3), Pillow images.

        Raises:
            ImageRejected: a picture cannot be used; it is named.
            ClientError: the service could not be asked; see the subclasses.
        """
        single = isinstance(pictures, (str, bytes)) or not isinstance(pictures, Iterable) or hasattr(pictures, "shape")
        predictions = []
        for outcome in self.predict_iter([pictures] if single else pictures):  # type: ignore[list-item]
            if isinstance(outcome, ImageRejected):
                raise outcome
            predictions.append(outcome)
        return predictions

    def predict_iter(self, pictures: Iterable[Picture]) -> Iterator[Prediction | ImageRejected]:
        """Classify any number of pictures, a batch in memory at a time; yield an outcome for each, in their order.

        A picture that cannot be used costs only itself: its outcome is an `ImageRejected`.

        Raises:
            ClientError: the service could not be asked; see the subclasses.
        """
        outcomes: list[EncodedImage | ImageRejected] = []
        images = size = 0
        for picture in pictures:
            try:
                image = encode_image(picture)
            except ImageRejected as error:
                outcomes.append(error)
                continue
            if images and (images == self._batch_size or size + len(image.data) > _MAX_BATCH_BYTES):
                yield from self._ask(outcomes)
                outcomes, images, size = [], 0, 0
            outcomes.append(image)
            images += 1
            size += len(image.data)
        yield from self._ask(outcomes)

    def status(self) -> dict[str, Any]:
        """Return what the service says of itself at `/readyz`.

        Raises:
            ServiceNotReady: it answers, and is not ready.
            ClientError: it could not be asked.
        """
        status: dict[str, Any] = self._json(self._send("GET", "/readyz"))
        return status

    def _ask(self, batch: Sequence[EncodedImage | ImageRejected]) -> Iterator[Prediction | ImageRejected]:
        images = [item for item in batch if isinstance(item, EncodedImage)]
        answers = iter(self._predict_batch(images) if images else [])
        for item in batch:
            yield next(answers) if isinstance(item, EncodedImage) else item

    def _predict_batch(self, images: Sequence[EncodedImage]) -> list[Prediction | ImageRejected]:
        """Send one request, and more of them only where the service rejects some of the images."""
        # The position is the name that is sent: it is always plain ASCII, and answers are matched by their order anyway.
        files = [("image", (f"{index}", image.data)) for index, image in enumerate(images)]
        response = self._send("POST", "/predict", params=self._query, files=files)
        if response.status_code == 200:
            return self._read_predictions(response, images)
        reply = self._json(response)
        message = str(reply.get("error", reply))
        if rejected := {int(item["index"]): str(item["error"]) for item in reply.get("errors", [])}:
            rest = iter(self._rest_of(images, rejected))
            return [
                ImageRejected(image.file, rejected[index]) if index in rejected else next(rest)
                for index, image in enumerate(images)
            ]
        if response.status_code == 413:
            if len(images) == 1:
                return [ImageRejected(images[0].file, message)]
            # Too much at once is not too much one by one.
            return [answer for image in images for answer in self._predict_batch([image])]
        if response.status_code == 404:
            raise ModelNotFound(message)
        raise RequestRefused(f"{self.url} answers {response.status_code}: {message}", status=response.status_code)

    def _rest_of(self, images: Sequence[EncodedImage], rejected: dict[int, str]) -> list[Prediction | ImageRejected]:
        if not rejected.keys() <= set(range(len(images))):
            raise UnexpectedReply(f"{self.url} rejects pictures it was not sent: {sorted(rejected)}")
        rest = [image for index, image in enumerate(images) if index not in rejected]
        return self._predict_batch(rest) if rest else []

    def _read_predictions(
        self, response: httpx.Response, images: Sequence[EncodedImage]
    ) -> list[Prediction | ImageRejected]:
        reply = self._json(response)
        try:
            model, version = str(reply["model"]["name"]), int(reply["model"]["version"])
            predictions: list[Prediction | ImageRejected] = [
                Prediction(
                    file=image.file,
                    label=str(item["label"]),
                    class_id=int(item["class_id"]),
                    confidence=float(item["confidence"]),
                    probabilities={str(label): float(value) for label, value in item["probabilities"].items()},
                    model=model,
                    version=version,
                )
                for image, item in zip(images, reply["predictions"], strict=True)
            ]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UnexpectedReply(
                f"{self.url} answers with predictions of another form than expected ({error!r}): "
                "is this service of the same version as the client?"
            ) from error
        return predictions

    def _send(self, method: str, path: str, **request: Any) -> httpx.Response:
        """Send a request, again where that can help; return any reply but a 503."""
        for attempt in range(self._retries + 1):
            last = attempt == self._retries
            wait_s = min(_FIRST_BACKOFF_S * 2**attempt, _MAX_BACKOFF_S) * random.uniform(0.5, 1)
            try:
                response = self._http.request(method, path, **request)
            except (httpx.ConnectError, httpx.ConnectTimeout, httpx.ReadError, httpx.WriteError,
                    httpx.RemoteProtocolError) as error:  # fmt: skip
                # Asking again is safe even if the request was answered and the answer lost: a prediction changes nothing.
                if last:
                    raise ConnectionFailed(
                        f"no answer from {self.url} ({error or type(error).__name__}): is the service running there? "
                        "`make serve` starts it"
                    ) from error
            except httpx.TimeoutException as error:
                raise RequestTimedOut(f"{self.url} did not answer within {self._timeout_s:g} s") from error
            except httpx.HTTPError as error:
                raise ConnectionFailed(f"{self.url} cannot be asked: {error}") from error
            else:
                if response.status_code != 503:
                    return response
                if last:
                    raise ServiceNotReady(f"{self.url} is not ready: {self._reason(response)}")
                wait_s = _retry_after_s(response) or wait_s
            self._sleep(wait_s)
        raise AssertionError("unreachable")

    def _json(self, response: httpx.Response) -> dict[str, Any]:
        try:
            reply = response.json()
        except ValueError:
            reply = None
        if not isinstance(reply, dict):
            raise UnexpectedReply(
                f"{self.url} answers {response.status_code} with something that is not this service's JSON "
                f"({response.headers.get('content-type', 'no content type')}): is the address right?"
            )
        return reply

    def _reason(self, response: httpx.Response) -> str:
        try:
            reply = self._json(response)
        except UnexpectedReply:
            return "it answers 503"
        return str(reply.get("error") or reply.get("reason") or reply)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _retry_after_s(response: httpx.Response) -> float | None:
    value = response.headers.get("retry-after", "")
    return min(float(value), _MAX_BACKOFF_S) if value.isascii() and value.isdecimal() else None
