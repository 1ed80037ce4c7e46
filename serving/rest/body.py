"""Compressed request bodies, inflated within a limit."""

from __future__ import annotations

import zlib

from serving.errors import TooLarge

MAX_INFLATED_BYTES = 100 * 1024 * 1024  # as TensorFlow Serving has it

# zlib's window bits for the two Content-Encodings; "deflate" means zlib's own format (RFC 9110, 8.4.1.2).
GZIP = 16 + zlib.MAX_WBITS
DEFLATE = zlib.MAX_WBITS


def inflate(body: bytes, *, wbits: int = GZIP) -> bytes:
    """Return what a compressed body holds.

    Args:
        body: as it was sent.
        wbits: GZIP or DEFLATE.

    Raises:
        ValueError: it is not compressed in this way, is cut off, or has something behind it.
        TooLarge: it holds more than MAX_INFLATED_BYTES.
    """
    inflater = zlib.decompressobj(wbits)
    try:
        inflated = inflater.decompress(body, MAX_INFLATED_BYTES)
    except zlib.error as error:
        raise ValueError(str(error)) from error
    if not inflater.eof and len(inflated) == MAX_INFLATED_BYTES:
        raise TooLarge(f"the compressed body is larger than {MAX_INFLATED_BYTES:,} bytes when inflated")
    if not inflater.eof:
        raise ValueError("it is cut off")
    if inflater.unused_data:
        raise ValueError("something follows the compressed data")
    return inflated
