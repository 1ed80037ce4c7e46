from __future__ import annotations

import struct
from typing import Any

import numpy as np
import orjson
import pytest

from serving.api.open_inference.json_tensors import decode_json, encode_json
from serving.errors import InvalidRequest
from serving.inference.signatures import NUMPY_DTYPES, TensorSpec
from serving.open_inference.tensors import datatype_of, decode_binary, encode_binary
from serving.quoting import quote

INTEGERS = ("UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64")
FLOATS = {"FP16": "DT_HALF", "FP32": "DT_FLOAT", "FP64": "DT_DOUBLE"}
DT = {**{name: f"DT_{name}" for name in INTEGERS}, **FLOATS, "BOOL": "DT_BOOL", "BYTES": "DT_STRING"}


def spec(datatype: str) -> TensorSpec:
    return TensorSpec(name="x", dtype=DT[datatype], shape=None, tensor_name="x:0")


def as_bytes(*elements: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(element)) + element for element in elements)


def refusal(decode, *args):
    with pytest.raises(InvalidRequest) as refused:
        decode(*args)
    assert len(str(refused.value)) < 400
    return str(refused.value)


@pytest.mark.parametrize("datatype", DT)
def test_every_datatype_has_a_numpy_dtype(datatype):
    assert datatype_of(spec(datatype)).name == datatype
    assert datatype_of(spec(datatype)).dtype == NUMPY_DTYPES[DT[datatype]]


def test_a_dtype_without_a_datatype_is_named():
    assert "DT_COMPLEX64" in refusal(datatype_of, TensorSpec("x", "DT_COMPLEX64", (), "x:0"))


@pytest.mark.parametrize("datatype", INTEGERS)
def test_integers_out_of_range_are_refused(datatype):
    limits = np.iinfo(NUMPY_DTYPES[DT[datatype]])
    array = decode_json([limits.min, 1, limits.max], spec(datatype), (3,))
    assert array.dtype == NUMPY_DTYPES[DT[datatype]]
    assert array.tolist() == [limits.min, 1, limits.max]
    for beyond in (limits.min - 1, limits.max + 1):
        message = refusal(decode_json, [1, beyond], spec(datatype), (2,))
        assert f"{datatype} is from {limits.min} to {limits.max}, not {beyond}" in message


@pytest.mark.parametrize("datatype", INTEGERS)
def test_floats_without_a_fraction_are_accepted_as_integers(datatype):
    array = decode_json([[106.0, 1], [-0.0, 2e1]], spec(datatype), (2, 2))
    assert array.dtype == NUMPY_DTYPES[DT[datatype]]
    assert array.tolist() == [[106, 1], [0, 20]]
    for beyond, spelt in ((1e300, "1e+300"), (-1e20, "-1e+20"), (1.8446744073709552e19, "18446744073709551616")):
        assert refusal(decode_json, [1, beyond], spec(datatype), (2,)).endswith(f"not {spelt}")


@pytest.mark.parametrize(
    ("datatype", "element", "spelt"),
    [
        ("UINT8", 1.5, "1.5"),
        ("INT64", 0.25, "0.25"),
        ("UINT8", True, "true"),
        ("INT64", "1", '"1"'),
        ("INT64", None, "null"),
        ("FP32", True, "true"),
        ("FP64", "NaN", '"NaN"'),
        ("FP32", [1], "a list of 1"),
        ("BOOL", 1, "1"),
        ("BYTES", 1, "1"),
        ("BYTES", {"b64": "YQ=="}, "an object"),
    ],
)
def test_an_element_of_another_type_is_refused_at_any_position(datatype, element, spelt):
    good = {"BOOL": True, "BYTES": "a"}.get(datatype, 1)
    for data in ([good, element], [element, good], [[good], [element]]):
        message = refusal(decode_json, data, spec(datatype), (2,))
        assert message.startswith(f"input x: {datatype} takes ")
        assert message.endswith(f"not {spelt}")


def test_floats_accept_any_number_within_their_range():
    assert decode_json([1, 2.5, 2**64 - 1], spec("FP64"), (3,)).tolist() == [1.0, 2.5, 2.0**64]
    assert decode_json([0.1], spec("FP32"), (1,))[0] == np.float32(0.1)
    assert "3.5e+38 is beyond the range of FP32" in refusal(decode_json, [1, 3.5e38], spec("FP32"), (2,))
    assert decode_json([3.5e38], spec("FP64"), (1,)).tolist() == [3.5e38]


def test_fp16_is_binary_only():
    assert "send it as binary data" in refusal(decode_json, [1.0], spec("FP16"), (1,))
    halves = np.array([1.5, np.inf], np.float16)
    assert decode_binary(memoryview(halves.tobytes()), spec("FP16"), (2,)).tolist() == [1.5, np.inf]


@pytest.mark.parametrize(
    ("data", "shape"),
    [
        ([1, 2, 3, 4], (2, 2)),
        ([[1, 2], [3, 4]], (2, 2)),
        ([[[1], [2]], [[3], [4]]], (2, 2, 1)),
        ([7], ()),
        ([], (0,)),
        ([], (0, 5)),
        ([[], []], (2, 0)),
        ([7], (1,) * 64),
    ],
)
def test_data_may_be_flat_or_nested_like_the_shape(data, shape):
    array = decode_json(data, spec("INT32"), shape)
    assert array.shape == shape
    assert array.ravel().tolist() == np.array(data).ravel().tolist()


@pytest.mark.parametrize(
    ("data", "shape", "problem"),
    [
        ([1, 2, 3], (2, 2), "takes 4 elements, flat or nested like it; data has 3, nested like [3]"),
        ([[1, 2], [3, 4]], (4, 1), "takes 4 elements, flat or nested like it; data has 4, nested like [2, 2]"),
        ([[1, 2], [3, 4]], (4,), "nested like [2, 2]"),
        ([[1, 2], [3]], (3,), "differ in length"),
        ([1], (2**63, 2**63), f"takes {2**126} elements"),
        ([], (2**40, 2**40, 0), "no tensor can have the shape"),
        (7, (1,), "data must be a list, not 7"),
        (None, (1,), "data must be a list, not null"),
    ],
)
def test_data_that_does_not_fit_the_shape_is_refused(data, shape, problem):
    assert problem in refusal(decode_json, data, spec("INT32"), shape)


def test_deeply_nested_lists_are_refused():
    data = orjson.loads(b"[" * 1000 + b"1" + b"]" * 1000)
    assert "takes 1 elements" in refusal(decode_json, data, spec("INT32"), (1,))
    data = orjson.loads(b"[1," + b"[" * 1000 + b"]" * 1000 + b"]")
    assert "not a list of 1" in refusal(decode_json, data, spec("INT32"), (1,))


@pytest.mark.parametrize("datatype", [name for name in DT if name != "BYTES"])
def test_binary_data_is_decoded_without_a_copy_and_round_trips(datatype):
    dtype = NUMPY_DTYPES[DT[datatype]]
    array = np.array([[0, 1, 0], [1, 1, 0]]).astype(dtype)
    body = b"odd" + array.tobytes()  # unaligned, like after JSON of any length
    decoded = decode_binary(memoryview(body)[3:], spec(datatype), (2, 3))
    assert decoded.dtype == dtype
    assert decoded.tolist() == array.tolist()
    assert np.shares_memory(decoded, np.frombuffer(body, np.uint8))
    chunk, size = encode_binary(decoded, datatype_of(spec(datatype)))
    assert (b"".join([chunk]), size) == (array.tobytes(), array.nbytes)


def test_binary_floats_keep_every_bit_pattern():
    odd = np.array([np.nan, np.inf, -np.inf, -0.0, 5e-324]).tobytes()
    assert decode_binary(memoryview(odd), spec("FP64"), (5,)).tobytes() == odd


@pytest.mark.parametrize("size", [0, 7, 9, 16])
def test_binary_data_of_the_wrong_length_is_refused(size):
    message = refusal(decode_binary, memoryview(bytes(size)), spec("FP32"), (2, 1))
    assert message == f"input x: FP32 of the shape [2, 1] needs 8 bytes, got {size}"


def test_impossible_shapes_are_refused_before_allocation():
    assert "needs" in refusal(decode_binary, memoryview(b""), spec("FP32"), (2**62, 2**62))
    assert "no tensor can have" in refusal(decode_binary, memoryview(b""), spec("FP32"), (2**62, 2**62, 0))
    assert "cannot hold" in refusal(decode_binary, memoryview(b"1234"), spec("BYTES"), (2**62,))


def test_a_bool_byte_other_than_0_or_1_is_refused():
    assert "0 or 1, not 2" in refusal(decode_binary, memoryview(b"\0\1\2"), spec("BOOL"), (3,))
    assert decode_binary(memoryview(b""), spec("BOOL"), (0,)).tolist() == []


def test_strings_are_bytes_in_binary_data_and_text_in_json():
    elements = [b"", b"\xff\0", b"x" * 300]
    array = decode_binary(memoryview(as_bytes(*elements)), spec("BYTES"), (3, 1))
    assert array.tolist() == [[element] for element in elements]
    chunk, size = encode_binary(array, datatype_of(spec("BYTES")))
    assert (chunk, size) == (as_bytes(*elements), 314)
    assert decode_json([["é", ""]], spec("BYTES"), (1, 2)).tolist() == [["é".encode(), b""]]
    assert encode_json(np.array([["é".encode()], [b""]], object), "x") == ["é", ""]
    assert "not UTF-8" in refusal(encode_json, array, "x")


@pytest.mark.parametrize(
    ("data", "count", "problem"),
    [
        (as_bytes(b"abc"), 2, "7 bytes cannot hold 2"),
        (as_bytes(b"abcdef"), 2, "end before element 1"),
        (as_bytes(b"abc", b"d")[:-1], 2, "element 1 has a length of 1 bytes, but 0 are left"),
        (struct.pack("<I", 2**32 - 1) + b"abcd", 1, "element 0 has a length of 4294967295 bytes, but 4 are left"),
        (as_bytes(b"a", b"b"), 1, "5 bytes are left after 1 elements"),
        (b"\0", 0, "1 bytes are left after 0 elements"),
    ],
)
def test_malformed_binary_strings_are_refused(data, count, problem):
    assert problem in refusal(decode_binary, memoryview(data), spec("BYTES"), (count,))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinities_are_refused_in_json(value):
    for datatype in ("FP32", "FP64"):
        array = np.array([1, value], NUMPY_DTYPES[DT[datatype]])
        assert "request it as binary data" in refusal(encode_json, array, "x")


def test_json_outputs_are_flat_with_the_digits_of_their_dtype():
    array = np.array([[0.1, 2], [3, 4]], np.float32).T  # not contiguous
    text = orjson.dumps(encode_json(array, "x"), option=orjson.OPT_SERIALIZE_NUMPY)
    assert text == b"[0.1,3.0,2.0,4.0]"
    assert encode_json(np.array(3, np.int64), "x").tolist() == [3]
    assert encode_binary(np.array(3, np.int64), datatype_of(spec("INT64")))[1] == 8


def test_quoted_values_are_short():
    assert quote("a" * 10_000) == '"' + "a" * 60 + '"...'
    values: list[Any] = [None, 1.5, True, {}, [1, 2]]
    assert [quote(value) for value in values] == [
        "null",
        "1.5",
        "true",
        "an object",
        "a list of 2",
    ]
