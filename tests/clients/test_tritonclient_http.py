"""The Open Inference Protocol with an independent client, `tritonclient[http]`, against a running service."""

import numpy as np
import pytest
from PIL import Image
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput
from tritonclient.utils import InferenceServerException

from tests.clients.service import COLOURS, pixels
from tests.serving import saved_models
from tests.serving.conftest import Server, encode

LABELS = [b"red", b"green", b"blue"]


@pytest.fixture(scope="module")
def client(service):
    with InferenceServerClient(service.url.removeprefix("http://"), concurrency=4) as client:
        yield client


def tensor(name, array, datatype, *, binary=True):
    made = InferInput(name, list(array.shape), datatype)
    made.set_data_from_numpy(array, binary_data=binary)
    return made


def images(array, **options):
    return tensor("images", array, "UINT8", **options)


def jpegs(*classes):
    files = [encode(Image.new("RGB", (50, 40), COLOURS[class_id]), "JPEG") for class_id in classes]
    return np.array(files, np.object_)


def test_health(client):
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("colours")
    assert client.is_model_ready("colours", "7")
    assert not client.is_model_ready("colours", "8")
    assert not client.is_model_ready("unknown")


def test_not_ready_while_no_model_is_loaded(tmp_path):
    """The model blocks in its warm-up until a file appears."""
    gate = tmp_path / "gate"
    version = saved_models.save_colour_classifier(tmp_path / "models" / "colours" / "1", gate=gate)
    saved_models.write_warmup_records(version, [pixels(0)])
    server = Server(tmp_path / "models", tmp_path / "log")
    try:
        server.wait_for("/readyz", 503)
        with InferenceServerClient(f"127.0.0.1:{server.port}") as client:
            assert client.is_server_live()
            assert not client.is_server_ready()
            assert not client.is_model_ready("colours")
            with pytest.raises(InferenceServerException, match="still being loaded") as refused:
                client.infer("colours", [images(pixels(0))])
            assert refused.value.status() == "503"
            gate.touch()
            server.wait_for("/readyz")
            assert client.is_server_ready()
            assert client.infer("colours", [images(pixels(0))]).as_numpy("label").tolist() == LABELS[:1]
        assert server.stop() == 0
    finally:
        server.process.kill()
        server.process.wait()


def test_metadata(client):
    described = client.get_server_metadata()
    assert described.keys() == {"name", "version", "extensions"}
    assert "binary_tensor_data" in described["extensions"]
    assert client.get_model_metadata("colours") == client.get_model_metadata("colours", "7")
    described = client.get_model_metadata("colours", query_params={"signature_name": "image_bytes"})
    assert described["inputs"] == [{"name": "image_bytes", "datatype": "BYTES", "shape": [-1]}]


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False])
def test_binary_and_json_tensors(client, binary_in, binary_out):
    outputs = [InferRequestedOutput(name, binary_data=binary_out) for name in ("label", "probabilities", "class_id")]
    result = client.infer("colours", [images(pixels(2, 0), binary=binary_in)], outputs=outputs, request_id="r 1")
    response = result.get_response()
    assert (response["id"], response["model_name"], response["model_version"]) == ("r 1", "colours", "7")
    assert [output["name"] for output in response["outputs"]] == ["label", "probabilities", "class_id"]
    assert all(("data" in output) != binary_out for output in response["outputs"])
    assert result.as_numpy("class_id").tolist() == [2, 0]
    assert result.as_numpy("class_id").dtype == np.int64
    assert result.as_numpy("probabilities").dtype == np.float32
    np.testing.assert_allclose(result.as_numpy("probabilities").sum(axis=1), 1, rtol=1e-6)
    labels = [LABELS[2], LABELS[0]] if binary_out else ["blue", "red"]
    assert result.as_numpy("label").tolist() == labels


def test_both_forms_hold_the_same_bits(client):
    """Float32 keeps its digits in JSON; no output is named, so all come, as bytes."""
    array = np.random.default_rng(5).integers(0, 256, (3, 32, 32, 3), np.uint8)
    as_bytes = client.infer("colours", [images(array)])
    wanted = [InferRequestedOutput("probabilities", binary_data=False)]
    as_json = client.infer("colours", [images(array, binary=False)], outputs=wanted)
    np.testing.assert_array_equal(as_bytes.as_numpy("probabilities"), as_json.as_numpy("probabilities"))
    assert {output["name"] for output in as_bytes.get_response()["outputs"]} == {"class_id", "label", "probabilities"}


@pytest.mark.parametrize("binary", [True, False])
def test_several_inputs_of_several_datatypes(client, binary):
    numbers = np.array([[1, 4], [9, 16]], np.float32)
    names = np.array([b"a", "é".encode()], np.object_)
    inputs = [tensor("name_bytes", names, "BYTES", binary=binary), tensor("a", numbers, "FP32", binary=binary)]
    result = client.infer("multi", inputs)
    assert result.as_numpy("root").tolist() == [[1, 2], [3, 4]]
    assert result.as_numpy("blob_bytes").tolist() == names.tolist()
    assert result.as_numpy("dbl").dtype == np.float64
    assert result.as_numpy("flag").dtype == np.bool_


def test_fp16_is_binary_only(client):
    inputs = [tensor("x", np.array([1, 2.5], np.float32), "FP32")]
    result = client.infer("multi", inputs, parameters={"signature_name": "half"})
    assert result.as_numpy("y").dtype == np.float16
    wanted = [InferRequestedOutput("y", binary_data=False)]
    with pytest.raises(InferenceServerException, match="request it as binary data"):
        client.infer("multi", inputs, outputs=wanted, parameters={"signature_name": "half"})


def test_encoded_images_select_another_signature(client):
    inputs = [tensor("image_bytes", jpegs(2, 1, 0), "BYTES")]
    result = client.infer("colours", inputs)  # the input names select the signature
    assert result.as_numpy("label").tolist() == [LABELS[2], LABELS[1], LABELS[0]]


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_compressed_requests(client, algorithm):
    for binary in (True, False):
        result = client.infer(
            "colours",
            [images(pixels(1), binary=binary)],
            request_compression_algorithm=algorithm,
            response_compression_algorithm=algorithm,
        )
        assert result.as_numpy("label").tolist() == [b"green"]


def test_several_requests_at_once(client):
    batches = [[(n + row) % 3 for row in range(n % 4 + 1)] for n in range(30)]
    handles = [
        client.async_infer("colours", [images(pixels(*batch))], request_id=str(n)) for n, batch in enumerate(batches)
    ]
    for n, handle in enumerate(handles):
        result = handle.get_result()
        assert result.get_response()["id"] == str(n)
        assert result.as_numpy("class_id").tolist() == batches[n]


def test_a_timeout_is_heeded_and_other_scheduling_options_are_refused(client):
    result = client.infer("colours", [images(pixels(1))], timeout=10_000_000)
    assert result.as_numpy("label").tolist() == [b"green"]
    with pytest.raises(InferenceServerException, match="deadline") as late:
        client.infer("colours", [images(pixels(1))], timeout=1)
    assert late.value.status() in ("503", "504")
    for options in ({"priority": 1}, {"sequence_id": 3, "sequence_end": True}):
        with pytest.raises(InferenceServerException, match=f"parameter {next(iter(options))} is not supported"):
            client.infer("colours", [images(pixels(1))], **options)


def test_classes_instead_of_numbers(client):
    wanted = [InferRequestedOutput("probabilities", class_count=2)]
    ((first, second),) = client.infer("colours", [images(pixels(2))], outputs=wanted).as_numpy("probabilities")
    assert first.decode().endswith(":2:blue")
    assert second.decode().endswith(":0:red")


@pytest.mark.parametrize(
    ("status", "problem", "call"),
    [
        (
            "400",
            r"expected uint8 \(n, 32, 32, 3\), got uint8 \(1, 31",
            lambda c: c.infer("colours", [images(pixels(0)[:, 1:])]),
        ),
        ("400", "an empty batch", lambda c: c.infer("colours", [images(pixels(0)[:0])])),
        ("400", "the datatype is UINT8", lambda c: c.infer("colours", [tensor("images", pixels(0) / 255, "FP64")])),
        ("400", "needs the input images", lambda c: c.infer("colours", [])),
        ("400", 'has no input "x"', lambda c: c.infer("colours", [tensor("x", pixels(0), "UINT8")])),
        (
            "400",
            "has no signature",
            lambda c: c.infer("colours", [images(pixels(0))], parameters={"signature_name": "x"}),
        ),
        (
            "400",
            'no output "x"',
            lambda c: c.infer("colours", [images(pixels(0))], outputs=[InferRequestedOutput("x")]),
        ),
        ("400", "shared memory is not supported", lambda c: c.infer("colours", [in_shared_memory()])),
        ("404", 'no model "unknown"', lambda c: c.infer("unknown", [images(pixels(0))])),
        ("404", "no version 8 of model colours", lambda c: c.infer("colours", [images(pixels(0))], model_version="8")),
        ("404", 'no model "unknown"', lambda c: c.get_model_metadata("unknown")),
        ("404", "there is nothing at", lambda c: c.get_trace_settings("colours")),
        ("403", "--allow-model-control allows it", lambda c: c.unload_model("colours")),
    ],
)
def test_errors_are_raised_by_the_client(client, status, problem, call):
    with pytest.raises(InferenceServerException, match=problem) as refused:
        call(client)
    assert refused.value.status() == status


def in_shared_memory():
    made = InferInput("images", [1, 32, 32, 3], "UINT8")
    made.set_shared_memory("region", 3072)
    return made
