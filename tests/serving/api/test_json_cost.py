"""The memory estimate for a JSON document, compared with the memory that parsing takes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.api import json_cost as module
from serving.api.json_cost import JsonCost, json_cost
from serving.api.json_process import LARGE_JSON_BYTES, JsonProcess
from serving.api.tensorflow_serving.messages import parse_predict
from serving.errors import ServingError
from tests.serving.api.test_json_process import MAX_ROWS, SIGNATURES

pytestmark = pytest.mark.slow

MB = 1024 * 1024
# The subprocess holds the body twice: as read from the pipe, and as bytes for the parser.
BODY_COPIES = 2
NOISE_BYTES = 6 * MB
EMOJI = "\N{GRINNING FACE}".encode()


def repeat(element: bytes, size: int = 3 * MB, *, signature: bytes = b"serving_default") -> bytes:
    elements = b",".join([element] * (size // (len(element) + 1)))
    return b'{"signature_name":"%b","instances":[%b]}' % (signature, elements)


def keys(size: int) -> bytes:
    return b'{"instances":[{' + b",".join(b'"%d":1' % number for number in range(size // 10)) + b"}]}"


def accept(_: bytes) -> str:
    return ""


@pytest.fixture(scope="module")
def process() -> Iterator[JsonProcess]:
    """A subprocess that has parsed before, so that memory it keeps is not counted."""
    process = JsonProcess()
    process.parse(parse_predict, repeat(b"[1]", LARGE_JSON_BYTES + 1_000), SIGNATURES, MAX_ROWS)
    yield process
    process._end()


def status_bytes(pid: int, key: str) -> int:
    return int(Path(f"/proc/{pid}/status").read_text().split(f"{key}:")[1].split()[0]) * 1024


def peak_of_parsing(process: JsonProcess, body: bytes) -> int:
    """Return the peak growth of the subprocess' resident set while it parsed."""
    process.parse(accept, bytes(LARGE_JSON_BYTES + 1))  # returns after memory of the previous call is freed
    assert process._process
    pid = process._process.pid
    Path(f"/proc/{pid}/clear_refs").write_text("5")  # resets VmHWM to the current resident set
    before = status_bytes(pid, "VmRSS")
    with contextlib.suppress(ServingError):
        process.parse(parse_predict, body, SIGNATURES, 100_000_000)
    assert process._process.pid == pid, "the subprocess was restarted"
    return status_bytes(pid, "VmHWM") - before


DOCUMENTS = {
    "numbers": repeat(b"1"),
    "numbers of many digits": repeat(b"0.12345678901234567"),
    "rows": repeat(b"[1,2]"),
    "empty lists": repeat(b"[]"),
    "empty objects": repeat(b"{}"),
    "nested lists": repeat(b"[" * 20 + b"]" * 20),
    "objects": repeat(b'{"x":1}'),
    "empty strings": repeat(b'""', signature=b"strings"),
    "strings with one wide character": repeat(b'"' + b"a" * 100 + EMOJI + b'"', signature=b"strings"),
    "base64": repeat(b'{"b64":"AAAA"}', signature=b"strings"),
    "invalid JSON": repeat(b"[]")[:-1],
    "repeated key": repeat(b"[1]")[:-1] + b',"instances":[[1]]}',
    "a string": repeat(b'"' + b"a" * (3 * MB - 10) + b'"', signature=b"strings"),
}
# Documents that once took more than the estimate.
UNDERESTIMATED = {
    "NaN": repeat(b"NaN"),
    "strings": repeat(b'"abcdefgh"', signature=b"strings"),
    "bytes that are not UTF-8": repeat(b'"' + b"\xe9" * (3 * MB - 10) + b'"', signature=b"strings"),
    "a string with one wide character": repeat(b'"' + b"a" * (3 * MB - 20) + EMOJI + b'"', signature=b"strings"),
    "a wide string for a number": repeat(b'"' + b"a" * (3 * MB - 20) + EMOJI + b'"'),
    "a large file as base64": repeat(b'{"b64":"' + b"A" * (3 * MB // 4 * 4 - 32) + b'"}', signature=b"strings"),
    "many keys": keys(3 * MB),
}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_estimate_is_an_upper_bound(process: JsonProcess, name: str) -> None:
    body = DOCUMENTS[name]
    assert len(body) > LARGE_JSON_BYTES
    peak, estimate = peak_of_parsing(process, body), json_cost(body) + BODY_COPIES * len(body)
    print(f"{name}: {peak / MB:.0f} MB, estimated {estimate / MB:.0f} MB")
    assert peak <= estimate + NOISE_BYTES


@pytest.mark.parametrize("name", UNDERESTIMATED)
def test_the_estimate_is_an_upper_bound_for_unusual_documents(process: JsonProcess, name: str) -> None:
    body = UNDERESTIMATED[name]
    peak, estimate = peak_of_parsing(process, body), json_cost(body) + BODY_COPIES * len(body)
    print(f"{name}: {peak / MB:.0f} MB, estimated {estimate / MB:.0f} MB")
    assert peak <= estimate + NOISE_BYTES


@given(st.binary(max_size=300), st.integers(1, 50))
def test_the_cost_is_the_same_in_chunks(body: bytes, step: int) -> None:
    whole, pieces = JsonCost(), JsonCost()
    whole.add(body)
    for start in range(0, len(body), step):
        pieces.add(body[start : start + step])
    assert pieces.size_bytes == whole.size_bytes == len(body)
    assert abs(pieces.total_bytes - whole.total_bytes) <= module.STRING_BYTES * (len(body) // step + 1)


def test_long_documents_are_measured_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    body = b'{"a":[1,"b"]},' * 10_000
    expected = json_cost(body)
    monkeypatch.setattr(module, "_SLICE_BYTES", 14 * 100)
    assert json_cost(body) == expected
