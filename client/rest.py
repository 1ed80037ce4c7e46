"""The service's HTTP API without I/O: which requests to send, when to retry, and how to read the responses.

The functions are generators, like httpx's `auth_flow`: they yield requests, receive the responses, and yield the result
last. `client/http.py` runs them, blocking for `Client` and in an event loop for `AsyncClient`.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import httpx

from client.batches import Batch, halve, separate
from client.errors import ClientError, ConnectionFailed
from client.images import LoadedImage
from client.options import choose_retry_wait_s, validate_options
from client.predictions import Failure, Prediction, ServiceStatus
from client.responses import Response, make_error, read_predictions, read_rejections, read_status

_ESCAPED = {ord('"'): "%22", **{code: f"%{code:02X}" for code in range(32)}}


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
Flow = Generator[Request | Result, Response | ConnectionFailed, None]


class RestApi:
    """The requests of one client. For the arguments, see `Client`; `self.url` has no password, for messages."""

    def __init__(
        self, url: str, *, model: str | None = None, version: int | None = None, timeout_s: float, retries: int
    ) -> None:
        validate_options(model=model, version=version, timeout_s=timeout_s, retries=retries)
        self.base_url = _parse_url(url)
        self.url = str(self.base_url.copy_with(username=None, password=None)).rstrip("/")
        self.timeout_s = timeout_s
        self._retries = retries
        named = {"model": model, "version": version}
        self._params = {name: str(value) for name, value in named.items() if value is not None}

    def predict(self, batch: Batch) -> Flow[list[Prediction | Failure]]:
        """Classify images; yield a prediction or a failure for each, in their order. Failures are passed on.

        The service rejects a request with an unreadable image as a whole, but names the unreadable ones: the others are
        sent again without them. A request that is too large is sent again in halves.
        """
        images, outcomes = separate(batch)
        groups = [images]
        while groups:
            if not (group := groups.pop()):
                continue
            response = yield from self._post_images(group)
            if response.status == 200:
                outcomes.update(read_predictions(response, group))
            elif rejections := read_rejections(response, group):
                outcomes |= {rejection.index: rejection for rejection in rejections}
                groups.append([image for image in group if image.index not in outcomes])
            elif response.status == 413 and len(group) > 1:
                groups += halve(group)
            elif response.status == 413:
                (image,) = group
                outcomes[image.index] = Failure(image.index, image.file, _explain_too_large(response, image))
            else:
                raise make_error(response)
        yield [outcomes[item.index] for item in batch]

    def get_status(self) -> Flow[ServiceStatus]:
        """Yield the status of the service, without retries."""
        response = yield Request("GET", "/readyz", time.monotonic() + self.timeout_s)
        if isinstance(response, ConnectionFailed):
            raise response
        if response.status not in (200, 503):
            raise make_error(response)
        yield read_status(response)

    def _post_images(self, images: Sequence[LoadedImage]) -> Generator[Request, Response | ConnectionFailed, Response]:
        """Post images; retry while the connection fails or the service responds with 503 or 429."""
        content, content_type = encode_form(images)
        headers, deadline_s = {"Content-Type": content_type}, time.monotonic() + self.timeout_s
        request = Request("POST", "/predict", deadline_s, params=self._params, headers=headers, content=content)
        attempt = 0
        while True:
            attempt += 1
            response = yield request
            error: ClientError
            if isinstance(response, ConnectionFailed):
                error, retry_after = response, None
            elif response.status in (429, 503):
                error, retry_after = make_error(response), response.retry_after
            else:
                return response
            wait_s = choose_retry_wait_s(error, attempt, self._retries, request.deadline_s, retry_after=retry_after)
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


def encode_form(images: Sequence[LoadedImage]) -> tuple[bytes, str]:
    """Return the body and the Content-Type of a multipart form (RFC 7578) with a file `image` for each image.

    httpx could do it, but takes ten times as long, which for small images is most of the client's time.
    """
    boundary = secrets.token_hex(16).encode()
    parts: list[bytes] = []
    for image in images:
        # Percent-encode quotes and control characters in the name, as browsers do (HTML, "multipart form data").
        name = form_name(image).translate(_ESCAPED).encode()
        parts += (b"--", boundary, b'\r\nContent-Disposition: form-data; name="image"; filename="', name)
        parts += (b'"\r\nContent-Type: application/octet-stream\r\n\r\n', image.data, b"\r\n")
    parts += (b"--", boundary, b"--\r\n")
    return b"".join(parts), f"multipart/form-data; boundary={boundary.decode()}"


def form_name(image: LoadedImage) -> str:
    """Return the file name of an image in the form. Without one, the service would read a text field."""
    name = (image.file or "").replace("\\", "/").rpartition("/")[2] or f"image-{image.index}"
    return name.encode(errors="replace").decode()  # a file name may contain bytes that are not valid text
