"""The way to the service over HTTP: `POST /predict` as multipart, `GET /readyz`."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import math
import secrets
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx

from client.backoff import choose_wait_s
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
from client.images import Picture
from client.predictions import Failure, Prediction, ServiceStatus
from client.replies import Reply, read_predictions, read_rejections, read_status

logger = logging.getLogger(__name__)

DEFAULT_TIMEOUT_S = 60.0
DEFAULT_RETRIES = 3
CONNECT_TIMEOUT_S = 5.0
MAX_VERSION = 2**63 - 1  # of a model, an int64
MAX_REPLY_BYTES = 64 * 1024 * 1024

_ESCAPED = {ord('"'): "%22", **{code: f"%{code:02X}" for code in range(32)}}


class RestTransport:
    """Requests to one service, tried again where that can help. Arguments as for `Client`; `sleep` waits seconds."""

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        version: int | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        retries: int = DEFAULT_RETRIES,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        check_patience(timeout_s, retries)
        check_model(model, version)
        address = _read_url(url)
        self.url = str(address.copy_with(username=None, password=None)).rstrip("/")
        self._query = {
            name: str(value) for name, value in (("model", model), ("version", version)) if value is not None
        }
        self._timeout_s = timeout_s
        self._retries = retries
        self._sleep = sleep
        try:
            # A transport of its own keeps the environment's proxies out, and nothing else of it.
            transport = httpx.HTTPTransport() if is_this_machine(address.host) else None
            self._http = httpx.Client(base_url=address, transport=transport)
        except (ImportError, ValueError) as error:
            raise ValueError(f"the environment's proxy settings cannot be used for {self.url}: {error}") from error

    def predict_batch(self, pictures: Sequence[Picture]) -> list[Prediction | Failure]:
        """Classify pictures, in their order; see `Transport`.

        A request with an unreadable picture is refused as a whole, but the refusal names the culprits: the
        others are sent again without them. One that is too large is sent again in halves.
        """
        outcomes: dict[int, Prediction | Failure] = {}
        groups = [list(pictures)]
        while groups:
            group = groups.pop()
            reply = self._ask_for_predictions(group)
            if reply.status == 200:
                outcomes.update(read_predictions(reply, group))
            elif rejections := read_rejections(reply, group):
                outcomes |= {rejection.index: rejection for rejection in rejections}
                if remaining := [picture for picture in group if picture.index not in outcomes]:
                    groups.append(remaining)
            elif reply.status == 413 and len(group) > 1:
                middle = len(group) // 2
                groups += [group[middle:], group[:middle]]
            elif reply.status == 413:
                (picture,) = group
                outcomes[picture.index] = Failure(picture.index, picture.file, _why_too_large(reply, picture))
            else:
                raise self._error(reply)
        return [outcomes[picture.index] for picture in pictures]

    def status(self) -> ServiceStatus:
        """Ask once, without retries, whether the service is ready and what it serves; see `Transport`."""
        reply = self._send("GET", "/readyz", deadline_s=time.monotonic() + self._timeout_s)
        if reply.status in (200, 503):
            return read_status(reply)
        raise self._error(reply)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def _ask_for_predictions(self, pictures: Sequence[Picture]) -> Reply:
        """Post pictures, again if the connection fails or the service is busy, until retries or time are used up."""
        body, content_type = encode_form(pictures)
        form = {"content": body, "headers": {"Content-Type": content_type}}
        deadline_s = time.monotonic() + self._timeout_s
        attempt = 0
        while True:
            attempt += 1
            problem: ClientError
            retry_after = None
            try:
                reply = self._send("POST", "/predict", params=self._query, deadline_s=deadline_s, **form)
            except ConnectionFailed as error:
                problem = error
            else:
                if reply.status != 503:
                    return reply
                problem = self._error(reply)
                retry_after = reply.retry_after
            wait_s = choose_wait_s(attempt, retry_after=retry_after)
            if attempt > self._retries or time.monotonic() + wait_s >= deadline_s:
                raise problem if attempt == 1 else type(problem)(f"{problem} (tried {attempt} times)")
            logger.info("%s; trying again in %.1f s", problem, wait_s)
            self._sleep(wait_s)

    def _send(self, method: str, path: str, *, deadline_s: float, **content: Any) -> Reply:
        """Send one request and read the whole reply, whatever its status."""
        remaining_s = max(deadline_s - time.monotonic(), 0.001)
        timeout = httpx.Timeout(remaining_s, connect=min(CONNECT_TIMEOUT_S, remaining_s))
        try:
            with self._http.stream(method, path, timeout=timeout, **content) as response:
                body = bytearray()
                for chunk in response.iter_bytes():
                    body += chunk
                    if len(body) > MAX_REPLY_BYTES:
                        raise UnexpectedReply(f"the reply of {self.url} has more than {MAX_REPLY_BYTES:,} bytes")
                    if time.monotonic() > deadline_s:
                        raise self._timed_out()
            # Undoes the reference cycle of httpx's responses, which would keep the pictures sent until the
            # garbage collector's next round: hundreds of megabytes, when batches of photos follow each other.
            response.stream = httpx.ByteStream(b"")
            return Reply(
                url=self.url,
                status=response.status_code,
                reason_phrase=response.reason_phrase,
                content_type=response.headers.get("content-type", ""),
                retry_after=response.headers.get("retry-after"),
                body=bytes(body),
            )
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise ConnectionFailed(
                f"cannot connect to {self.url} ({str(error) or 'no answer'}); is the service running? "
                "Start it with `make serve`, or name another address with url (--url)"
            ) from error
        except httpx.TimeoutException as error:
            raise self._timed_out() from error
        except httpx.TransportError as error:
            raise ConnectionFailed(
                f"the connection to {self.url} broke ({str(error) or type(error).__name__}); "
                "the log of the service may say why"
            ) from error
        except httpx.DecodingError as error:
            raise UnexpectedReply(f"the reply of {self.url} cannot be decoded: {error}") from error

    def _timed_out(self) -> RequestTimedOut:
        return RequestTimedOut(
            f"no whole answer from {self.url} within {self._timeout_s:g} s; allow more time with timeout_s "
            "(--timeout), or send fewer pictures at once with batch_size (--batch-size)"
        )

    def _status_command(self) -> str:
        """Return the command line of `status`, with the Python that runs this process: the PATH may have none."""
        python = Path(sys.executable or "python")
        with contextlib.suppress(ValueError, OSError):  # OSError: the working directory is gone
            python = python.relative_to(Path.cwd())
        return shlex.join([str(python), "-m", "client", "status", "--url", self.url])

    def _error(self, reply: Reply) -> ClientError:
        """Return the error that a reply without predictions stands for."""
        if reply.status == 503:
            return ServerBusy(
                f"the service at {self.url} is not ready: {reply.error or reply.summary}; "
                f"`{self._status_command()}` tells when it is"
            )
        if reply.error is None:
            return reply.unexpected("predictions or an error as JSON")
        if reply.status == 404:
            return ModelNotFound(f"{reply.error} ({self.url}); `{self._status_command()}` lists what is served")
        if reply.status >= 500:
            return ServerFailed(f"the service at {self.url} failed ({reply.status}): {reply.error}")
        match reply.status, reply.json:
            case 400, {"models": list(models)}:
                names = ", ".join(map(str, models))
                return RequestRejected(
                    f"the service at {self.url} has several models; choose one with model (--model): {names}"
                )
        return RequestRejected(f"the service at {self.url} refuses the request ({reply.status}): {reply.error}")


def _read_url(url: str) -> httpx.URL:
    try:
        address = httpx.URL(url)
    except (httpx.InvalidURL, TypeError) as error:
        raise ValueError(f"expected an address such as http://127.0.0.1:8501, got {url!r}: {error}") from error
    if address.scheme not in ("http", "https") or not address.host or address.query or address.fragment:
        raise ValueError(f"expected an address such as http://127.0.0.1:8501, got {url!r}")
    return address


def check_patience(timeout_s: float, retries: int) -> None:
    """Check how long and how often a client is to try.

    Raises:
        ValueError: one of them makes no sense.
    """
    if not (timeout_s > 0 and math.isfinite(timeout_s)):
        raise ValueError(f"timeout_s must be more than 0 seconds, not {timeout_s}")
    if retries < 0:
        raise ValueError(f"retries must be at least 0, not {retries}")


def check_model(model: str | None, version: int | None) -> None:
    """Check which model and version a client is to ask for.

    Raises:
        ValueError: the name is empty, or the version is no version number.
    """
    if model == "":
        raise ValueError("model must not be empty; leave it out where only one model is served")
    if version is not None and not 0 <= version <= MAX_VERSION:
        raise ValueError(f"version must be from 0 to {MAX_VERSION}, not {version}")


def is_this_machine(host: str) -> bool:
    """Say whether a host is this machine: a proxy, which is another one, could not reach it."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
    return address.is_loopback or address.is_unspecified


def encode_form(pictures: Sequence[Picture]) -> tuple[bytes, str]:
    """Return the body and Content-Type of a multipart form with a file `image` for each picture (RFC 7578).

    httpx could do it, at ten times the cost, which for small pictures is most of what a client does.
    """
    boundary = secrets.token_hex(16).encode()
    parts: list[bytes] = []
    for picture in pictures:
        # As browsers write a name (HTML, "multipart form data"): what would end it or its line is percent-encoded.
        name = _form_name(picture).translate(_ESCAPED).encode()
        parts += (b"--", boundary, b'\r\nContent-Disposition: form-data; name="image"; filename="', name)
        parts += (b'"\r\nContent-Type: application/octet-stream\r\n\r\n', picture.data, b"\r\n")
    parts += (b"--", boundary, b"--\r\n")
    return b"".join(parts), f"multipart/form-data; boundary={boundary.decode()}"


def _form_name(picture: Picture) -> str:
    """Return the name that a picture gets in the form: for the service's messages, and to be a file at all."""
    name = (picture.file or "").replace("\\", "/").rpartition("/")[2] or f"picture-{picture.index}"
    return name.encode(errors="replace").decode()  # a name on disk need not be valid text


def _why_too_large(reply: Reply, picture: Picture) -> str:
    if reply.error is None:
        return f"too large for what stands at {reply.url}: {reply.summary}"
    return reply.error.removeprefix(f"{_form_name(picture)}: ")
