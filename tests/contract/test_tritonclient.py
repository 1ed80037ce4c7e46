"""The Open Inference Protocol as an independent client speaks it: `tritonclient[http]`."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput
from tritonclient.utils import InferenceServerException

from tests.serving.conftest import Server, picture

RED = np.zeros((2, 32, 32, 3), np.uint8) + np.array([255, 0, 0], np.uint8)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory, colours: Path, adder: Path) -> Iterator[InferenceServerClient]:
    folder = tmp_path_factory.mktemp("triton")
    shutil.copytree(colours, folder / "models" / "colours" / "7")
    shutil.copytree(adder, folder / "models" / "adder" / "1")
    server = Server(folder / "models", folder / "log")
    server.wait_for("/readyz")
    client = InferenceServerClient(server.url.removeprefix("http://"), concurrency=4)
    yield client
    client.close()
    assert server.stop() == 0


def pixels(images: np.ndarray, *, binary: bool = True) -> InferInput:
    tensor = InferInput("images", list(images.shape), "UINT8")
    tensor.set_data_from_numpy(images, binary_data=binary)
    return tensor


def test_health_and_metadata(client: InferenceServerClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("colours")
    assert client.is_model_ready("colours", "7")
    assert not client.is_model_ready("nobody")
    assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
    metadata = client.get_model_metadata("colours")
    assert metadata["inputs"] == [{"name": "images", "datatype": "UINT8", "shape": [-1, 32, 32, 3]}]


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False])
def test_tensors_as_json_and_as_bytes(client: InferenceServerClient, binary_in: bool, binary_out: bool) -> None:
    outputs = [InferRequestedOutput(name, binary_data=binary_out) for name in ("probabilities", "class_id", "label")]
    result = client.infer("colours", [pixels(RED, binary=binary_in)], outputs=outputs, request_id="r1")
    assert result.get_response()["id"] == "r1"
    assert result.as_numpy("class_id").tolist() == [0, 0]
    assert result.as_numpy("probabilities").shape == (2, 3)
    labels = result.as_numpy("label").tolist()
    assert [label.decode() if isinstance(label, bytes) else label for label in labels] == ["red", "red"]


def test_without_outputs_all_come(client: InferenceServerClient) -> None:
    result = client.infer("colours", [pixels(RED)], model_version="7")
    assert {output["name"] for output in result.get_response()["outputs"]} == {"probabilities", "class_id", "label"}


def test_encoded_pictures_through_another_signature(client: InferenceServerClient) -> None:
    tensor = InferInput("image_bytes", [2], "BYTES")
    tensor.set_data_from_numpy(np.array([picture("blue", kind="JPEG"), picture("green")], object))
    result = client.infer("colours", [tensor], parameters={"signature_name": "image_bytes"})
    assert result.as_numpy("label").tolist() == [b"blue", b"green"]


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_compressed_requests(client: InferenceServerClient, algorithm: str) -> None:
    result = client.infer(
        "colours", [pixels(RED)], request_compression_algorithm=algorithm, response_compression_algorithm=algorithm
    )
    assert result.as_numpy("class_id").tolist() == [0, 0]


def test_several_requests_at_once(client: InferenceServerClient) -> None:
    batches = [np.roll(RED[: n % 2 + 1], n, axis=3) for n in range(40)]
    running = [client.async_infer("colours", [pixels(batch)]) for batch in batches]
    for n, request in enumerate(running):
        assert request.get_result().as_numpy("class_id").tolist() == [n % 3] * (n % 2 + 1)


def test_errors_are_for_people(client: InferenceServerClient) -> None:
    with pytest.raises(InferenceServerException, match=r"expected uint8 \(n, 32, 32, 3\)") as refused:
        client.infer("colours", [pixels(RED[:, :31])])
    assert refused.value.status() == "400"
    with pytest.raises(InferenceServerException, match="Servable not found"):
        client.infer("nobody", [pixels(RED)])
    with pytest.raises(InferenceServerException, match="is no output of it"):
        client.infer("colours", [pixels(RED)], outputs=[InferRequestedOutput("x")])
    with pytest.raises(InferenceServerException, match="classification is not supported"):
        client.infer("colours", [pixels(RED)], outputs=[InferRequestedOutput("label", class_count=2)])
