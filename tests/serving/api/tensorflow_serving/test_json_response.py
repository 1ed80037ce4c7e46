from __future__ import annotations

import json

import numpy as np
import pytest

from serving.api.tensorflow_serving.json_response import encode_outputs
from serving.errors import InvalidRequest
from serving.inference.signatures import Signature, TensorSpec

DTYPES = {"float32": "DT_FLOAT", "float64": "DT_DOUBLE", "float16": "DT_HALF", "object": "DT_STRING", "bool": "DT_BOOL"}


def reply(*, as_rows: bool = False, **outputs: np.ndarray) -> bytes:
    specs = {
        name: TensorSpec(name, DTYPES.get(array.dtype.name, f"DT_{array.dtype.name.upper()}"), None, f"{name}:0")
        for name, array in outputs.items()
    }
    return encode_outputs(outputs, Signature("any", "", {}, specs), as_rows=as_rows)


def strings(*values: bytes) -> np.ndarray:
    return np.array(values, dtype=object)


def test_floats_have_the_digits_of_their_own_dtype() -> None:
    values = [0.1, 1 / 3, 1.0, 3e6, 1e-30, -0.0]
    assert reply(y=np.array(values, np.float32)) == b'{"outputs":[0.1,0.33333334,1.0,3000000.0,1e-30,-0.0]}'
    assert reply(y=np.array(values)) == b'{"outputs":[0.1,0.3333333333333333,1.0,3000000.0,1e-30,-0.0]}'


def test_they_have_them_beside_what_is_not_finite_too() -> None:
    values = [0.1, np.nan, np.inf, -np.inf, 2.0]
    assert reply(y=np.array(values, np.float32)) == b'{"outputs":[0.1,NaN,Infinity,-Infinity,2.0]}'
    assert reply(as_rows=True, y=np.array(values, np.float32), z=np.zeros((5, 1), np.float32)).startswith(
        b'{"predictions":[{"y":0.1,"z":[0.0]},{"y":NaN,"z":[0.0]}'
    )
    assert reply(y=np.array(np.nan, np.float32)) == b'{"outputs":NaN}'


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64])
def test_integers_are_written_to_their_limits(dtype: type) -> None:
    limits = [np.iinfo(dtype).min, np.iinfo(dtype).max]
    assert (
        reply(as_rows=True, y=np.array(limits, dtype)) == json.dumps({"predictions": limits}).replace(" ", "").encode()
    )


def test_scalars_lists_and_booleans() -> None:
    assert reply(y=np.array(6, np.float32)) == b'{"outputs":6.0}'
    assert reply(y=np.array(True)) == b'{"outputs":true}'
    assert reply(as_rows=True, y=np.array([[True], [False]])) == b'{"predictions":[[true],[false]]}'
    assert reply(y=np.zeros((2, 0), np.int64)) == b'{"outputs":[[],[]]}'


def test_strings_are_raw_and_those_named_bytes_are_base64() -> None:
    assert reply(tag=strings(b"h\xc3\xa9\n", b"")) == '{"outputs":["hé\\n",""]}'.encode()
    assert reply(tag_bytes=strings(b"hi")) == b'{"outputs":[{"b64":"aGk="}]}'
    assert reply(tag_bytes=strings(b"hi").reshape(1, 1)) == b'{"outputs":[[{"b64":"aGk="}]]}'
    assert reply(tag_bytes=strings(b"hi").reshape(())) == b'{"outputs":{"b64":"aGk="}}'


def test_strings_that_are_no_utf8_are_sent_as_they_are() -> None:
    assert reply(tag=strings(b"\xff\xfe", b"caf\xc3\xa9"), y=np.array([0.1], np.float32)) == (
        b'{"outputs":{"tag":["\xff\xfe","caf\xc3\xa9"],"y":[0.1]}}'
    )


def test_rows_of_several_outputs_are_objects() -> None:
    scores = np.array([[0.5, 1], [2, 3]], np.float32)
    assert reply(as_rows=True, scores=scores, label=strings(b"a", b"b"), id=np.array([7, 8])) == (
        b'{"predictions":[{"scores":[0.5,1.0],"label":"a","id":7},{"scores":[2.0,3.0],"label":"b","id":8}]}'
    )


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ({"s": np.array(1, np.float32)}, "Tensor name: s has no shape information "),
        ({"s": np.zeros((0, 3), np.float32)}, "Tensor name: s has invalid batch size: 0"),
        ({"a": np.zeros(2), "b": np.zeros(3)}, "Tensor name: b has inconsistent batch size: 3 expecting: 2"),
    ],
)
def test_outputs_without_a_row_for_each_row_are_refused(outputs: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        reply(as_rows=True, **outputs)
    assert str(refused.value).splitlines()[0] == message
    reply(as_rows=False, **outputs)


def test_halves_cannot_be_written() -> None:
    with pytest.raises(InvalidRequest, match="Failed to write JSON value for tensor type: half"):
        reply(y=np.zeros(1, np.float16))
