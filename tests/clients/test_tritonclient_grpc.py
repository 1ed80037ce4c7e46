"""The Open Inference Protocol over gRPC with an independent client, `tritonclient.grpc`, against a running service.

Its extra `tritonclient[grpc]` asks for an older protobuf than TensorFlow's other clients here, so the module runs with
the service's one; `make test-clients` runs it with its own.
"""

import queue
from typing import Any

import numpy as np
import pytest
from tritonclient.grpc import InferenceServerClient, InferInput, InferRequestedOutput
from tritonclient.utils import InferenceServerException

from tests.clients.service import pixels

LABELS = [b"red", b"green", b"blue"]


@pytest.fixture(scope="module")
def client(service):
    with InferenceServerClient(service.grpc_address) as client:
        yield client


def tensor(name, array, datatype):
    made = InferInput(name, list(array.shape), datatype)
    made.set_data_from_numpy(array)
    return made


def images(array):
    return tensor("images", array, "UINT8")


def test_health(client):
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("colours")
    assert client.is_model_ready("colours", "7")


def test_what_an_image_client_asks_before_its_first_inference(client):
    assert "model_configuration" in client.get_server_metadata(as_json=True)["extensions"]
    metadata = client.get_model_metadata("colours", "7")
    assert [(i.name, i.datatype, list(i.shape)) for i in metadata.inputs] == [("images", "UINT8", [-1, 32, 32, 3])]
    config = client.get_model_config("colours").config
    assert (config.name, config.input[0].name, list(config.input[0].dims)) == ("colours", "images", [32, 32, 3])
    assert config.max_batch_size > 0


def test_inference(client):
    outputs = [InferRequestedOutput(name) for name in ("label", "probabilities")]
    result = client.infer("colours", [images(pixels(2, 0))], outputs=outputs, request_id="r 1")
    response = result.get_response()
    assert (response.id, response.model_name, response.model_version) == ("r 1", "colours", "7")
    assert result.as_numpy("label").tolist() == [LABELS[2], LABELS[0]]
    assert result.as_numpy("probabilities").dtype == np.float32
    np.testing.assert_allclose(result.as_numpy("probabilities").sum(axis=1), 1, rtol=1e-6)
    assert result.as_numpy("class_id") is None  # not requested


def test_classification_has_the_labels(client):
    outputs = [InferRequestedOutput("probabilities", class_count=2)]
    ranked = client.infer("colours", [images(pixels(1, 2))], outputs=outputs).as_numpy("probabilities")
    assert ranked.shape == (2, 2)
    best = [text.decode().split(":") for text in ranked[:, 0]]
    assert [(index, label) for _, index, label in best] == [("1", "green"), ("2", "blue")]
    assert all(float(value) > 0.9 for value, _, _ in best)


def test_encoded_images_select_another_signature(client, image_file):
    files = tensor("image_bytes", np.array([image_file.read_bytes()], np.object_), "BYTES")
    assert client.infer("colours", [files]).as_numpy("label").tolist() == [b"blue"]


def test_several_inputs_of_several_datatypes(client):
    numbers = np.array([[1, 4], [9, 16]], np.float32)
    names = np.array([b"a", "é".encode()], np.object_)
    result = client.infer("multi", [tensor("name_bytes", names, "BYTES"), tensor("a", numbers, "FP32")])
    assert result.as_numpy("root").tolist() == [[1, 2], [3, 4]]
    assert result.as_numpy("blob_bytes").tolist() == names.tolist()
    assert result.as_numpy("flag").dtype == np.bool_


def test_concurrent_requests(client):
    responses: queue.SimpleQueue[tuple[int, Any, Any]] = queue.SimpleQueue()
    batches = [[(n + row) % 3 for row in range(n % 4 + 1)] for n in range(20)]
    for n, batch in enumerate(batches):
        client.async_infer(
            "colours",
            [images(pixels(*batch))],
            callback=lambda result, error, n=n: responses.put((n, result, error)),
            request_id=str(n),
        )
    for _ in batches:
        n, result, error = responses.get(timeout=60)
        assert error is None
        assert result.get_response().id == str(n)
        assert result.as_numpy("class_id").tolist() == batches[n]


def test_statistics_count_the_inferences(client):
    def count():
        (statistics,) = client.get_inference_statistics("colours", "7").model_stats
        return statistics.inference_count, statistics.inference_stats.success.count

    before = count()
    client.infer("colours", [images(pixels(0, 1, 2))])
    after = count()
    assert (after[0] - before[0], after[1] - before[1]) == (3, 1)


def test_the_repository_index_lists_the_versions(client):
    models = client.get_model_repository_index().models
    assert {(model.name, model.version, model.state) for model in models} == {
        ("colours", "7", "READY"),
        ("multi", "1", "READY"),
    }


@pytest.mark.parametrize(
    ("status", "problem", "call"),
    [
        ("INVALID_ARGUMENT", r"got uint8 \(1, 31", lambda c: c.infer("colours", [images(pixels(0)[:, 1:])])),
        ("INVALID_ARGUMENT", "an empty batch", lambda c: c.infer("colours", [images(pixels(0)[:0])])),
        ("INVALID_ARGUMENT", 'has no input "x"', lambda c: c.infer("colours", [tensor("x", pixels(0), "UINT8")])),
        ("NOT_FOUND", 'no model "unknown"', lambda c: c.infer("unknown", [images(pixels(0))])),
        ("NOT_FOUND", "no version 8", lambda c: c.infer("colours", [images(pixels(0))], model_version="8")),
        ("NOT_FOUND", 'no model "unknown"', lambda c: c.get_model_metadata("unknown")),
        ("NOT_FOUND", "no version 8", lambda c: c.is_model_ready("colours", "8")),
    ],
)
def test_errors_are_raised_by_the_client(client, status, problem, call):
    with pytest.raises(InferenceServerException, match=problem) as refused:
        call(client)
    assert refused.value.status() == f"StatusCode.{status}"
