"""The signatures of a real export, served: probabilities alone for numpy clients, and heat maps, by every protocol."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

from client import Client, GrpcClient
from tests.contract.conftest import Served
from tests.serving.conftest import Server
from training import export
from training.data.shapes import CLASS_NAMES, draw_shapes

IMAGES = draw_shapes(30, seed=11).images
SAME = 1e-5


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, shapes: Served) -> Iterator[Served]:
    """The run of `shapes`, exported with --default-outputs probabilities --explain, and served."""
    folder = tmp_path_factory.mktemp("alone")
    version = export(shapes.run, folder / "models", default_outputs="probabilities", explain=True)
    server = Server(folder / "models", folder / "log")
    server.wait_for("/readyz")
    yield Served(server, shapes.run, version)
    assert server.stop() == 0


@pytest.fixture(scope="module")
def expected(shapes: Served) -> np.ndarray:
    """The probabilities of the images, as the SavedModel with all outputs returns them."""
    loaded = tf.saved_model.load(str(shapes.version))
    probabilities: np.ndarray = loaded.signatures["serving_default"](images=tf.constant(IMAGES))[
        "probabilities"
    ].numpy()
    assert len(set(probabilities.argmax(axis=1))) > 4
    return probabilities


def predict(served: Served, **document: Any) -> list[Any]:
    response = httpx.post(f"{served.server.url}/v1/models/{served.model}:predict", json=document, timeout=60)
    assert response.status_code == 200, response.text
    predictions: list[Any] = response.json()["predictions"]
    return predictions


def call_grpc(served: Served, signature: str) -> dict[str, np.ndarray]:
    request = predict_pb2.PredictRequest()
    request.model_spec.name = served.model
    request.model_spec.signature_name = signature
    request.inputs["images"].CopyFrom(tf.make_tensor_proto(IMAGES))
    with grpc.insecure_channel(f"127.0.0.1:{served.server.grpc_port}") as channel:
        response = prediction_service_pb2_grpc.PredictionServiceStub(channel).Predict(request, timeout=60)
    return {name: tf.make_ndarray(tensor) for name, tensor in response.outputs.items()}


def infer_v2(served: Served, tensor: Any, *, binary: bytes = b"", **fields: Any) -> dict[str, np.ndarray]:
    document = json.dumps({"inputs": [tensor], **fields}).encode()
    headers = {"Inference-Header-Content-Length": str(len(document))} if binary else {}
    url = f"{served.server.url}/v2/models/{served.model}/infer"
    response = httpx.post(url, content=document + binary, headers=headers, timeout=60)
    assert response.status_code == 200, response.text
    return {output["name"]: np.reshape(output["data"], output["shape"]) for output in response.json()["outputs"]}


def test_a_numpy_client_gets_the_class_by_argmax(alone: Served, shapes: Served, expected: np.ndarray) -> None:
    """As in the tutorials of TensorFlow Serving: of rows that are objects, argmax would be 0 for every image."""
    for rows in (
        predict(alone, instances=IMAGES.tolist()),
        predict(shapes, instances=IMAGES.tolist(), signature_name="probabilities"),
    ):
        assert [np.argmax(row) for row in rows] == expected.argmax(axis=1).tolist()
        np.testing.assert_allclose(rows, expected, atol=SAME)
    objects = predict(shapes, instances=IMAGES.tolist())
    assert {np.argmax(row) for row in objects} == {0}
    scaled = {"instances": (IMAGES[:1] / 255).tolist()}  # as resnet_client.py sends them
    refused = httpx.post(f"{alone.server.url}/v1/models/{alone.model}:predict", json=scaled)
    assert refused.status_code == 400


def test_a_grpc_client_reads_the_probabilities_by_name(alone: Served, shapes: Served, expected: np.ndarray) -> None:
    for served in (alone, shapes):
        for signature in ("", "serving_default", "probabilities"):
            outputs = call_grpc(served, signature)
            np.testing.assert_allclose(outputs["probabilities"], expected, atol=SAME)
    assert call_grpc(alone, "").keys() == {"probabilities"}


def encode(image: np.ndarray, kind: str, size: tuple[int, int]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).resize(size, Image.Resampling.NEAREST).save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize(("kind", "size"), [("PNG", (32, 32)), ("PNG", (96, 96)), ("BMP", (32, 32))])
def test_uploads_and_clients_have_labels_with_either_default(
    alone: Served, shapes: Served, kind: str, size: tuple[int, int]
) -> None:
    files = [encode(image, kind, size) for image in IMAGES]
    results = []
    for served in (alone, shapes):
        url, address = served.server.url, f"127.0.0.1:{served.server.grpc_port}"
        with Client(url) as client, GrpcClient(address, model=served.model) as grpc_client:
            results += [client.predict(files), grpc_client.predict(files)]
    for predictions in results:
        for prediction, first in zip(predictions, results[0], strict=True):
            assert list(prediction.probabilities) == list(CLASS_NAMES)
            assert prediction.label == CLASS_NAMES[prediction.class_id]
            assert prediction.confidence == max(prediction.probabilities.values())
            assert prediction.class_id == first.class_id


def test_the_client_sends_pixels_to_either_default(alone: Served, expected: np.ndarray) -> None:
    with GrpcClient(f"127.0.0.1:{alone.server.grpc_port}", model=alone.model) as client:
        predictions = client.predict(list(IMAGES))
    assert [prediction.class_id for prediction in predictions] == expected.argmax(axis=1).tolist()
    assert {prediction.label for prediction in predictions} <= set(CLASS_NAMES)


def test_the_page_describes_either_default(alone: Served, shapes: Served) -> None:
    models = [httpx.get(served.server.url + "/models.json").json()[0] for served in (alone, shapes)]
    assert [model.pop("explains") for model in models] == [True, False]
    assert models[0] == models[1]
    assert models[0]["problem"] is None
    assert models[0]["class_names"] == list(CLASS_NAMES)


def test_the_open_inference_protocol_chooses_the_plain_signatures_by_their_inputs(
    alone: Served, shapes: Served, expected: np.ndarray
) -> None:
    for served, names in ((alone, {"probabilities"}), (shapes, {"probabilities", "class_id", "label"})):
        pixels = {"name": "images", "shape": IMAGES.shape, "datatype": "UINT8", "data": IMAGES.tolist()}
        assert infer_v2(served, pixels).keys() == names
        np.testing.assert_allclose(infer_v2(served, pixels)["probabilities"], expected, atol=SAME)
        png = encode(IMAGES[0], "PNG", (32, 32))
        files = {
            "name": "image_bytes",
            "shape": [1],
            "datatype": "BYTES",
            "parameters": {"binary_data_size": 4 + len(png)},
        }
        outputs = infer_v2(served, files, binary=len(png).to_bytes(4, "little") + png)
        assert outputs.keys() == {"probabilities", "class_id", "label"}
        np.testing.assert_allclose(outputs["probabilities"], expected[:1], atol=SAME)


def test_heat_maps_are_the_same_by_every_protocol(alone: Served, expected: np.ndarray) -> None:
    loaded = tf.saved_model.load(str(alone.version))
    outputs = {name: each.numpy() for name, each in loaded.signatures["explain"](images=tf.constant(IMAGES)).items()}
    assert outputs["heat_map"].shape == IMAGES.shape[:3]
    assert outputs["class_id"].tolist() == expected.argmax(axis=1).tolist()
    rows = predict(alone, instances=IMAGES.tolist(), signature_name="explain")
    tensor = {"name": "images", "shape": IMAGES.shape, "datatype": "UINT8", "data": IMAGES.tolist()}
    v2 = infer_v2(alone, tensor, parameters={"signature_name": "explain"})
    for heat_map, class_id in (
        (np.array([row["heat_map"] for row in rows]), [row["class_id"] for row in rows]),
        (v2["heat_map"], v2["class_id"].tolist()),
        (call_grpc(alone, "explain")["heat_map"], call_grpc(alone, "explain")["class_id"].tolist()),
    ):
        np.testing.assert_allclose(heat_map, outputs["heat_map"], atol=1e-3)
        assert class_id == outputs["class_id"].tolist()


def test_no_signature_of_an_export_has_rows_that_influence_each_other(alone: Served) -> None:
    """Random images, alone and together: also the heat maps do not depend on the others of a batch."""
    (version,) = httpx.get(f"{alone.server.url}/v1/models/{alone.model}").json()["model_version_status"]
    assert (version["state"], version["status"]["error_message"]) == ("AVAILABLE", "")
