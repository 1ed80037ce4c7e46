"""The Open Inference Protocol, request by request."""

from __future__ import annotations

import gzip
import json
import math
import shutil
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flask import Flask
from flask.testing import FlaskClient
from hypothesis import given, settings
from hypothesis import strategies as st
from werkzeug.test import TestResponse

from serving.app import create_app
from serving.settings import Settings
from tests.serving.conftest import picture

RED = np.zeros((2, 32, 32, 3), np.uint8) + np.array([255, 0, 0], np.uint8)
SUM = [
    {"name": "a", "shape": [1, 2], "datatype": "FP32", "data": [1, 2]},
    {"name": "b", "shape": [1, 2], "datatype": "FP32", "data": [[10, 20]]},
]


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory, colours: Path, adder: Path) -> Flask:
    models_dir = tmp_path_factory.mktemp("v2")
    shutil.copytree(colours, models_dir / "colours" / "7")
    shutil.copytree(adder, models_dir / "adder" / "1")
    app = create_app(Settings(models_dir=models_dir))
    app.extensions["repository"].load()
    return app


def images(**changes: Any) -> dict[str, Any]:
    return {"name": "images", "shape": list(RED.shape), "datatype": "UINT8", "data": RED.tolist(), **changes}


def infer(client: FlaskClient, model: str, document: Any, binary: bytes = b"", **headers: str) -> TestResponse:
    text = document if isinstance(document, bytes) else json.dumps(document).encode()
    if binary:
        headers["Inference-Header-Content-Length"] = str(len(text))
    return client.post(f"/v2/models/{model}/infer", data=text + binary, headers=headers)


def test_server_and_health(client: FlaskClient) -> None:
    described = client.get("/v2").json or {}
    assert described["extensions"] == ["binary_tensor_data"]
    assert client.get("/v2/health/live").json == {"live": True}
    assert client.get("/v2/health/ready").json == {"ready": True}


def test_before_the_models_are_loaded(models_dir: Path) -> None:
    client = create_app(Settings(models_dir=models_dir)).test_client()
    assert client.get("/v2/health/live").status_code == 200
    for path in ("/v2/health/ready", "/v2/models/colours/ready"):
        answer = client.get(path)
        assert (answer.status_code, (answer.json or {})["ready"]) == (400, False)
    assert infer(client, "colours", {"inputs": []}).status_code == 503


def test_the_metadata(client: FlaskClient) -> None:
    expected = {
        "name": "colours",
        "versions": ["7"],
        "platform": "tensorflow_savedmodel",
        "inputs": [{"name": "images", "datatype": "UINT8", "shape": [-1, 32, 32, 3]}],
    }
    for path in ("/v2/models/colours", "/v2/models/colours/versions/7"):
        described = client.get(path).json or {}
        outputs = {output.pop("name"): output for output in described.pop("outputs")}
        assert described == expected
        assert outputs["label"] == {"datatype": "BYTES", "shape": [-1]}
        assert outputs["probabilities"] == {"datatype": "FP32", "shape": [-1, 3]}
    for path in ("/v2/models/m", "/v2/models/colours/versions/8", "/v2/models/colours/versions/x", "/v2/x"):
        answer = client.get(path)
        assert answer.status_code == 404
        assert (answer.json or {}).keys() == {"error"}
    assert client.get("/v2/models/colours/ready").json == {"name": "colours", "ready": True}
    assert client.get("/v2/models/colours/versions/8/ready").status_code == 404


def test_json_in_json_out(client: FlaskClient) -> None:
    answer = infer(client, "colours", {"id": "x1", "inputs": [images()], "outputs": [{"name": "label"}]})
    assert answer.json == {
        "model_name": "colours",
        "model_version": "7",
        "id": "x1",
        "outputs": [{"name": "label", "datatype": "BYTES", "shape": [2], "data": ["red", "red"]}],
    }
    answer = infer(client, "adder", {"inputs": SUM})
    assert (answer.json or {})["outputs"] == [{"name": "sum", "datatype": "FP32", "shape": [1, 2], "data": [11, 22]}]


def test_binary_in_binary_out(client: FlaskClient) -> None:
    tensor = images(parameters={"binary_data_size": RED.nbytes})
    del tensor["data"]
    document = {"inputs": [tensor], "parameters": {"binary_data_output": True}}
    answer = infer(client, "colours", document, RED.tobytes())
    assert answer.mimetype == "application/octet-stream"
    length = int(answer.headers["Inference-Header-Content-Length"])
    outputs = json.loads(answer.data[:length])["outputs"]
    rest, tensors = answer.data[length:], {}
    for output in outputs:
        size = output["parameters"]["binary_data_size"]
        tensors[output["name"]], rest = rest[:size], rest[size:]
    assert rest == b""
    assert np.frombuffer(tensors["class_id"], "<i8").tolist() == [0, 0]
    assert np.frombuffer(tensors["probabilities"], "<f4").reshape(2, 3).sum(axis=1) == pytest.approx([1, 1])
    assert tensors["label"] == 2 * (struct.pack("<I", 3) + b"red")


def test_outputs_can_be_mixed(client: FlaskClient) -> None:
    outputs = [{"name": "class_id", "parameters": {"binary_data": True}}, {"name": "label"}]
    answer = infer(client, "colours", {"inputs": [images()], "outputs": outputs})
    length = int(answer.headers["Inference-Header-Content-Length"])
    document = json.loads(answer.data[:length])
    assert document["outputs"][0]["parameters"] == {"binary_data_size": 16}
    assert document["outputs"][1]["data"] == ["red", "red"]
    assert len(answer.data) == length + 16


def test_another_signature_with_encoded_pictures(client: FlaskClient) -> None:
    files = [picture("blue", kind="JPEG"), picture("green")]
    binary = b"".join(struct.pack("<I", len(file)) + file for file in files)
    tensor = {
        "name": "image_bytes",
        "shape": [2],
        "datatype": "BYTES",
        "parameters": {"binary_data_size": len(binary)},
    }
    document = {"inputs": [tensor], "parameters": {"signature_name": "image_bytes"}, "outputs": [{"name": "label"}]}
    answer = infer(client, "colours", document, binary)
    assert (answer.json or {})["outputs"][0]["data"] == ["blue", "green"]
    shout = {"inputs": [{"name": "text", "shape": [], "datatype": "BYTES", "data": ["grüß"]}]}
    answer = infer(client, "adder", {**shout, "parameters": {"signature_name": "shout"}})
    assert answer.status_code == 200


@pytest.mark.parametrize(("encoding", "compress"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
def test_bodies_may_be_compressed(client: FlaskClient, encoding: str, compress: Any) -> None:
    body = compress(json.dumps({"inputs": SUM}).encode())
    headers = {"Content-Encoding": encoding}
    assert client.post("/v2/models/adder/infer", data=body, headers=headers).status_code == 200
    for broken in (body[:-5], b"x" + body):
        answer = client.post("/v2/models/adder/infer", data=broken, headers=headers)
        assert (answer.status_code, "inflated" in (answer.json or {})["error"]) == (400, True)


BINARY = {"binary_data_size": RED.nbytes}


@pytest.mark.parametrize(
    ("document", "problem"),
    [
        (b"{", "no JSON"),
        (b"[]", "JSON object"),
        ({}, "expected inputs"),
        ({"inputs": {}}, "expected inputs"),
        ({"inputs": [1]}, "expected inputs"),
        ({"inputs": []}, "needs the input images"),
        ({"inputs": [images(name="x")]}, "is no input of it: images"),
        ({"inputs": [images(name=None)]}, "is no input of it"),
        ({"inputs": [images(), images()]}, "is there twice"),
        ({"inputs": [images(datatype="FP32")]}, "expected the datatype UINT8, got 'FP32'"),
        ({"inputs": [images(shape=None)]}, "expected the shape"),
        ({"inputs": [images(shape=[-1])]}, "expected the shape"),
        ({"inputs": [images(shape=[2.0])]}, "expected the shape"),
        ({"inputs": [images(shape=[10**9, 10**9, 10**9])]}, "needs 1000000000000000000000000000 elements"),
        ({"inputs": [images(shape=[3, 32, 32, 3])]}, "needs 9216 elements"),
        ({"inputs": [images(shape=[6144])]}, "needs 6144 elements"),
        ({"inputs": [images(shape=[6144], data=RED.ravel().tolist())]}, "expected uint8 (n, 32, 32, 3)"),
        ({"inputs": [images(shape=[0, 32, 32, 3], data=[])]}, "no rows"),
        ({"inputs": [images(data=None)]}, "expected the data as a list"),
        ({"inputs": [images(data="x")]}, "expected the data as a list"),
        ({"inputs": [images(data=[[1], [2, 3]])]}, "not all of one length"),
        ({"inputs": [images(data=["1"] * 6144)]}, "expected whole numbers"),
        ({"inputs": [images(data=[1.0] * 6144)]}, "expected whole numbers"),
        ({"inputs": [images(data=[True] * 6144)]}, "expected whole numbers"),
        ({"inputs": [images(data=[None] * 6144)]}, "expected whole numbers"),
        ({"inputs": [images(data=[300] * 6144)]}, "from 0 to 255"),
        ({"inputs": [images(data=[-1] * 6144)]}, "from 0 to 255"),
        ({"inputs": [images(parameters=[])]}, "must be an object"),
        ({"inputs": [images(parameters={"shared_memory_region": "x"})]}, "shared memory is not supported"),
        ({"inputs": [images(parameters={"binary_data_size": 5})]}, "binary_data_size must be from 0 to the 0 bytes"),
        ({"inputs": [images()], "outputs": 3}, "expected outputs"),
        ({"inputs": [images()], "outputs": [{"name": "x"}]}, "is no output of it: class_id, label, probabilities"),
        (
            {"inputs": [images()], "outputs": [{"name": "label", "parameters": {"classification": 2}}]},
            "classification is not supported",
        ),
        ({"inputs": [images()], "parameters": {"signature_name": "x"}}, "has no signature x; it has image_bytes, serv"),
        ({"inputs": [images()], "parameters": {"signature_name": 3}}, "must be a string"),
    ],
)
def test_a_bad_request_is_told_what_is_wrong(client: FlaskClient, document: Any, problem: str) -> None:
    answer = infer(client, "colours", document)
    assert answer.status_code == 400
    assert problem in (answer.json or {})["error"]


def without_data(**parameters: Any) -> dict[str, Any]:
    tensor = images(parameters=parameters)
    del tensor["data"]
    return {"inputs": [tensor]}


@pytest.mark.parametrize(
    ("size", "sent", "problem"),
    [
        (RED.nbytes, RED.nbytes - 1, "binary_data_size must be from 0 to the 6143 bytes"),
        (RED.nbytes, RED.nbytes + 1, "1 bytes of binary data belong to no input"),
        (RED.nbytes - 1, RED.nbytes - 1, "needs 6144 bytes, got 6143"),
        (-1, RED.nbytes, "binary_data_size must be"),
        (True, RED.nbytes, "binary_data_size must be"),
        ("6144", RED.nbytes, "binary_data_size must be"),
    ],
)
def test_binary_data_have_to_be_exactly_as_long_as_needed(
    client: FlaskClient, size: Any, sent: int, problem: str
) -> None:
    answer = infer(client, "colours", without_data(binary_data_size=size), bytes(sent))
    assert (answer.status_code, problem in (answer.json or {})["error"]) == (400, True), answer.json


@pytest.mark.parametrize(
    ("binary", "problem"),
    [
        (struct.pack("<I", 3) + b"abc", "cannot hold 2 strings"),
        (struct.pack("<I", 3) + b"abc" + struct.pack("<I", 9) + b"ab", "string 1 is longer than the data"),
        (struct.pack("<I", 5) + b"abcde", "the data ends before string 1"),
        (2 * struct.pack("<I", 0) + b"rest", "4 bytes are left after 2 strings"),
        (struct.pack("<I", 2**32 - 1) + b"abcdefgh", "string 0 is longer"),
    ],
)
def test_strings_have_to_fill_their_bytes(client: FlaskClient, binary: bytes, problem: str) -> None:
    parameters = {"binary_data_size": len(binary)}
    tensor = {"name": "image_bytes", "shape": [2], "datatype": "BYTES", "parameters": parameters}
    document = {"inputs": [tensor], "parameters": {"signature_name": "image_bytes"}}
    answer = infer(client, "colours", document, binary)
    assert (answer.status_code, problem in (answer.json or {})["error"]) == (400, True), answer.json


@pytest.mark.parametrize("header", ["x", "-1", "99999999", "1e3", "²", ""])
def test_the_header_has_to_be_a_length(client: FlaskClient, header: str) -> None:
    headers = {"Inference-Header-Content-Length": header.encode("utf-8").decode("latin-1")}
    answer = client.post("/v2/models/adder/infer", data=json.dumps({"inputs": SUM}), headers=headers)
    assert answer.status_code == 400


def test_too_large_for_its_datatype(client: FlaskClient) -> None:
    tensor = {"name": "a", "shape": [1, 2], "datatype": "FP32", "data": [1, 1e39]}
    answer = infer(client, "adder", {"inputs": [tensor, SUM[1]]})
    assert "too large for FP32" in (answer.json or {})["error"]
    assert math.isfinite(1e39)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["name", "shape", "datatype", "data", "parameters", "inputs", "outputs", "id", "x"]),
            inner | st.sampled_from(["a", "b", "sum", "FP32", "BYTES", [1, 2]]),
            max_size=6,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(
    document=st.fixed_dictionaries({"inputs": st.lists(anything)}, optional={"parameters": anything}), tail=st.binary()
)
def test_no_request_is_the_services_fault(app: Flask, document: Any, tail: bytes) -> None:
    text = json.dumps(document).encode()
    for headers in ({}, {"Inference-Header-Content-Length": str(len(text))}):
        answer = app.test_client().post("/v2/models/adder/infer", data=text + tail, headers=headers)
        assert answer.status_code in (200, 400)
