"""The fast path for pixels reads the same arrays as the general parser, or leaves the request to it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.api.tensorflow_serving.json_document import parse_document
from serving.api.tensorflow_serving.json_tensor import decode_inputs
from serving.api.tensorflow_serving.messages import find_pixel_input, read_pixels
from serving.errors import InvalidRequest
from serving.inference.signatures import Signature, TensorSpec

SPEC = TensorSpec("images", "DT_UINT8", (None, 2, 3), "x:0")
SIGNATURE = Signature("serving_default", "predict", {"images": SPEC}, {})


@pytest.mark.parametrize("rows", [1, 2, 64])
@pytest.mark.parametrize("key", ["instances", "inputs"])
@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": "), (" ,\n\t", " : ")])
def test_pixels_take_the_fast_path(rows: int, key: str, separators: tuple[str, str]) -> None:
    images = np.random.default_rng(rows).integers(0, 256, (rows, 2, 3), dtype=np.uint8)
    body = json.dumps({key: images.tolist()}, separators=separators).encode()
    read = read_pixels(b" " + body + b"\n", SPEC)
    assert read is not None
    np.testing.assert_array_equal(read[0], images)
    assert read[0].dtype == np.uint8
    assert read[1] == (key == "instances")


GOOD = "[[[1,2,3],[4,5,6]]]"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"]",
        b'{"instances":[]}',
        b'{"instances":[[]]}',
        b'{"instances":[[[1,2,3],[4,5]]]}',
        b'{"instances":[[[1,2,3],[4,5,6,7]]]}',
        b'{"instances":[[[1,2,3],4,5,6]]}',
        b'{"instances":[[1,2,3],[4,5,6]]}',
        b'{"instances":[[[[1,2,3],[4,5,6]]]]}',
        b'{"instances":[[[1,2],[3,4],[5,6]]]}',
        b'{"instances":[[[1,2,3],[4,5,300]]]}',
        b'{"instances":[[[1,2,3],[4,5,-6]]]}',
        b'{"instances":[[[1,2,3],[4,5,6.0]]]}',
        b'{"instances":[[[1,2,3],[4,5,6e0]]]}',
        b'{"instances":[[[1,2,3],[4,5,true]]]}',
        b'{"instances":[[[1,2,3],[4,5,"6"]]]}',
        b'{"instances":[[[1,2,3],[4,5,]]]}',
        b'{"instances":[[[1,2,3],[4,5,06]]]}',
        b'{"instances":[[[1,2,3],[4,5 6,6]]]}',
        b'{"instances":[[[1,2,3],[4,5,6]]],"signature_name":"x"}',
        b'{"signature_name":"x","instances":[[[1,2,3],[4,5,6]]]}',
        b'{"instances":[[[1,2,3],[4,5,6]]]}x',
        b'{"instances":[[[1,2,3],[4,5,6]]]}]',
        b'{"instances":[[[1,2,3],[4,5,6]]]',
        b'{"instances":[[[1,2,3],[4,5,6]]]}}',
        b'{"instances":[[[1,2,3],[4,5,6]]],"instances":[[[1,2,3],[4,5,6]]]}',
        b'{"INSTANCES":[[[1,2,3],[4,5,6]]]}',
    ],
)
def test_other_requests_fall_back(body: bytes) -> None:
    assert read_pixels(body, SPEC) is None


@given(st.lists(st.integers(0, len(GOOD) - 1), max_size=3), st.text("0123456789[],. -", min_size=3, max_size=3))
def test_both_parsers_read_the_same_pixels(positions: list[int], changes: str) -> None:
    text = list(GOOD)
    for position, change in zip(positions, changes, strict=False):
        text[position] = change
    body = ('{"instances":' + "".join(text) + "}").encode()
    read = read_pixels(body, SPEC)
    if read is None:
        return
    try:
        expected = decode_inputs(parse_document(body), SIGNATURE)["images"]
    except InvalidRequest as error:
        raise AssertionError(f"{body!r} should have been left to the parser: {error}") from error
    np.testing.assert_array_equal(read[0], expected)


@pytest.mark.parametrize(
    ("signature", "found"),
    [
        (SIGNATURE, True),
        (None, False),
        (Signature("other", "predict", {"images": SPEC}, {}), False),
        (Signature("serving_default", "predict", {"a": SPEC, "b": SPEC}, {}), False),
        (Signature("serving_default", "predict", {"x": TensorSpec("x", "DT_FLOAT", (None, 2), "x")}, {}), False),
        (Signature("serving_default", "predict", {"x": TensorSpec("x", "DT_UINT8", (None, None), "x")}, {}), False),
        (Signature("serving_default", "predict", {"x": TensorSpec("x", "DT_UINT8", None, "x")}, {}), False),
        (Signature("serving_default", "predict", {"x": TensorSpec("x", "DT_UINT8", (2, 3), "x")}, {}), False),
    ],
)
def test_only_uint8_batches_of_known_shape_take_the_fast_path(signature: Signature | None, found: bool) -> None:
    assert (find_pixel_input(signature) is not None) == found
