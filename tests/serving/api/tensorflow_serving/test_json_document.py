from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.api.tensorflow_serving.json_document import document_error, parse_document, quote_json, type_name
from serving.errors import InvalidRequest


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "The document is empty"),
        (b" \n ", "The document is empty. at offset: 3"),
        (b"\xef\xbb\xbf", "The document is empty. at offset: 3"),
        (b"hello", "Invalid value. at offset: 0"),
        (b'{"instances":[1,],}', "Invalid value. at offset: 16"),
        (b'\xef\xbb\xbf{"a" 1}', "Missing a colon after a name of object member. at offset: 8"),
        (b'{"instances": [1,2', "Missing a comma or ']' after an array element. at offset: 18"),
        (b'{"a":1} x', "The document root must not be followed by other values. at offset: 8"),
        (b'{"a":1}\0', "The document root must not be followed by other values. at offset: 7"),
        (b"[1e400]", "Number too big to be stored in double. at offset: 1"),
        (b"[" + b"9" * 5000 + b"]", "Number too big to be stored in double. at offset: 1"),
        (b'["\\ud800"]', "The surrogate pair in string is invalid. at offset: 2"),
        # A low surrogate without the high one in front encodes no character either; the real server accepts it.
        (b'["\\ude00"]', "The surrogate pair in string is invalid. at offset: 2"),
        (b'["a\\ude00\\ud83d"]', "The surrogate pair in string is invalid. at offset: 3"),
        (b'{"\\udfff":1}', "The surrogate pair in string is invalid. at offset: 2"),
        (b'["a\nb"]', "Invalid escape character in string. at offset: 3"),
        (b'{"a\x1f":1}', "Invalid escape character in string. at offset: 3"),
        (b'{"\xff":"\x01"}', "Invalid escape character in string. at offset: 6"),
        (b'{"a":"\xff"', "Missing a comma or '}' after an object member. at offset: 8"),
    ],
)
def test_invalid_json_is_refused_with_rapidjsons_message(body: bytes, message: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        parse_document(body)
    assert str(refusal.value) == f"JSON Parse error: {message}"


def test_nan_and_infinities_are_numbers() -> None:
    values = parse_document(b'{"instances":[NaN,Infinity,Inf,-Infinity,-Inf,1]}')["instances"]
    assert math.isnan(values[0])
    assert values[1:] == [math.inf, math.inf, -math.inf, -math.inf, 1]


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_integers_of_any_size_are_read_by_both_parsers(mark: bytes) -> None:
    assert parse_document(mark + b"[18446744073709551615,-9223372036854775808]") == [2**64 - 1, -(2**63)]
    beyond = parse_document(mark + b"[18446744073709551616,-9223372036854775809,1" + b"0" * 307 + b"]")
    assert list(map(float, beyond)) == [2.0**64, -(2.0**63), 1e307]


@pytest.mark.parametrize(
    ("body", "document"),
    [
        (b'{"instances":[1],"instances":[2]}', {"instances": [1]}),
        (b'{"inputs":{"a":1,"a":2}}', {"inputs": {"a": 1}}),
        (b'{"instances":[{"a":1,"a":2},{"a":3}]}', {"instances": [{"a": 1}, {"a": 3}]}),
        (b'{"inputs":{"\\u0061":1,"a":2}}', {"inputs": {"a": 1}}),
        (b'{"inputs":{"inputs":[1]}}', {"inputs": {"inputs": [1]}}),  # not repeated: at different levels
        (b'{"inputs":["inputs","inputs"]}', {"inputs": ["inputs", "inputs"]}),
    ],
)
def test_the_first_of_equal_keys_counts(body: bytes, document: object) -> None:
    assert parse_document(body) == document


def test_a_document_with_many_keys_is_parsed_in_linear_time() -> None:
    keys = [f'"key{index}":{index}' for index in range(100_000)]
    document = parse_document(f'{{{",".join(keys)},"key0":"again"}}'.encode())
    assert document["key0"] == 0
    assert document["key99999"] == 99_999


def test_bytes_that_are_not_utf8_are_kept() -> None:
    document = parse_document(b'{"inputs":["caf\xe9","\\u00e9",NaN]}')
    assert document["inputs"][0].encode("utf-8", "surrogateescape") == b"caf\xe9"
    assert document["inputs"][1] == "é"


@pytest.mark.parametrize("brackets", [2_000, 100_000, 5_000_000])
def test_deep_nesting_is_refused(brackets: int) -> None:
    for body in (b"[" * brackets + b"]" * brackets, b"[" * brackets, b'{"a":' * brackets):
        with pytest.raises(InvalidRequest, match="nested deeper than 300 levels"):
            parse_document(body)


def outcome(body: bytes) -> str:
    try:
        parse_document(body)
    except InvalidRequest as refusal:
        return str(refusal)
    return "JSON Parse error: none"


@given(st.binary(max_size=200) | st.text('[]{}",:0123456789.eE+-NaInftyrul \\').map(str.encode))
def test_any_body_is_a_document_or_an_invalid_request(body: bytes) -> None:
    assert outcome(body).startswith("JSON Parse error: ")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(), inner, max_size=5),
)


@given(JSON)
def test_valid_json_is_parsed_like_by_python(document: object) -> None:
    text = json.dumps(document)
    assert parse_document(text.encode()) == document
    assert parse_document(b"\xef\xbb\xbf" + text.encode()) == document


@pytest.mark.parametrize(
    ("value", "quoted"),
    [
        (None, "null"),
        (True, "true"),
        (2**63, "9223372036854775808"),
        (2**64, "18446744073709552000.0"),
        (100.0, "100.0"),
        (-0.0, "-0.0"),
        (1.5e-6, "0.0000015"),
        (1e-7, "1e-7"),
        (1e20, "100000000000000000000.0"),
        (1.5e21, "1.5e21"),
        (math.nan, ""),
        ([1, math.inf, 2], "[1, "),
        ('a\x1f"/é', '"a\\u001F\\"/é"'),
        ("\udcff", '"?"'),
        ([], "[]"),
        ({}, "{}"),
        ([[1, 2], [3]], "[[1, 2], [3]]"),
        ({"a": [1, {"b": None}], "c": {}}, '{\n    "a": [1, {\n        "b": null\n    }],\n    "c": {}\n}'),
    ],
)
def test_values_are_quoted_like_by_rapidjson(value: object, quoted: str) -> None:
    assert quote_json(value) == quoted


def test_a_quoted_document_is_truncated_to_256_bytes() -> None:
    document = {"instances": list(range(1000))}
    assert str(document_error(document, "is odd")) == f"JSON Value: {quote_json(document)[:256]} is odd"
    assert len(str(document_error(["é" * 500], "is odd")).encode()) == 256 + len("JSON Value:  is odd")
    assert len(quote_json(["é" * 500]).encode()) == 1004


def test_a_value_nested_too_deep_to_quote_is_an_invalid_request() -> None:
    with pytest.raises(InvalidRequest):
        quote_json(parse_document(b'{"a":' * 1_000 + b"1" + b"}" * 1_000))


def test_types_have_rapidjsons_names() -> None:
    values: list[Any] = [None, True, False, {}, [], "x", 1, 1.5]
    names = [type_name(value) for value in values]
    assert names == ["Null", "True", "False", "Object", "Array", "String", "Number", "Number"]
