"""Downloads a file with a known checksum. It appears under its name complete and verified, or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import uuid
from pathlib import Path

import httpx
from rich.console import Console
from rich.progress import DownloadColumn, Progress, TransferSpeedColumn

_CHUNK_BYTES = 1 << 18

logger = logging.getLogger(__name__)


class DownloadError(Exception):
    """The download failed, or the file is not the expected one."""


def download(url: str, path: Path, *, sha256: str, timeout_s: float) -> None:
    """Download `url` to `path`.

    Args:
        url: redirects are followed; a proxy is taken from the environment.
        path: its folder is created.
        sha256: expected checksum, in hexadecimal digits.
        timeout_s: for connecting, for the response to start, and between two chunks of it; not for name resolution.

    Raises:
        DownloadError: network error, HTTP error, wrong checksum, or the file cannot be written.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        found = _fetch(url, partial, timeout_s=timeout_s)
        if found != sha256:
            raise DownloadError(f"its SHA-256 is {found}, expected {sha256}")
        partial.replace(path)
    except httpx.HTTPStatusError as error:
        raise DownloadError(f"the server responded with {error.response.status_code}") from error
    except httpx.TimeoutException as error:
        raise DownloadError(f"no data within {timeout_s:g} s") from error
    except httpx.HTTPError as error:
        raise DownloadError(str(error) or type(error).__name__) from error
    except OSError as error:
        raise DownloadError(f"{error.filename or path} cannot be written: {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def _fetch(url: str, path: Path, *, timeout_s: float) -> str:
    """Write the content of `url` to `path`; return its SHA-256."""
    try:
        client = httpx.Client(timeout=timeout_s, follow_redirects=True)
    except (ValueError, ImportError) as error:
        raise DownloadError(f"the proxy in the environment cannot be used: {error}") from error
    digest = hashlib.sha256()
    # Without compression, which would change the checksum.
    with client, client.stream("GET", url, headers={"Accept-Encoding": "identity"}) as response:
        response.raise_for_status()
        size = int(response.headers.get("content-length", 0)) or None
        logger.info("downloading %s%s", url, f", {size / 1e6:.0f} MB" if size else "")
        console = Console(stderr=True)
        columns = (*Progress.get_default_columns(), DownloadColumn(), TransferSpeedColumn())
        progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        with path.open("wb") as file, progress:
            task = progress.add_task("downloading", total=size)
            for chunk in response.iter_raw(_CHUNK_BYTES):
                file.write(chunk)
                digest.update(chunk)
                progress.advance(task, len(chunk))
    return digest.hexdigest()
