"""Compressed request bodies, inflated within a limit."""

from __future__ import annotations

import zlib

from serving.errors import TooLarge

MAX_INFLATED_BYTES = 100 * 1024 * 1024  # as TensorFlow Serving has it

GZIP = 16 + zlib.MAX_WBITS
DEFLATE = zlib.MAX_WBITS


def inflate(body: bytes, *, wbits: int = GZIP) -> bytes:
    """Return what a compressed body holds.

    Raises:
        ValueError: it is not compressed in this way, is cut off, or something follows it.
        TooLarge: it holds more than MAX_INFLATED_BYTES.
    """
    inflater = zlib.decompressobj(wbits)
    try:
        inflated = inflater.decompress(body, MAX_INFLATED_BYTES)
    except zlib.error as error:
        raise ValueError(str(error)) from error
    if inflater.unconsumed_tail:
        raise TooLarge(f"the compressed body is larger than {MAX_INFLATED_BYTES:,} bytes when inflated")
    if not inflater.eof or inflater.unused_data:
        raise ValueError("it is cut off, or something follows it")
    return inflated
