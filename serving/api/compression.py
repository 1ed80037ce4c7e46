"""Compressed request bodies, inflated within limits."""

from __future__ import annotations

import zlib

from serving.api.json_cost import JsonCost
from serving.errors import TooLarge
from serving.greenlets import offload
from serving.request_context import current_request

MAX_INFLATED_BYTES = 100 * 1024 * 1024  # as TensorFlow Serving has it
_CHUNK_BYTES = 256 * 1024

# zlib's window bits for the two Content-Encodings; "deflate" means zlib's own format (RFC 9110, 8.4.1.2).
GZIP = 16 + zlib.MAX_WBITS
DEFLATE = zlib.MAX_WBITS


def inflate(body: bytes, *, wbits: int = GZIP, json_bytes: int | None = None) -> bytes:
    """Return what a compressed body holds.

    It is inflated twice: first in small pieces that are only measured, so that a body of a few kilobytes that becomes
    a document of gigabytes is refused before there is memory for it.

    Args:
        body: as it was sent.
        wbits: GZIP or DEFLATE.
        json_bytes: how much of what it holds, from the beginning, is JSON; None: all.

    Raises:
        ValueError: it is not compressed in this way, is cut off, or has something behind it.
        TooLarge: it holds more than MAX_INFLATED_BYTES, or what it holds would need more memory than there is.
        Overloaded: there was no memory for it before the deadline.
    """
    size, cost = offload(_measure, body, wbits, json_bytes)
    context = current_request.get()
    if context.memory is not None:
        context.memory.check_fits(size + cost)  # what parsing will need is known already
    context.reserve(size)
    return offload(_inflate, body, wbits, size)


def _measure(body: bytes, wbits: int, json_bytes: int | None) -> tuple[int, int]:
    """Return the number of bytes that a body holds, and the memory that they would need as JSON."""
    inflater = zlib.decompressobj(wbits)
    cost = JsonCost()
    size = 0
    pending = body
    try:
        while not inflater.eof:
            chunk = inflater.decompress(pending, _CHUNK_BYTES)
            pending = inflater.unconsumed_tail
            if not chunk and not pending and not inflater.eof:
                raise ValueError("it is cut off")
            cost.add(chunk if json_bytes is None else chunk[: max(0, json_bytes - size)])
            size += len(chunk)
            if size > MAX_INFLATED_BYTES:
                raise TooLarge(f"the compressed body is larger than {MAX_INFLATED_BYTES:,} bytes when inflated")
    except zlib.error as error:
        raise ValueError(str(error)) from error
    if inflater.unused_data:
        raise ValueError("something follows the compressed data")
    return size, cost.total_bytes


def _inflate(body: bytes, wbits: int, size: int) -> bytes:
    return zlib.decompress(body, wbits, bufsize=size + 1)
