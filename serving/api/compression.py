"""Decompression of request bodies, limited in size and in memory."""

from __future__ import annotations

import zlib

from serving.api.json_cost import JsonCost
from serving.errors import TooLarge
from serving.greenlets import offload
from serving.request_context import current_request

MAX_INFLATED_BYTES = 100 * 1024 * 1024  # TensorFlow Serving's limit
_CHUNK_BYTES = 256 * 1024

# zlib's window bits for the two Content-Encodings; "deflate" means zlib's own format (RFC 9110, 8.4.1.2).
GZIP = 16 + zlib.MAX_WBITS
DEFLATE = zlib.MAX_WBITS


def inflate(body: bytes, *, wbits: int = GZIP, json_bytes: int | None = None) -> bytes:
    """Decompress a body: twice, so that a decompression bomb is refused before memory is allocated for it.

    The first pass only measures, in small chunks.

    Args:
        body: the compressed body.
        wbits: GZIP or DEFLATE.
        json_bytes: the length of the JSON at the beginning of the decompressed body; None if all of it is JSON.

    Raises:
        ValueError: the body is not in this format, is truncated, or has trailing data.
        TooLarge: the decompressed body exceeds MAX_INFLATED_BYTES, or the memory budget.
        Overloaded: no memory was free before the deadline.
    """
    size, cost = offload(_measure, body, wbits, json_bytes)
    context = current_request.get()
    if context.memory is not None:
        context.memory.check_fits(size + cost)  # refuse now what parsing could never reserve
    context.reserve(size)
    return offload(zlib.decompress, body, wbits, size + 1)


def _measure(body: bytes, wbits: int, json_bytes: int | None) -> tuple[int, int]:
    """Return the size of the decompressed body, and the memory that parsing its JSON takes, in bytes."""
    inflater = zlib.decompressobj(wbits)
    cost = JsonCost()
    size = 0
    pending = body
    try:
        while not inflater.eof:
            chunk = inflater.decompress(pending, _CHUNK_BYTES)
            pending = inflater.unconsumed_tail
            if not chunk and not pending and not inflater.eof:
                raise ValueError("the data is truncated")
            cost.add(chunk if json_bytes is None else chunk[: max(0, json_bytes - size)])
            size += len(chunk)
            if size > MAX_INFLATED_BYTES:
                raise TooLarge(f"the compressed body is larger than {MAX_INFLATED_BYTES:,} bytes when inflated")
    except zlib.error as error:
        raise ValueError(str(error)) from error
    if inflater.unused_data:
        raise ValueError("the data continues after the end of the compressed stream")
    return size, cost.total_bytes
