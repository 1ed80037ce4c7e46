"""The Open Inference Protocol, request by request, against real SavedModels."""

from __future__ import annotations

import gzip
import io
import json
import shutil
import struct
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flask.testing import FlaskClient
from hypothesis import example, given, settings
from hypothesis import strategies as st
from werkzeug.test import TestResponse

from serving.api.flask_app import ServingApp
from serving.api.open_inference.messages import parse as parse_infer
from serving.app import make_app
from serving.errors import InvalidRequest
from serving.inference.signatures import Signature, TensorSpec
from serving.settings import Settings
from tests.serving.conftest import picture
from tests.serving.saved_models import DTYPES, save_echo

LENGTH = "Inference-Header-Content-Length"
PIXELS = np.zeros((2, 32, 32, 3), np.uint8) + np.array([255, 0, 0], np.uint8)
A = {"name": "a", "shape": [1, 2], "datatype": "FP32", "data": [1, 2]}
B = {"name": "b", "shape": [1, 2], "datatype": "FP32", "data": [[10, 20]]}
SUM = {"inputs": [A, B]}


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory, colours: Path, adder: Path) -> ServingApp:
    """The app with `colours` version 7, `adder` version 1 and `echo` version 1."""
    models_dir = tmp_path_factory.mktemp("models")
    shutil.copytree(colours, models_dir / "colours" / "7")
    shutil.copytree(adder, models_dir / "adder" / "1")
    save_echo(models_dir / "echo" / "1")
    app = make_app(Settings(models_dir=models_dir))
    app.inference.repository.load()
    return app


def images(**changes: Any) -> dict[str, Any]:
    tensor = {"name": "images", "shape": list(PIXELS.shape), "datatype": "UINT8", "data": PIXELS.tolist(), **changes}
    return {key: value for key, value in tensor.items() if value is not ...}


def post(client: FlaskClient, model: str, document: Any, binary: Any = b"", **headers: Any) -> TestResponse:
    """Post an inference request; with binary data, the header has the length of the JSON."""
    text = document if isinstance(document, bytes) else json.dumps(document).encode()
    if binary:
        headers.setdefault(LENGTH, str(len(text)))
    return client.post(f"/v2/models/{model}/infer", data=text + binary, headers=headers)


def read(response: TestResponse) -> dict[str, Any]:
    """Return the response's JSON, with the bytes of each binary output as its `data`."""
    assert response.status_code == 200, response.text
    if LENGTH not in response.headers:
        assert response.content_type == "application/json"
        return dict(response.json or {})
    assert response.content_type == "application/octet-stream"
    length = int(response.headers[LENGTH])
    document, rest = json.loads(response.data[:length]), response.data[length:]
    for output in document["outputs"]:
        if "parameters" in output:
            size = output["parameters"]["binary_data_size"]
            assert "data" not in output
            output["data"], rest = rest[:size], rest[size:]
    assert rest == b""
    return dict(document)


def error(response: TestResponse, status: int = 400) -> str:
    assert response.status_code == status, response.text
    assert response.content_type == "application/json"
    assert response.json is not None
    assert response.json.keys() == {"error"}
    return str(response.json["error"])


def test_server_metadata(client: FlaskClient) -> None:
    for path in ("/v2", "/v2/"):
        described = client.get(path).json or {}
        assert described.keys() == {"name", "version", "extensions"}
        assert described["extensions"] == [
            "binary_tensor_data",
            "classification",
            "model_configuration",
            "statistics",
        ]


def test_a_loaded_service_is_live_and_ready(client: FlaskClient) -> None:
    assert client.get("/v2/health/live").json == {"live": True}
    assert client.get("/v2/health/ready").json == {"ready": True}
    for path in ("/v2/models/colours/ready", "/v2/models/colours/versions/7/ready"):
        assert client.get(path).json == {"name": "colours", "ready": True}
    for path in ("/v2/models/unknown/ready", "/v2/models/colours/versions/8/ready"):
        assert "there is no " in error(client.get(path), 404)


def test_a_service_that_is_loading_is_live_and_not_ready(models_dir: Path) -> None:
    client = make_app(Settings(models_dir=models_dir)).test_client()
    assert client.get("/v2/health/live").status_code == 200
    for path in ("/v2/health/ready", "/v2/models/colours/ready", "/v2/models/colours/versions/10/ready"):
        response = client.get(path)
        assert (response.status_code, (response.json or {})["ready"]) == (400, False)
        assert "loa" in (response.json or {})["error"]
    assert client.get("/v2/models/unknown/ready").status_code == 404
    assert "still being loaded" in error(client.get("/v2/models/colours"), 503)
    assert "still being loaded" in error(post(client, "colours", SUM), 503)


def test_a_required_model_that_failed_to_load_makes_the_server_not_ready(models_dir: Path, adder: Path) -> None:
    shutil.copytree(adder, models_dir / "adder" / "1")
    for version in ("2", "10"):
        (models_dir / "colours" / version / "saved_model.pb").write_bytes(b"\xff")
    app = make_app(Settings(models_dir=models_dir, require_models=("colours",)))
    app.inference.repository.load()
    client = app.test_client()
    response = client.get("/v2/health/ready")
    assert (response.status_code, (response.json or {})["ready"]) == (400, False)
    assert "colours: Can't parse" in (response.json or {})["error"]
    assert client.get("/v2/models/adder/ready").status_code == 200
    assert client.get("/v2/models/colours/ready").status_code == 400
    assert read(post(client, "adder", SUM))["outputs"][0]["data"] == [11, 22]


def test_a_process_that_needs_a_restart_is_not_live(models_dir: Path) -> None:
    app = make_app(Settings(models_dir=models_dir))
    thread = threading.Thread(target=lambda: None, name="predictor")
    thread.start()
    thread.join()
    app.liveness.watch_thread(thread)
    response = app.test_client().get("/v2/health/live")
    assert (response.status_code, (response.json or {})["live"]) == (400, False)
    assert "predictor" in (response.json or {})["error"]


def test_model_metadata(client: FlaskClient) -> None:
    for path in ("/v2/models/colours", "/v2/models/colours/versions/7", "/v2/models/colours/versions/007"):
        assert client.get(path).json == {
            "name": "colours",
            "versions": ["7"],
            "platform": "tensorflow_savedmodel",
            "inputs": [{"name": "images", "datatype": "UINT8", "shape": [-1, 32, 32, 3]}],
            "outputs": [
                {"name": "class_id", "datatype": "INT64", "shape": [-1]},
                {"name": "label", "datatype": "BYTES", "shape": [-1]},
                {"name": "probabilities", "datatype": "FP32", "shape": [-1, 3]},
            ],
        }


def test_model_metadata_of_another_signature(client: FlaskClient) -> None:
    described = client.get("/v2/models/colours?signature_name=image_bytes").json or {}
    assert described["inputs"] == [{"name": "image_bytes", "datatype": "BYTES", "shape": [-1]}]
    described = client.get("/v2/models/adder?signature_name=shout").json or {}
    assert described["inputs"] == [{"name": "text", "datatype": "BYTES", "shape": []}]
    described = client.get("/v2/models/echo?signature_name=logarithm").json or {}
    assert described["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1]}]
    assert "it has image_bytes, serving_default" in error(client.get("/v2/models/colours?signature_name=x"))
    assert "DT_COMPLEX64 has no datatype" in error(client.get("/v2/models/echo?signature_name=real"))


@pytest.mark.parametrize("version", ["8", "9" * 18, "0" * 30 + "8"])
def test_an_unknown_version_is_404(client: FlaskClient, version: str) -> None:
    message = f"there is no version {int(version)} of model colours; available: 7"
    for path in ("", "/ready"):
        assert error(client.get(f"/v2/models/colours/versions/{version}{path}"), 404) == message
    assert error(client.post(f"/v2/models/colours/versions/{version}/infer", data=b"{}"), 404) == message


def test_an_unknown_model_is_404(client: FlaskClient) -> None:
    message = 'there is no model "unknown"; available: adder, colours, echo'
    for path in ("", "/ready", "/versions/1"):
        assert error(client.get(f"/v2/models/unknown{path}"), 404) == message


def test_wrong_methods_are_405_and_wrong_paths_404(client: FlaskClient) -> None:
    assert "takes POST, not GET" in error(client.get("/v2/models/colours/infer"), 405)
    assert "takes GET, not POST" in error(client.post("/v2/health/ready"), 405)
    error(client.get("/v2/models"), 404)
    error(client.get("/v2/models/colours/versions"), 404)


def test_json_request_and_response(client: FlaskClient) -> None:
    request = {"id": "x 1", "inputs": [images()], "outputs": [{"name": "label"}, {"name": "class_id"}]}
    assert read(post(client, "colours", request)) == {
        "model_name": "colours",
        "model_version": "7",
        "id": "x 1",
        "outputs": [
            {"name": "label", "datatype": "BYTES", "shape": [2], "data": ["red", "red"]},
            {"name": "class_id", "datatype": "INT64", "shape": [2], "data": [0, 0]},
        ],
    }
    response = read(client.post("/v2/models/adder/versions/1/infer", json=SUM))
    assert response == {
        "model_name": "adder",
        "model_version": "1",
        "outputs": [{"name": "sum", "datatype": "FP32", "shape": [1, 2], "data": [11, 22]}],
    }


def test_binary_request_and_response(client: FlaskClient) -> None:
    tensor = images(data=..., parameters={"binary_data_size": PIXELS.nbytes})
    request = {"inputs": [tensor], "parameters": {"binary_data_output": True}}
    outputs = {output["name"]: output for output in read(post(client, "colours", request, PIXELS.tobytes()))["outputs"]}
    assert np.frombuffer(outputs["class_id"]["data"], "<i8").tolist() == [0, 0]
    assert outputs["label"]["data"] == 2 * (struct.pack("<I", 3) + b"red")
    probabilities = np.frombuffer(outputs["probabilities"]["data"], "<f4").reshape(2, 3)
    assert probabilities.sum(axis=1) == pytest.approx([1, 1])
    assert probabilities.argmax(axis=1).tolist() == [0, 0]


def test_each_output_may_be_binary_or_json(client: FlaskClient) -> None:
    outputs = [{"name": "class_id", "parameters": {"binary_data": True}}, {"name": "label"}]
    by_id = read(post(client, "colours", {"inputs": [images()], "outputs": outputs}))["outputs"]
    assert [output["data"] for output in by_id] == [bytes(16), ["red", "red"]]
    outputs = [{"name": "class_id"}, {"name": "label", "parameters": {"binary_data": False}}]
    request = {"inputs": [images()], "outputs": outputs, "parameters": {"binary_data_output": True}}
    assert [output["data"] for output in read(post(client, "colours", request))["outputs"]] == [
        bytes(16),
        ["red", "red"],
    ]


def test_a_request_without_outputs_gets_all(client: FlaskClient) -> None:
    choices: list[Any] = [[], None]
    for outputs in choices:
        response = read(post(client, "colours", {"inputs": [images()], "outputs": outputs}))
        assert [output["name"] for output in response["outputs"]] == ["class_id", "label", "probabilities"]


def test_every_datatype_goes_through_a_model_unchanged(client: FlaskClient) -> None:
    sent: dict[str, bytes] = {}
    for name, dtype in DTYPES.items():
        if name == "BYTES":
            sent[name] = struct.pack("<I", 2) + b"\xff\0" + struct.pack("<I", 0)
        else:
            sent[name] = np.array([0, 1]).astype(dtype.as_numpy_dtype).tobytes()
    inputs = [
        {"name": name, "shape": [2], "datatype": name, "parameters": {"binary_data_size": len(data)}}
        for name, data in sent.items()
    ]
    request = {"inputs": inputs, "parameters": {"binary_data_output": True}}
    outputs = read(post(client, "echo", request, b"".join(sent.values())))["outputs"]
    assert {output["name"]: output["data"] for output in outputs} == sent
    assert {output["name"]: output["datatype"] for output in outputs} == {name: name for name in DTYPES}
    as_json = [{"name": name} for name in DTYPES if name not in ("FP16", "BYTES")]
    outputs = read(post(client, "echo", {**request, "outputs": as_json, "parameters": {}}, b"".join(sent.values())))[
        "outputs"
    ]
    assert all(output["data"] == [0, 1] for output in outputs)
    refused = post(client, "echo", {"inputs": inputs}, b"".join(sent.values()))
    assert "output FP16: FP16 cannot be sent as JSON; request it as binary data" in error(refused)
    refused = post(client, "echo", {"inputs": inputs, "outputs": [{"name": "BYTES"}]}, b"".join(sent.values()))
    assert "output BYTES has bytes that are not UTF-8" in error(refused)


def test_infinities_are_sent_as_binary_data_only(client: FlaskClient) -> None:
    tensor = {"name": "x", "shape": [2, 1], "datatype": "FP32", "data": [0, 1]}
    request = {"inputs": [tensor], "parameters": {"signature_name": "logarithm"}, "outputs": [{"name": "y"}]}
    assert "NaN or infinity" in error(post(client, "echo", request))
    request["outputs"] = [{"name": "y", "parameters": {"binary_data": True}}, {"name": "rank"}]
    y, rank = read(post(client, "echo", request))["outputs"]
    assert np.frombuffer(y["data"], "<f4").tolist() == [-np.inf, 0]
    assert (rank["shape"], rank["data"]) == ([], [2])


def test_another_signature_with_encoded_images(client: FlaskClient) -> None:
    files = [picture("blue", kind="JPEG"), picture("green", (40, 50))]
    binary = b"".join(struct.pack("<I", len(file)) + file for file in files)
    tensor = {"name": "image_bytes", "shape": [2], "datatype": "BYTES", "parameters": {"binary_data_size": len(binary)}}
    request = {"inputs": [tensor], "parameters": {"signature_name": "image_bytes"}, "outputs": [{"name": "label"}]}
    assert read(post(client, "colours", request, binary))["outputs"][0]["data"] == ["blue", "green"]


def test_a_scalar(client: FlaskClient) -> None:
    tensor = {"name": "text", "shape": [], "datatype": "BYTES", "data": ["grün"]}
    request = {"inputs": [tensor], "parameters": {"signature_name": "shout"}}
    (output,) = read(post(client, "adder", request))["outputs"]
    assert (output["shape"], output["data"]) == ([], ["GRüN"])  # TensorFlow's upper changes ASCII only
    tensor["data"] = [""]
    assert "nothing to shout" in error(post(client, "adder", request))


@pytest.mark.parametrize(("encoding", "compress"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
def test_bodies_may_be_compressed(client: FlaskClient, encoding: str, compress: Any) -> None:
    tensor = images(data=..., parameters={"binary_data_size": PIXELS.nbytes})
    text = json.dumps({"inputs": [tensor]}).encode()
    body = compress(text + PIXELS.tobytes())
    headers = {"Content-Encoding": encoding, LENGTH: str(len(text))}  # the length of the decompressed JSON
    response = read(client.post("/v2/models/colours/infer", data=body, headers=headers))
    assert response["outputs"][0]["data"] == [0, 0]
    for broken in (body[:-5], body + b"x", b"x" + body):
        refused = client.post("/v2/models/colours/infer", data=broken, headers=headers)
        assert f"cannot be decompressed as {encoding}" in error(refused)


def test_a_decompression_bomb_is_413(client: FlaskClient) -> None:
    deflater = zlib.compressobj(wbits=31)
    bomb = b"".join(deflater.compress(bytes(2**20)) for _ in range(101)) + deflater.flush()
    refused = client.post("/v2/models/colours/infer", data=bomb, headers={"Content-Encoding": "gzip"})
    assert "104,857,600 bytes when inflated" in error(refused, 413)


def test_an_unsupported_encoding_is_415(client: FlaskClient) -> None:
    assert 'Content-Encoding "br" is not supported' in error(
        post(client, "adder", SUM, **{"Content-Encoding": "br"}), 415
    )
    assert post(client, "adder", SUM, **{"Content-Encoding": "identity"}).status_code == 200


def test_pixels_may_be_floats_without_a_fraction(client: FlaskClient) -> None:
    floats = images(data=PIXELS.astype(float).tolist())
    assert read(post(client, "colours", {"inputs": [floats]})) == read(post(client, "colours", {"inputs": [images()]}))


@pytest.mark.parametrize("shape", ["nested", "flat"])
def test_an_image_model_takes_what_clients_of_the_protocol_send(client: FlaskClient, shape: str) -> None:
    """A client generated from the protocol's description, as kserve's, knows numbers only, and no signatures.

    It writes integers as floats, has an id in every request, and the optional members as null or empty.
    """
    floats = PIXELS.astype(np.float64)
    data = floats.tolist() if shape == "nested" else floats.ravel().tolist()
    assert b"255.0" in json.dumps(data).encode()
    tensor = images(data=data, parameters=None)
    request = {"id": "29b2b3d4-7d1f", "inputs": [tensor], "parameters": None, "outputs": None}
    sent = {"Content-Type": "application/json", "Accept": "application/json"}
    short: dict[str, Any] = {"id": request["id"], "inputs": [images(data=data)], "parameters": {}, "outputs": []}
    for document in (request, short):
        reply = read(post(client, "colours", document, **sent))
        assert (reply["id"], reply["model_name"], reply["model_version"]) == (request["id"], "colours", "7")
        outputs = {output["name"]: output["data"] for output in reply["outputs"]}
        assert outputs["label"] == ["red", "red"]


def test_the_inputs_select_the_signature(client: FlaskClient) -> None:
    file = picture("blue")
    tensor = {
        "name": "image_bytes",
        "shape": [1],
        "datatype": "BYTES",
        "parameters": {"binary_data_size": len(file) + 4},
    }
    request = {"inputs": [tensor], "parameters": {}, "outputs": [{"name": "label"}]}
    response = read(post(client, "colours", request, struct.pack("<I", len(file)) + file))
    assert response["outputs"][0]["data"] == ["blue"]
    shouted = read(
        post(client, "adder", {"inputs": [{"name": "text", "shape": [], "datatype": "BYTES", "data": ["a"]}]})
    )
    assert shouted["outputs"][0]["data"] == ["A"]
    both = {"inputs": [tensor, images()]}
    assert 'signature "serving_default" has no input "image_bytes"; it has images' in error(
        post(client, "colours", both)
    )


def test_inputs_of_several_signatures_select_the_one_that_has_their_name() -> None:
    files = {"image_bytes": TensorSpec("image_bytes", "DT_STRING", (None,), "x:0")}
    body = b'{"inputs":[{"name":"image_bytes","shape":[1],"datatype":"BYTES","data":["a"]}]}'
    signatures = {name: Signature(name, "", files, files) for name in ("guarded_bytes", "image_bytes")}
    assert parse_infer(body, len(body), "m", signatures).signature == "image_bytes"


def test_inputs_of_several_signatures_select_serving_default_or_none() -> None:
    x = {"x": TensorSpec("x", "DT_FLOAT", (None,), "x:0")}
    body = b'{"inputs":[{"name":"x","shape":[1],"datatype":"FP32","data":[1]}]}'
    signatures = {name: Signature(name, "", x, x) for name in ("half", "serving_default", "twice")}
    assert parse_infer(body, len(body), "m", signatures).signature == "serving_default"
    del signatures["serving_default"]
    as_its_input = {**signatures, "x": Signature("x", "", x, x)}
    assert parse_infer(body, len(body), "m", as_its_input).signature == "x"
    with pytest.raises(InvalidRequest) as refused:
        parse_infer(body, len(body), "m", signatures)
    message = "several signatures have the input x: half, twice; choose one with the parameter signature_name"
    assert str(refused.value) == message


@pytest.mark.parametrize(
    ("document", "problem"),
    [
        (b"", "the first 0 bytes of the body are not valid JSON"),
        (b"{", "the first 1 bytes of the body are not valid JSON"),
        (b'{"inputs": [NaN]}', "of the body are not valid JSON"),
        (b"[]", "expected a JSON object with inputs, got a list of 0"),
        ({}, "inputs must be a list of objects, not null"),
        ({"inputs": {}}, "inputs must be a list of objects, not an object"),
        ({"inputs": [1]}, "inputs must be a list of objects, not a list of 1"),
        ({"inputs": []}, "needs the input images"),
        ({"inputs": [images(name="x" * 1000)]}, '"...; it has images'),
        ({"inputs": [images(name=None)]}, "has no input null; it has images"),
        ({"inputs": [images(name=["images"])]}, "has no input a list of 1"),
        ({"inputs": [images(), images()]}, "input images is repeated"),
        ({"inputs": [images(datatype="FP32")]}, 'the datatype is UINT8, not "FP32"'),
        ({"inputs": [images(datatype=...)]}, "the datatype is UINT8, not null"),
        ({"inputs": [images(shape=...)]}, "the shape must be a list of at most 64 sizes, not null"),
        ({"inputs": [images(shape=[1] * 65)]}, "at most 64 sizes, not a list of 65"),
        ({"inputs": [images(shape=[10**18] * 100_000)]}, "at most 64 sizes, not a list of 100000"),
        ({"inputs": [images(shape=[-1, 32, 32, 3])]}, "must be a whole number, not -1"),
        ({"inputs": [images(shape=[2.0, 32, 32, 3])]}, "must be a whole number, not 2.0"),
        ({"inputs": [images(shape=[True, 32, 32, 3])]}, "must be a whole number, not true"),
        ({"inputs": [images(shape=[10**18, 10**18])]}, "takes 1000000000000000000000000000000000000 elements"),
        ({"inputs": [images(shape=[3, 32, 32, 3])]}, "takes 9216 elements, flat or nested like it; data has 6144"),
        ({"inputs": [images(shape=[1] * 64, data=[1])]}, "expected uint8 (n, 32, 32, 3), got uint8 (1, 1, 1"),
        ({"inputs": [images(shape=[6144], data=PIXELS.ravel().tolist())]}, "expected uint8 (n, 32, 32, 3)"),
        ({"inputs": [images(shape=[0, 32, 32, 3], data=[])]}, "an empty batch cannot be predicted"),
        ({"inputs": [images(data=...)]}, "either data or the parameter binary_data_size"),
        ({"inputs": [images(parameters={"binary_data_size": 0})]}, "binary_data_size, but not both"),
        ({"inputs": [images(data=..., parameters={"binary_data_size": 1})]}, "is 1, but 0 bytes are left"),
        ({"inputs": [images(data="x")]}, 'data must be a list, not "x"'),
        ({"inputs": [images(data=[300] * 6144)]}, "UINT8 is from 0 to 255, not 300"),
        ({"inputs": [images(data=[True] + [1] * 6143)]}, "UINT8 takes whole numbers, not true"),
        ({"inputs": [images(parameters=[])]}, "the parameters of input images must be an object, not a list of 0"),
        ({"inputs": [images(parameters={"shared_memory_region": "x"})]}, "shared memory is not supported"),
        ({"inputs": [images()], "id": 7}, "id must be a string, not 7"),
        ({"inputs": [images()], "parameters": "x"}, "the parameters of the request must be an object"),
        ({"inputs": [images()], "parameters": {"signature_name": 3}}, "signature_name must be a string, not 3"),
        (
            {"inputs": [images()], "parameters": {"signature_name": "x"}},
            'no signature "x"; it has image_bytes, serving',
        ),
        ({"inputs": [images()], "parameters": {"binary_data_output": 1}}, "binary_data_output must be true or false"),
        ({"inputs": [images()], "outputs": 3}, "outputs must be a list of objects, not 3"),
        ({"inputs": [images()], "outputs": ["label"]}, "outputs must be a list of objects"),
        ({"inputs": [images()], "outputs": [{"name": "x"}]}, 'no output "x"; it has class_id, label, probabilities'),
        ({"inputs": [images()], "outputs": [{"name": "label"}] * 2}, "output label is repeated"),
        (
            {"inputs": [images()], "outputs": [{"name": "label", "parameters": {"classification": 2}}]},
            "output label: classification needs numbers, not BYTES",
        ),
        (
            {"inputs": [images()], "outputs": [{"name": "label", "parameters": {"shared_memory_region": "x"}}]},
            "output label: shared memory is not supported",
        ),
        (
            {"inputs": [images()], "outputs": [{"name": "label", "parameters": {"binary_data": "yes"}}]},
            'binary_data must be true or false, not "yes"',
        ),
    ],
)
def test_an_invalid_request_is_400_with_the_reason(client: FlaskClient, document: Any, problem: str) -> None:
    message = error(post(client, "colours", document))
    assert problem in message
    assert len(message) < 500


@pytest.mark.parametrize(
    ("size", "sent", "problem"),
    [
        (PIXELS.nbytes, PIXELS.nbytes - 1, "binary_data_size is 6144, but 6143 bytes are left after the JSON"),
        (PIXELS.nbytes, PIXELS.nbytes + 1, "1 bytes after the JSON belong to no input"),
        (PIXELS.nbytes - 1, PIXELS.nbytes, "UINT8 of the shape [2, 32, 32, 3] needs 6144 bytes, got 6143"),
        (-1, PIXELS.nbytes, "binary_data_size is -1"),
        (True, PIXELS.nbytes, "binary_data_size is true"),
        (6144.0, PIXELS.nbytes, "binary_data_size is 6144.0"),
        ("6144", PIXELS.nbytes, 'binary_data_size is "6144"'),
        (2**63, PIXELS.nbytes, "binary_data_size is 9223372036854775808"),
    ],
)
def test_binary_data_of_the_wrong_length_is_refused(client: FlaskClient, size: Any, sent: int, problem: str) -> None:
    request = {"inputs": [images(data=..., parameters={"binary_data_size": size})]}
    assert problem in error(post(client, "colours", request, bytes(sent)))


def test_binary_data_of_no_input_is_refused(client: FlaskClient) -> None:
    assert "4 bytes after the JSON belong to no input" in error(post(client, "adder", SUM, b"1234"))
    assert "of the body are not valid JSON" in error(post(client, "adder", SUM, b"1234", **{LENGTH: "0"}))


@pytest.mark.parametrize("header", ["", "x", "-1", "1e3", " ", "²", "+5", "9" * 5000])
def test_a_header_that_is_not_a_length_is_refused(client: FlaskClient, header: str) -> None:
    response = post(client, "adder", SUM, **{LENGTH: header.encode().decode("latin-1")})
    assert "must be a number of bytes" in error(response)


def test_a_header_length_beyond_the_body_is_refused(client: FlaskClient) -> None:
    text = json.dumps(SUM).encode()
    assert f"but the body has {len(text)} bytes" in error(
        post(client, "adder", text, b"", **{LENGTH: str(len(text) + 1)})
    )
    assert post(client, "adder", text, b"", **{LENGTH: str(len(text))}).status_code == 200


def test_requests_are_counted_by_model(app: ServingApp) -> None:
    client = app.test_client()
    post(client, "adder", SUM)
    post(client, "adder", {})
    post(client, "made up", SUM)
    page = client.get("/metrics").text
    route = "/v2/models/<model>/infer"
    assert f'serving_requests_total{{model="adder",route="{route}",status="200"}}' in page
    assert f'serving_requests_total{{model="adder",route="{route}",status="400"}}' in page
    assert f'serving_requests_total{{model="",route="{route}",status="404"}}' in page


KEYS = st.sampled_from(["name", "shape", "datatype", "data", "parameters", "inputs", "outputs", "id", "x"])
VALUES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
    | st.sampled_from(["a", "b", "sum", "FP32", "BYTES", "serving_default", "shout", [1, 2], 2**63, 2**64 - 1, -1])
)
ANYTHING = st.recursive(
    VALUES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=5), max_leaves=10
)
PARAMETERS = st.dictionaries(
    st.sampled_from(
        [
            "binary_data_size",
            "binary_data",
            "binary_data_output",
            "signature_name",
            "shared_memory_region",
            "classification",
            "content_type",
            "timeout",
            "sequence_id",
            "x",
        ]
    ),
    VALUES | st.sampled_from([0, 4, 8, 16, "np", 10**7]),
    max_size=3,
)
SHAPES = st.lists(st.integers(0, 3) | st.integers(0, 2**64 - 1), max_size=3) | st.sampled_from(
    [[1, 2], [1] * 64, [1] * 65]
)


def almost(request: dict[str, Any], **parts: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """A valid object with some members replaced and others added."""
    changes = st.fixed_dictionaries({}, optional={name: part | ANYTHING for name, part in parts.items()})
    return changes.map(lambda change: {**request, **change})


TENSORS = st.sampled_from([A, B]).flatmap(
    lambda tensor: almost(tensor, shape=SHAPES, data=st.lists(VALUES, max_size=3), parameters=PARAMETERS)
)
REQUESTS = almost(
    SUM,
    inputs=st.lists(TENSORS, max_size=3),
    parameters=PARAMETERS,
    outputs=st.lists(almost({"name": "sum"}, parameters=PARAMETERS), max_size=2),
    id=VALUES,
)


@given(
    document=(REQUESTS | ANYTHING).map(lambda value: json.dumps(value).encode()) | st.binary(max_size=60),
    tail=st.binary(max_size=20),
    header=st.none() | st.just("right") | st.integers(-2, 200).map(str) | st.text(st.characters(max_codepoint=255)),
    encoding=st.sampled_from(["", "identity", "gzip", "deflate", "br"]) | st.text(st.characters(max_codepoint=255)),
    is_compressed=st.booleans(),
)
@example(document=json.dumps(SUM).encode(), tail=b"", header=None, encoding="gzip", is_compressed=True)
@settings(max_examples=500, deadline=None, derandomize=True)
def test_no_request_causes_a_server_error(
    app: ServingApp, document: bytes, tail: bytes, header: str | None, encoding: str, is_compressed: bool
) -> None:
    body = document + tail
    if is_compressed:
        compressors: dict[str, Callable[[bytes], bytes]] = {"gzip": gzip.compress, "deflate": zlib.compress}
        body = compressors.get(encoding, bytes)(body)
    environ: dict[str, Any] = {
        "CONTENT_LENGTH": str(len(body)),
        "wsgi.input": io.BytesIO(body),
        "HTTP_CONTENT_ENCODING": encoding,
    }
    if header is not None:
        environ["HTTP_INFERENCE_HEADER_CONTENT_LENGTH"] = str(len(document)) if header == "right" else header
    response = app.test_client().open("/v2/models/adder/infer", method="POST", environ_overrides=environ)
    if response.status_code == 200:
        assert read(response)["model_name"] == "adder"
    else:
        # A timeout of microseconds is over before the model is called.
        assert response.status_code in (400, 415, 503, 504), response.text
        error(response, response.status_code)
