"""Fetch one file whose checksum is known: it appears under its name whole and right, or not at all."""

from __future__ import annotations

import hashlib
import logging
import uuid
from concurrent.futures import Future
from contextlib import closing
from pathlib import Path
from threading import Thread

import httpx
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

_PIECE_BYTES = 1 << 18

logger = logging.getLogger(__name__)


class DownloadError(Exception):
    """The file could not be fetched, or is not the one expected; the message says why."""


def download(url: str, path: Path, *, sha256: str, timeout_s: float) -> None:
    """Fetch `url` to `path`.

    Args:
        url: redirections are followed; a proxy is taken from the environment.
        path: of the file to be; its folder is made where there is none.
        sha256: the checksum expected, in hexadecimal digits.
        timeout_s: how long to wait for the answer to begin, and then for each further piece of it.

    Raises:
        DownloadError: no network, no such file, a wrong checksum, no space.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            found = _fetch(url, partial, timeout_s=timeout_s)
            if found != sha256:
                raise DownloadError(f"its SHA-256 is {found}, expected {sha256}")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except httpx.HTTPStatusError as error:
        raise DownloadError(f"the server answered {error.response.status_code}") from error
    except httpx.HTTPError as error:
        raise DownloadError(str(error) or type(error).__name__) from error
    except OSError as error:
        raise DownloadError(f"{error.filename or path} cannot be written: {error.strerror}") from error


def _fetch(url: str, path: Path, *, timeout_s: float) -> str:
    """Write what `url` answers to `path`; return its SHA-256."""
    digest = hashlib.sha256()
    with _make_client(timeout_s) as client, closing(_ask(client, url, timeout_s=timeout_s)) as response:
        response.raise_for_status()
        size = int(response.headers.get("content-length", 0)) or None
        logger.info("downloading %s%s", url, f", {size / 1e6:.0f} MB" if size else "")
        with path.open("wb") as file, _make_progress() as progress:
            task = progress.add_task("downloading", total=size)
            for piece in response.iter_raw(_PIECE_BYTES):
                file.write(piece)
                digest.update(piece)
                progress.advance(task, len(piece))
    return digest.hexdigest()


def _make_client(timeout_s: float) -> httpx.Client:
    try:
        return httpx.Client(timeout=timeout_s, follow_redirects=True)
    except (ValueError, ImportError) as error:
        raise DownloadError(f"the proxy that the environment names cannot be used: {error}") from error


def _ask(client: httpx.Client, url: str, *, timeout_s: float) -> httpx.Response:
    """Return the answer to `url`, its body still to come.

    The wait has one limit, for all of resolving, connecting, and being redirected. Hence the thread: nothing else ends
    a look-up of the address, which can take half a minute where there is no network.
    """
    # A server may else compress what is compressed, and its checksum would be another.
    request = client.build_request("GET", url, headers={"Accept-Encoding": "identity"})
    answer: Future[httpx.Response] = Future()

    def send() -> None:
        try:
            answer.set_result(client.send(request, stream=True))
        except Exception as error:
            answer.set_exception(error)

    Thread(target=send, daemon=True).start()
    try:
        return answer.result(timeout_s)
    except (TimeoutError, httpx.TimeoutException) as error:  # the client's own limit may be the first to pass
        raise httpx.ConnectTimeout(f"no answer within {timeout_s:g} s") from error


def _make_progress() -> Progress:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    return Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal)
