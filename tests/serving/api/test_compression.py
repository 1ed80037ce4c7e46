from __future__ import annotations

import gzip
import zlib

import pytest

from serving.api import compression as module
from serving.api.compression import DEFLATE, GZIP, inflate
from serving.errors import TooLarge


@pytest.mark.parametrize(("wbits", "compress"), [(GZIP, gzip.compress), (DEFLATE, zlib.compress)])
def test_compressed_bodies_are_decompressed(wbits, compress):
    assert inflate(compress(b"tensor" * 1000), wbits=wbits) == b"tensor" * 1000
    assert inflate(compress(b""), wbits=wbits) == b""


WHOLE = gzip.compress(b"tensor", mtime=0)  # the body is the name of a test, which must be the same in every process


@pytest.mark.parametrize("body", [WHOLE[:-1], WHOLE + b"x", b"", b"tensor"])
def test_a_damaged_body_is_refused(body):
    with pytest.raises(ValueError, match=r"."):
        inflate(body, wbits=GZIP)


def test_the_size_limit_is_inclusive(monkeypatch):
    monkeypatch.setattr(module, "MAX_INFLATED_BYTES", 5_000)
    assert inflate(gzip.compress(bytes(5_000)), wbits=GZIP) == bytes(5_000)
    for size in (5_001, 5_000_000):
        with pytest.raises(TooLarge, match="5,000 bytes"):
            inflate(gzip.compress(bytes(size)), wbits=GZIP)
