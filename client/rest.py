"""The service's HTTP API without I/O: which requests to send, when to retry, and how to read the responses.

The functions are generators, like httpx's `auth_flow`: they yield requests and receive the responses. `client/http.py`
runs them, blocking for `Client` and in an event loop for `AsyncClient`.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import httpx

from client.backoff import choose_retry_wait_s
from client.errors import ConnectionFailed
from client.images import LoadedImage
from client.multipart import encode_form, form_name
from client.options import validate_model, validate_retry_options
from client.predictions import Failure, Prediction, ServiceStatus
from client.responses import Response, make_error, read_predictions, read_rejections, read_status


@dataclass(frozen=True)
class Request:
    """A request to send after `delay_s`, whose response has to be complete by `deadline_s` of `time.monotonic`."""

    method: str
    path: str
    deadline_s: float
    params: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    content: bytes = b""
    delay_s: float = 0.0


Result = TypeVar("Result")
Flow = Generator[Request, Response, Result]


class RestApi:
    """The requests of one client. A flow is thrown `ConnectionFailed` in place of a response.

    Args:
        url: the address of the service; `self.url` is that without a password, for messages.
        model: the model's name, or None if the service has only one.
        version: the model's version, or None for the newest.
        timeout_s: the time for one batch, including retries.
        retries: the maximum number of retries of one batch.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self, url: str, *, model: str | None = None, version: int | None = None, timeout_s: float, retries: int
    ) -> None:
        validate_retry_options(timeout_s, retries)
        validate_model(model, version)
        self.base_url = _parse_url(url)
        self.url = str(self.base_url.copy_with(username=None, password=None)).rstrip("/")
        self.timeout_s = timeout_s
        self._retries = retries
        self._params = {
            name: str(value) for name, value in (("model", model), ("version", version)) if value is not None
        }

    def predict(self, images: Sequence[LoadedImage]) -> Flow[list[Prediction | Failure]]:
        """Classify images; return a prediction or a failure for each, in their order.

        The service rejects a request with an unreadable image as a whole, but names the unreadable ones: the others are
        sent again without them. A request that is too large is sent again in halves.
        """
        outcomes: dict[int, Prediction | Failure] = {}
        groups = [list(images)]
        while groups:
            group = groups.pop()
            response = yield from self._post_images(group)
            if response.status == 200:
                outcomes.update(read_predictions(response, group))
            elif rejections := read_rejections(response, group):
                outcomes |= {rejection.index: rejection for rejection in rejections}
                if remaining := [image for image in group if image.index not in outcomes]:
                    groups.append(remaining)
            elif response.status == 413 and len(group) > 1:
                middle = len(group) // 2
                groups += [group[middle:], group[:middle]]
            elif response.status == 413:
                (image,) = group
                outcomes[image.index] = Failure(image.index, image.file, _explain_too_large(response, image))
            else:
                raise make_error(response)
        return [outcomes[image.index] for image in images]

    def get_status(self) -> Flow[ServiceStatus]:
        """Return the status of the service, without retries."""
        response = yield Request("GET", "/readyz", time.monotonic() + self.timeout_s)
        if response.status in (200, 503):
            return read_status(response)
        raise make_error(response)

    def _post_images(self, images: Sequence[LoadedImage]) -> Flow[Response]:
        """Post images; retry while the connection fails or the service responds with 503."""
        content, content_type = encode_form(images)
        request = Request(
            "POST",
            "/predict",
            time.monotonic() + self.timeout_s,
            params=self._params,
            headers={"Content-Type": content_type},
            content=content,
        )
        attempt = 0
        while True:
            attempt += 1
            retry_after = None
            try:
                response = yield request
                if response.status != 503:
                    return response
                error, retry_after = make_error(response), response.retry_after
            except ConnectionFailed as failure:
                error = failure
            wait_s = choose_retry_wait_s(
                error,
                attempt=attempt,
                retries=self._retries,
                deadline_s=request.deadline_s,
                retry_after=retry_after,
            )
            request = replace(request, delay_s=wait_s)


def _parse_url(text: str) -> httpx.URL:
    try:
        url = httpx.URL(text)
    except (httpx.InvalidURL, TypeError) as error:
        raise ValueError(f"expected an address such as http://127.0.0.1:8501, got {text!r}: {error}") from error
    if url.scheme not in ("http", "https") or not url.host or url.query or url.fragment:
        raise ValueError(f"expected an address such as http://127.0.0.1:8501, got {text!r}")
    return url


def _explain_too_large(response: Response, image: LoadedImage) -> str:
    if response.error is None:
        return f"too large for the server at {response.url}: {response.summary}"
    return response.error.removeprefix(f"{form_name(image)}: ")
