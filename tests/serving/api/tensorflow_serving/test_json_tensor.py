from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from serving.api.tensorflow_serving import json_tensor
from serving.api.tensorflow_serving.json_document import parse_document
from serving.api.tensorflow_serving.json_response import encode_outputs
from serving.api.tensorflow_serving.json_tensor import decode_inputs
from serving.errors import InvalidRequest
from serving.inference.signatures import NUMPY_DTYPES, Signature, TensorSpec

NUMERIC = ["DT_FLOAT", "DT_DOUBLE", "DT_HALF", "DT_BOOL"] + [
    f"DT_{sign}INT{bits}" for sign in ("", "U") for bits in (8, 16, 32, 64)
]


def spec(dtype: str, name: str = "x") -> TensorSpec:
    return TensorSpec(name, dtype, None, f"{name}:0")


def signature(**dtypes: str) -> Signature:
    specs = {name: spec(dtype, name) for name, dtype in sorted(dtypes.items())}
    return Signature("any", "tensorflow/serving/predict", specs, specs)


def decode(body: str | bytes, **dtypes: str) -> dict[str, np.ndarray]:
    return decode_inputs(parse_document(body.encode() if isinstance(body, str) else body), signature(**dtypes))


def refusal(body: str | bytes, **dtypes: str) -> str:
    with pytest.raises(InvalidRequest) as refused:
        decode(body, **dtypes)
    return str(refused.value)


@pytest.mark.parametrize(
    "members",
    [
        '"b64":"aGk=","b64":"eW8="',
        '"b64":"aGk=" , "b64" : "aGk="',
        '"b64":{},"b64":"eW8="',
        '"b64":["}"],"b64":"eW8="',
        '"\\u006264":"aGk=","b64":"eW8="',
        '"b64":"a\\"}","b64":"eW8="',
    ],
)
def test_an_object_that_repeats_b64_is_not_base64(members: str) -> None:
    body = f'{{"inputs":[{{"b64":"aGk="}},{{{members}}}]}}'
    assert refusal(body, x="DT_STRING").endswith("not formatted correctly for base64 data")
    whole = '{"inputs":[{"b64":"aGk=","b64":"eW8="}]}'
    assert refusal(whole, x="DT_STRING") == (
        'JSON Value: {\n    "b64": "aGk=",\n    "b64": "eW8="\n} not formatted correctly for base64 data'
    )


def outcome(convert: Any, *arguments: Any, **options: Any) -> Any:
    try:
        return convert(*arguments, **options)
    except InvalidRequest as refused:
        return str(refused)


@pytest.mark.parametrize("dtype", NUMERIC)
def test_numbers_are_converted_to_the_inputs_dtype(dtype: str) -> None:
    elements = "[[true,false],[false,true]]" if dtype == "DT_BOOL" else "[[1,0],[0,1]]"
    for body in (f'{{"inputs":{elements}}}', f'{{"instances":{elements}}}'):
        array = decode(body, x=dtype)["x"]
        assert array.dtype == NUMPY_DTYPES[dtype]
        assert array.tolist() == [[1, 0], [0, 1]]


def test_rows_and_columns_of_several_inputs() -> None:
    rows = decode('{"instances":[{"a":[1,2],"b":"x"},{"b":"y","a":[3,4]}]}', a="DT_FLOAT", b="DT_STRING")
    columns = decode('{"inputs":{"b":["x","y"],"a":[[1,2],[3,4]],"more":0}}', a="DT_FLOAT", b="DT_STRING")
    for arrays in (rows, columns):
        assert arrays["a"].tolist() == [[1, 2], [3, 4]]
        assert arrays["b"].tolist() == [b"x", b"y"]
        assert list(arrays) == ["a", "b"]


@pytest.mark.parametrize(
    ("body", "shape"),
    [
        ('{"inputs":3}', ()),
        ('{"inputs":[]}', (0,)),
        ('{"inputs":[[],[]]}', (2, 0)),
        ('{"instances":[3]}', (1,)),
        ('{"instances":[[]]}', (1, 0)),
        ('{"instances":[{"x":[[1]]},{"x":[[2]]}]}', (2, 1, 1)),
    ],
)
def test_shapes_are_those_of_the_lists(body: str, shape: tuple[int, ...]) -> None:
    assert decode(body, x="DT_FLOAT")["x"].shape == shape


@pytest.mark.parametrize(
    ("text", "data"),
    [
        ("aGVsbG8=", b"hello"),
        ("aGVsbG8", b"hello"),
        ("aGVsbG8.", b"hello"),
        ("aGVs\\nbG8 =\\t", b"hello"),
        ("", b""),
        ("//4=", b"\xff\xfe"),
        ("//5=", b"\xff\xfe"),  # unused bits of the last symbol are ignored
    ],
)
def test_base64_is_decoded_like_by_abseil(text: str, data: bytes) -> None:
    assert decode(f'{{"instances":[{{"b64":"{text}"}}]}}', x="DT_STRING")["x"].tolist() == [data]
    assert decode(f'{{"inputs":{{"b64":"{text}"}}}}', x="DT_STRING")["x"].item() == data


@pytest.mark.parametrize("text", ["@@@@", "abcde", "_-_-", "aGVsbG8==", "aGV=sbG8", "é", "=", "a"])
def test_invalid_base64_is_refused(text: str) -> None:
    assert refusal(f'{{"inputs":{{"b64":"{text}"}}}}', x="DT_STRING") == "Unable to base64 decode"


def test_strings_and_base64_may_be_mixed() -> None:
    body = b'{"instances":["caf\xc3\xa9",{"b64":"//4="},"caf\xe9","a\\u0000b"]}'
    assert decode(body, x="DT_STRING")["x"].tolist() == [b"caf\xc3\xa9", b"\xff\xfe", b"caf\xe9", b"a\0b"]


def test_nan_and_infinities_are_converted() -> None:
    array = decode('{"instances":[NaN,Infinity,-Inf,1e39]}', x="DT_FLOAT")["x"]
    np.testing.assert_array_equal(array, [np.nan, np.inf, -np.inf, np.inf])


def in_element(index: int, message: str, key: str = "") -> str:
    where = f" key: {key}" if key else ""
    return f"Failed to process element: {index}{where} of 'instances' list. Error: INVALID_ARGUMENT: {message}"


@pytest.mark.parametrize(
    ("dtype", "element", "message"),
    [
        ("DT_UINT8", "1.0", "JSON Value: 1.0 Type: Number is not of expected type: uint8"),
        ("DT_UINT8", "1e2", "JSON Value: 100.0 Type: Number is not of expected type: uint8"),
        ("DT_UINT8", "true", "JSON Value: true Type: True is not of expected type: uint8"),
        ("DT_UINT8", "NaN", "JSON Value:  Type: Number is not of expected type: uint8"),
        ("DT_UINT8", "null", "JSON Value: null Type: Null is not of expected type: uint8"),
        ("DT_UINT8", "256", "JSON Value: 256 is out of range for uint8: 0 to 255"),
        ("DT_UINT8", "-1", "JSON Value: -1 is out of range for uint8: 0 to 255"),
        ("DT_UINT8", "2147483648", "JSON Value: 2147483648 Type: Number is not of expected type: uint8"),
        ("DT_INT8", "128", "JSON Value: 128 is out of range for int8: -128 to 127"),
        ("DT_INT16", "-32769", "JSON Value: -32769 is out of range for int16: -32768 to 32767"),
        ("DT_INT32", "2147483648", "JSON Value: 2147483648 Type: Number is not of expected type: int32"),
        ("DT_UINT32", "-1", "JSON Value: -1 Type: Number is not of expected type: uint32"),
        ("DT_UINT64", "-1", "JSON Value: -1 Type: Number is not of expected type: uint64"),
        (
            "DT_INT64",
            "9223372036854775808",
            "JSON Value: 9223372036854775808 Type: Number is not of expected type: int64",
        ),
        ("DT_FLOAT", '"1"', 'JSON Value: "1" Type: String is not of expected type: float'),
        ("DT_FLOAT", "false", "JSON Value: false Type: False is not of expected type: float"),
        ("DT_HALF", '"x"', 'JSON Value: "x" Type: String is not of expected type: half'),
        ("DT_BOOL", "1", "JSON Value: 1 Type: Number is not of expected type: bool"),
        ("DT_STRING", "1", "JSON Value: 1 Type: Number is not of expected type: string"),
        ("DT_STRING", "null", "JSON Value: null Type: Null is not of expected type: string"),
        ("DT_COMPLEX64", "1", "Conversion of JSON Value: 1 to type: complex64"),
        ("DT_BFLOAT16", "1", "Conversion of JSON Value: 1 to type: bfloat16"),
        ("DT_UINT8", '[{"a":1}]', 'JSON Value: {\n    "a": 1\n} Type: Object is not of expected type: uint8'),
        (
            "DT_STRING",
            '[{"b64":5}]',
            'JSON Value: {\n    "b64": 5\n} not formatted correctly for base64 data',
        ),
    ],
)
def test_an_invalid_element_is_quoted(dtype: str, element: str, message: str) -> None:
    assert refusal(f'{{"instances":[{element}]}}', x=dtype) == in_element(0, message)
    assert refusal(f'{{"inputs":[{element}]}}', x=dtype) == message


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ("[[1,2],[3]]", "Encountered list at unexpected size: 1 at level: 1 expected size: 2"),
        ("[[1,2],3]", "JSON Value: 3 found at incorrect level: 2 in the JSON DOM. Expected at level: 2"),
        ("[1,[2]]", "Encountered list at unexpected level: 1 expected < 1"),
        ("[[],[1]]", "Encountered list at unexpected size: 1 at level: 1 expected size: 0"),
        ("[" * 70 + "1" + "]" * 70, "input x: expected float of any shape, got 70 dimensions"),
        ("[" * 300 + "1" + "]" * 300, "tensor parsing error: x"),
        ("[" * 1000 + "1" + "]" * 1000, "tensor parsing error: x"),
    ],
)
def test_ragged_lists_are_refused_with_their_level(inputs: str, message: str) -> None:
    assert refusal(f'{{"inputs":{inputs}}}', x="DT_FLOAT") == message


@pytest.mark.parametrize("element", ["1", "NaN", '"x"'])
@pytest.mark.parametrize("depth", [62, 63, 64, 65, 253, 254, 255, 256, 299, 300])
def test_lists_at_and_beyond_the_maximum_depth(depth: int, element: str) -> None:
    value = "[" * depth + element + "]" * depth
    for body in (f'{{"instances":{value}}}', f'{{"inputs":{value}}}'):
        got = outcome(decode, body, x="DT_INT32")
        if element != "1" or depth > 64:
            assert isinstance(got, str)
        elif depth < 64:
            assert got["x"].shape == (1,) * depth


NO_FLOAT = 'JSON Value: "a" Type: String is not of expected type: float'


@pytest.mark.parametrize(
    ("instances", "message"),
    [
        ("null", "JSON Value: {\n    \"instances\": null\n} Expecting 'instances' to be an list/array"),
        ("{}", "JSON Value: {\n    \"instances\": {}\n} Expecting 'instances' to be an list/array"),
        ("[]", "JSON Value: {\n    \"instances\": []\n} No values in 'instances' array"),
        ('[{"x":1},[1]]', "Expecting object but got list at item 1 of input list"),
        ('[{"x":1},1]', "Expecting object but got list at item 1 of input list"),
        ('[1,{"x":1}]', "Expecting value/list but got object at item 1 of input list"),
        ("[{}]", "Failed to process element: 0 of 'instances' list. JSON object: {} keys must be equal to: x"),
        ('[{"x":1},{"y":1}]', in_element(1, "JSON object: does not have named input: y", key="y")),
        ('[{"x":1},{"x":"a"}]', in_element(1, NO_FLOAT, key="x")),
        ("[[1,2],[3]]", in_element(1, "Expecting tensor size: 2 but got: 1")),
        ("[[[1,2,3],[4,5,6]],[[1,2],[3,4],[5,6]]]", in_element(1, "Expecting shape [2,3] but got: [3,2]")),
        ('[1,"a",{"x":1}]', in_element(1, NO_FLOAT)),  # the first error in row order is reported
    ],
)
def test_invalid_rows_are_named_by_position(instances: str, message: str) -> None:
    assert refusal(f'{{"instances":{instances}}}', x="DT_FLOAT") == message


def test_several_inputs_must_be_named() -> None:
    dtypes = {"a": "DT_FLOAT", "b": "DT_FLOAT"}
    assert refusal('{"instances":[1]}', **dtypes) == (
        "instances is a plain list, but expecting list of objects as multiple input tensors required as per "
        "tensorinfo_map"
    )
    assert refusal('{"inputs":[1]}', **dtypes) == (
        "inputs is a plain value/list, but expecting an object as multiple input tensors required as per tensorinfo_map"
    )
    assert refusal('{"inputs":{"a":1}}', **dtypes) == "Missing named input: b in 'inputs' object."
    assert refusal('{"instances":[{"a":1}]}', **dtypes) == (
        "Failed to process element: 0 of 'instances' list. JSON object: {\n    \"a\": 1\n} keys must be equal to: a,b"
    )


def test_error_messages_are_valid_utf8() -> None:
    for body in (b'{"instances":[{"\xff":1}]}', b'{"inputs":["\xff"]}'):
        assert refusal(body, x="DT_FLOAT").encode("utf-8")


def arrays(dtype: str) -> st.SearchStrategy[np.ndarray]:
    shapes = hnp.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=4)
    elements = st.binary(max_size=20) if dtype == "DT_STRING" else None
    return hnp.arrays(NUMPY_DTYPES[dtype], shapes, elements=elements)


@settings(max_examples=300)
@given(st.sampled_from([*NUMERIC, "DT_STRING"]), st.sampled_from(["x", "x_bytes"]), st.data())
def test_encoded_outputs_decode_to_the_same_arrays(dtype: str, name: str, data: st.DataObject) -> None:
    array = data.draw(arrays(dtype))
    shape = array.shape
    if dtype == "DT_HALF":  # valid in requests only
        columns = json.dumps({"inputs": array.tolist()}).encode()
        rows = columns.replace(b"inputs", b"instances")
    else:
        out = {name: array}
        columns = encode_outputs(out, signature(**{name: dtype}), as_rows=False).replace(b"outputs", b"inputs", 1)
        rows = columns.replace(b"inputs", b"instances", 1)
        if shape and shape[0]:
            response = encode_outputs(out, signature(**{name: dtype}), as_rows=True)
            assert response.replace(b"predictions", b"instances", 1) == rows
    if 0 in shape:
        shape = shape[: shape.index(0) + 1]  # JSON has no dimensions below an empty list
    for body in (columns, rows) if shape and shape[0] else (columns,):
        back = decode(body, **{name: dtype})[name]
        assert back.dtype == array.dtype
        np.testing.assert_array_equal(back, array.reshape(shape))


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-300, 300)
    | st.integers(-(2**65), 2**65)
    | st.floats()
    | st.text(max_size=5)
    | st.fixed_dictionaries({"b64": st.text("ab=+ ", max_size=6) | st.integers()}),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.builds(lambda item, count: [item] * count, inner, st.integers(1, 3))
        | st.dictionaries(st.sampled_from(["x", "y", "b64"]), inner, max_size=3)
    ),
    max_leaves=12,
)


@settings(max_examples=300)
@given(st.sampled_from([*NUMERIC, "DT_STRING", "DT_COMPLEX64", "DT_RESOURCE"]), VALUES)
def test_any_json_is_an_array_or_an_invalid_request(dtype: str, value: Any) -> None:
    for form in ("instances", "inputs"):
        document = parse_document(json.dumps({form: value}).encode())
        for names in (["x"], ["x", "y"]):
            got = outcome(decode_inputs, document, signature(**dict.fromkeys(names, dtype)))
            assert isinstance(got, str) or all(array.dtype == NUMPY_DTYPES[dtype] for array in got.values())


@settings(max_examples=300)
@given(st.sampled_from([*NUMERIC, "DT_STRING"]), VALUES)
def test_the_fast_path_and_the_fallback_agree(dtype: str, value: Any) -> None:
    value = parse_document(json.dumps(value).encode())
    fast = json_tensor._convert(value, spec(dtype))
    walked = outcome(json_tensor._walk, value, spec(dtype))
    if fast is None:
        assert isinstance(walked, str) or walked.dtype.kind == "O" or walked.size == 0
    else:
        assert fast.dtype == walked.dtype
        np.testing.assert_array_equal(fast, walked)


def test_images_keep_their_pixels() -> None:
    images = np.arange(2 * 32 * 32 * 3, dtype=np.uint32).astype(np.uint8).reshape(2, 32, 32, 3)
    body = json.dumps({"instances": images.tolist()})
    np.testing.assert_array_equal(decode(body, images="DT_UINT8")["images"], images)
    files = [base64.b64encode(image.tobytes()).decode() for image in images]
    body = json.dumps({"instances": [{"image_bytes": {"b64": file}} for file in files]})
    assert decode(body, image_bytes="DT_STRING")["image_bytes"].tolist() == [image.tobytes() for image in images]
