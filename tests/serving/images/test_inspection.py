from __future__ import annotations

import base64
import json
import shutil
import struct
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
import tensorflow as tf
from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

from image_formats.content import read_header
from serving.errors import InvalidRequest, TooLarge
from serving.images.inspection import (
    IMAGES_AT_ONCE,
    DecodeEstimate,
    InspectedPredictor,
    check_encoded_images,
)
from serving.images.limits import ImageLimits, decode_cost, decode_seconds
from serving.inference.saved_model import SavedModelPredictor
from serving.inference.signatures import Signature
from tests.serving import saved_models
from tests.serving.conftest import Server, picture
from tests.serving.image_files import bmp, chunk, gif, jpeg_of_scans, png, webp_canvas

pytestmark = pytest.mark.slow

LIMITS = ImageLimits(max_pixels=1_000_000, max_side=5_000)


def strings(*elements: bytes) -> np.ndarray:
    array = np.empty(len(elements), object)
    array[:] = elements
    return array


def cost_of(data: bytes) -> int:
    header = read_header(data)
    assert header is not None
    return decode_cost(header, decoder="tensorflow")


def test_the_memory_of_a_few_images_is_summed() -> None:
    small, large = picture("red"), picture("red", (900, 700))
    both = cost_of(small) + cost_of(large)
    for arrays in ([strings(small, large)], [strings(small), strings(large)], [strings(small, large).reshape(2, 1)]):
        assert check_encoded_images(arrays, LIMITS).memory_bytes == both


def test_only_images_decoded_at_once_count() -> None:
    image = picture("red", (900, 700))
    cost = check_encoded_images([strings(*[image] * 50)], LIMITS).memory_bytes
    assert cost == IMAGES_AT_ONCE * cost_of(image) + (50 - IMAGES_AT_ONCE) * len(image)


def test_other_strings_cost_nothing() -> None:
    array = strings(b"", b"BMW and Benz build cars in the south of Germany.", b"\xff\xfe\xfd", b"\x89PNG")
    assert check_encoded_images([array, np.zeros(3)], LIMITS) == DecodeEstimate(0, 0)


def test_the_time_of_all_images_is_summed() -> None:
    header = read_header(picture("red", (900, 700)))
    assert header is not None
    estimate = check_encoded_images([strings(*[picture("red", (900, 700))] * 3)], LIMITS)
    assert estimate.seconds == pytest.approx(3 * decode_seconds(header))


def test_the_error_names_the_index_of_the_image() -> None:
    with pytest.raises(TooLarge, match="image 1: the image has 1 x 5001 pixels"):
        check_encoded_images([strings(picture("red"), png(1, 5_001))], LIMITS)
    with pytest.raises(InvalidRequest, match="image 2: the JPEG file has more than 100 scans"):
        check_encoded_images([strings(b"", b"x" * 50, jpeg_of_scans(200))], LIMITS)


def test_repeated_references_to_one_image_are_checked_once() -> None:
    array = np.empty(1_000_000, object)
    array[:] = [jpeg_of_scans(100)] * len(array)
    started_s = time.perf_counter()
    assert check_encoded_images([array], LIMITS).memory_bytes > 0
    assert time.perf_counter() - started_s < 10  # checking each reference would take minutes


class CountingPredictor:
    """Counts its calls, and returns no outputs."""

    def __init__(self, signatures: Mapping[str, Signature]) -> None:
        self.signatures = signatures
        self.calls = 0

    def predict(
        self,
        signature: str,  # noqa: ARG002
        inputs: Mapping[str, np.ndarray],  # noqa: ARG002
        *,
        deadline_s: float | None = None,  # noqa: ARG002
    ) -> dict[str, np.ndarray]:
        self.calls += 1
        return {}


def test_strings_are_checked_before_the_inner_predictor_is_called(colours: Path) -> None:
    inner = CountingPredictor(SavedModelPredictor(colours).signatures)
    predictor = InspectedPredictor(inner, LIMITS)
    assert predictor.signatures == inner.signatures
    with pytest.raises(TooLarge):
        predictor.predict("image_bytes", {"image_bytes": strings(png(1, 5_001))})
    assert inner.calls == 0
    predictor.predict("image_bytes", {"image_bytes": strings(png(1, 5_000))})
    predictor.predict(
        "serving_default", {"images": strings(png(1, 5_001))}
    )  # not a string input: the inner predictor must refuse it
    predictor.predict("image_bytes", {})
    predictor.predict("unknown", {})
    assert inner.calls == 4


def test_the_inner_predictor_gives_the_outputs(colours: Path) -> None:
    inner = SavedModelPredictor(colours)
    inputs = {"image_bytes": strings(picture("red"), picture("blue", (50, 60), "JPEG"))}
    outputs = InspectedPredictor(inner, LIMITS).predict("image_bytes", inputs)
    for name, expected in inner.predict("image_bytes", inputs).items():
        np.testing.assert_array_equal(outputs[name], expected)


# File and expected statuses by name.
HOSTILE = {
    "tall png": (png(1, 50_000_000, rows=1), 413),
    "wide png": (png(50_000_000, 1), 413),
    "large png": (png(60_000, 60_000), 413),
    "scans of a large jpeg": (jpeg_of_scans(206, size=(7_000, 7_000)), 400),
    "fewer scans of a large jpeg": (jpeg_of_scans(99, size=(7_000, 7_000)), 400),
    "scans of a small jpeg": (jpeg_of_scans(5_000), 400),
    "arithmetic scans": (jpeg_of_scans(5_000).replace(b"\xff\xc2", b"\xff\xca", 1), 400),
    "scans behind garbage": (jpeg_of_scans(900, between=b"\0\xff\0\xff\xff"), 400),
    "gif": (gif((65_000, 65_000), 1), 413),
    "bmp": (bmp(40_000, 40_000), 413),
    "webp": (webp_canvas(16_000, 16_000), 413),
}
# Formats that only TensorFlow decodes.
HOSTILE_AS_TENSORS = {
    "gif of many frames": (gif((1_000, 1_000), 60), 413),
    "webp of many frames": (webp_canvas(1_000, 1_000, frames=60), 413),
    "png with text": (png(8, 8, extra=chunk(b"zTXt", b"k\0\0" + bytes(8_000)) * 5, rows=8), 413),
}


class ImageSender:
    """Sends an encoded image over every protocol; each method returns an HTTP status."""

    def __init__(self, server: Server) -> None:
        self.http = httpx.Client(base_url=server.url, timeout=60)
        channel = grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}")
        self.stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)

    def form(self, data: bytes) -> int:
        return self.http.post("/predict", files={"image": ("a", data)}).status_code

    def body(self, data: bytes) -> int:
        return self.http.post("/predict", content=data, headers={"Content-Type": "image/any"}).status_code

    def base64_row(self, data: bytes) -> int:
        row = {"image_bytes": {"b64": base64.b64encode(data).decode()}}
        document = {"signature_name": "image_bytes", "instances": [row]}
        return self.http.post("/v1/models/colours:predict", json=document).status_code

    def base64_columns(self, data: bytes) -> int:
        column = [{"b64": base64.b64encode(element).decode()} for element in (picture("red"), data)]
        document = {"signature_name": "image_bytes", "inputs": {"image_bytes": column}}
        return self.http.post("/v1/models/colours:predict", json=document).status_code

    def v2_binary(self, data: bytes) -> int:
        binary = struct.pack("<I", len(data)) + data
        tensor: dict[str, Any] = {"name": "image_bytes", "shape": [1], "datatype": "BYTES"}
        tensor |= {"parameters": {"binary_data_size": len(binary)}}
        head = json.dumps({"inputs": [tensor], "parameters": {"signature_name": "image_bytes"}}).encode()
        return self.http.post(
            "/v2/models/colours/infer",
            content=head + binary,
            headers={"Inference-Header-Content-Length": str(len(head))},
        ).status_code

    def v2_json(self, data: bytes) -> int:
        tensor = {"name": "image_bytes", "shape": [1], "datatype": "BYTES", "data": [data.decode()]}
        document = {"inputs": [tensor], "parameters": {"signature_name": "image_bytes"}}
        return self.http.post("/v2/models/colours/infer", json=document).status_code

    def grpc(self, data: bytes) -> int:
        request = predict_pb2.PredictRequest()
        request.model_spec.name, request.model_spec.signature_name = "colours", "image_bytes"
        request.inputs["image_bytes"].CopyFrom(tf.make_tensor_proto([data]))
        try:
            self.stub.Predict(request, timeout=60)
        except grpc.RpcError as error:
            return {grpc.StatusCode.INVALID_ARGUMENT: 400, grpc.StatusCode.RESOURCE_EXHAUSTED: 413}[error.code()]
        return 200


UPLOADS = ("form", "body")
TENSORS = ("base64_row", "base64_columns", "v2_binary", "grpc")


def peak_bytes(process_id: int) -> int:
    (line,) = (line for line in Path(f"/proc/{process_id}/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def test_hostile_images_are_refused_by_every_protocol(models_dir: Path, start_server: Callable[..., Server]) -> None:
    server = start_server(models_dir)
    server.wait_for("/readyz")
    sender = ImageSender(server)
    for method in (*UPLOADS, *TENSORS):
        assert getattr(sender, method)(picture("red", (300, 200))) == 200, method
        assert getattr(sender, method)(picture("red", (300, 200), "JPEG")) == 200, method
    before = peak_bytes(server.process.pid)
    started_s = time.perf_counter()
    for name, (data, status) in HOSTILE.items():
        for method in (*UPLOADS, *TENSORS):
            assert getattr(sender, method)(data) == status, (name, method)
    for name, (data, status) in HOSTILE_AS_TENSORS.items():
        for method in TENSORS:
            assert getattr(sender, method)(data) == status, (name, method)
    # JSON strings are text, and only a GIF file can be valid text.
    assert sender.v2_json(b"GIF89a" + struct.pack("<HHBBB", 20_000, 20_000, 0, 0, 0) + b"," + bytes(9) + b"\2\0") == 413
    assert time.perf_counter() - started_s < 15  # decoding one of them would take as long
    assert peak_bytes(server.process.pid) - before < 30_000_000
    assert sender.form(picture("red")) == 200


def test_the_largest_side_is_a_setting(models_dir: Path, start_server: Callable[..., Server]) -> None:
    server = start_server(models_dir, "--max-image-side", "300")
    server.wait_for("/readyz")
    sender = ImageSender(server)
    for method in (*UPLOADS, *TENSORS):
        assert getattr(sender, method)(picture("red", (300, 300))) == 200, method
        assert getattr(sender, method)(picture("red", (301, 1))) == 413, method


def test_hostile_images_are_not_sent_to_a_remote_server(tmp_path: Path, start_server: Callable[..., Server]) -> None:
    path = saved_models.save_colour_classifier(tmp_path / "classifier")
    shutil.copytree(path, tmp_path / "models" / "colours" / "1")
    backend = start_server(tmp_path / "models", "--max-image-side", "1000000", "--max-image-pixels", "100000000")
    backend.wait_for("/readyz")
    front = start_server(tmp_path / "models", "--remote", f"127.0.0.1:{backend.grpc_port}")
    front.wait_for("/readyz")
    sender = ImageSender(front)
    for method in TENSORS:
        assert getattr(sender, method)(picture("red")) == 200, method
        assert getattr(sender, method)(png(1, 40_000)) == 413, method
