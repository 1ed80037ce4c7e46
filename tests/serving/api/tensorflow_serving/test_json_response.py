from __future__ import annotations

import json
from typing import Any

import numpy as np
import orjson
import pytest

from serving.api.json_arrays import SLICE_ELEMENTS
from serving.api.tensorflow_serving.json_response import encode_outputs
from serving.errors import InvalidRequest
from serving.inference.signatures import Signature, TensorSpec

DTYPES = {"float32": "DT_FLOAT", "float64": "DT_DOUBLE", "float16": "DT_HALF", "object": "DT_STRING", "bool": "DT_BOOL"}


def encode(*, as_rows: bool = False, **outputs: np.ndarray) -> bytes:
    specs = {
        name: TensorSpec(name, DTYPES.get(array.dtype.name, f"DT_{array.dtype.name.upper()}"), None, f"{name}:0")
        for name, array in outputs.items()
    }
    return encode_outputs(outputs, Signature("any", "", {}, specs), as_rows=as_rows)


LARGE = np.arange(3 * SLICE_ELEMENTS, dtype=np.float32).reshape(2, -1) / 8


def nested_json(array: np.ndarray) -> bytes:
    """The array as one call of orjson writes it."""
    return orjson.dumps(array, option=orjson.OPT_SERIALIZE_NUMPY)


def strings(*values: bytes) -> np.ndarray:
    return np.array(values, dtype=object)


def test_floats_have_the_fewest_digits_of_their_dtype() -> None:
    values = [0.1, 1 / 3, 1.0, 3e6, 1e-30, -0.0]
    assert encode(y=np.array(values, np.float32)) == b'{"outputs":[0.1,0.33333334,1.0,3000000.0,1e-30,-0.0]}'
    assert encode(y=np.array(values)) == b'{"outputs":[0.1,0.3333333333333333,1.0,3000000.0,1e-30,-0.0]}'


def test_nan_and_infinities_do_not_change_the_digits_of_other_floats() -> None:
    values = [0.1, np.nan, np.inf, -np.inf, 2.0]
    assert encode(y=np.array(values, np.float32)) == b'{"outputs":[0.1,NaN,Infinity,-Infinity,2.0]}'
    assert encode(as_rows=True, y=np.array(values, np.float32), z=np.zeros((5, 1), np.float32)).startswith(
        b'{"predictions":[{"y":0.1,"z":[0.0]},{"y":NaN,"z":[0.0]}'
    )
    assert encode(y=np.array(np.nan, np.float32)) == b'{"outputs":NaN}'


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64])
def test_integers_are_written_to_their_limits(dtype: type) -> None:
    limits = [np.iinfo(dtype).min, np.iinfo(dtype).max]
    assert (
        encode(as_rows=True, y=np.array(limits, dtype)) == json.dumps({"predictions": limits}).replace(" ", "").encode()
    )


def test_scalars_lists_and_booleans() -> None:
    assert encode(y=np.array(6, np.float32)) == b'{"outputs":6.0}'
    assert encode(y=np.array(True)) == b'{"outputs":true}'
    assert encode(as_rows=True, y=np.array([[True], [False]])) == b'{"predictions":[[true],[false]]}'
    assert encode(y=np.zeros((2, 0), np.int64)) == b'{"outputs":[[],[]]}'


def test_strings_are_sent_raw_and_outputs_named_bytes_as_base64() -> None:
    assert encode(tag=strings(b"h\xc3\xa9\n", b"")) == '{"outputs":["hé\\n",""]}'.encode()
    assert encode(tag_bytes=strings(b"hi")) == b'{"outputs":[{"b64":"aGk="}]}'
    assert encode(tag_bytes=strings(b"hi").reshape(1, 1)) == b'{"outputs":[[{"b64":"aGk="}]]}'
    assert encode(tag_bytes=strings(b"hi").reshape(())) == b'{"outputs":{"b64":"aGk="}}'


def test_strings_that_are_not_utf8_are_sent_unchanged() -> None:
    assert encode(tag=strings(b"\xff\xfe", b"caf\xc3\xa9"), y=np.array([0.1], np.float32)) == (
        b'{"outputs":{"tag":["\xff\xfe","caf\xc3\xa9"],"y":[0.1]}}'
    )


def test_rows_of_several_outputs_are_objects() -> None:
    scores = np.array([[0.5, 1], [2, 3]], np.float32)
    assert encode(as_rows=True, scores=scores, label=strings(b"a", b"b"), id=np.array([7, 8])) == (
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
def test_outputs_that_cannot_be_split_into_rows_are_refused(outputs: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        encode(as_rows=True, **outputs)
    assert str(refused.value).splitlines()[0] == message
    encode(as_rows=False, **outputs)


def test_float16_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="Failed to write JSON value for tensor type: half"):
        encode(y=np.zeros(1, np.float16))


@pytest.mark.parametrize("as_rows", [False, True])
def test_large_outputs_are_written_like_small_ones(as_rows: bool) -> None:
    first, second = map(nested_json, LARGE)
    key = b"predictions" if as_rows else b"outputs"
    assert encode(as_rows=as_rows, y=LARGE) == b'{"%b":[%b,%b]}' % (key, first, second)
    several = encode(as_rows=as_rows, a=LARGE, b=strings(b"x", b"\0"), c=LARGE[::-1])
    if as_rows:
        rows = b'[{"a":%b,"b":"x","c":%b},{"a":%b,"b":"\\u0000","c":%b}]' % (first, second, second, first)
        assert several == b'{"predictions":%b}' % rows
    else:
        columns = b'{"a":[%b,%b],"b":["x","\\u0000"],"c":[%b,%b]}' % (first, second, second, first)
        assert several == b'{"outputs":%b}' % columns


def test_large_outputs_beside_nan_and_strings_that_are_not_utf8() -> None:
    odd = LARGE.copy()
    odd[1, -1] = np.inf
    assert encode(a=LARGE, b=np.array([0.1, np.nan], np.float32), c=strings(b"\xff\0")) == (
        b'{"outputs":{"a":%b,"b":[0.1,NaN],"c":["\xff\\u0000"]}}' % nested_json(LARGE)
    )
    assert encode(a=odd) == b'{"outputs":%b}' % nested_json(odd).replace(b"null", b"Infinity")


def test_orjson_writes_at_most_a_slice_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def dumps(*args: Any, **kwargs: Any) -> bytes:
        sizes.append(len(text := original(*args, **kwargs)))
        return text

    original = orjson.dumps
    monkeypatch.setattr(orjson, "dumps", dumps)
    for outputs in ({"y": LARGE}, {"y": LARGE, "z": LARGE}):
        for as_rows in (False, True):
            sizes.clear()
            encode(as_rows=as_rows, **outputs)
            assert max(sizes) <= SLICE_ELEMENTS * len(b"24575.875,") + 2
