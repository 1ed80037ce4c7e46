"""One image gives the same probabilities over every protocol and encoding."""

from __future__ import annotations

import base64
import io
import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import grpc
import httpx
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

from client import Client, GrpcClient
from serving.grpc.protos import open_inference_pb2
from tests.contract.test_awkward_files import app1, damaged, exif, jpeg_with, png_with
from tests.serving.image_files import chunk, segment
from training.batch_prediction.prediction import predict_source
from training.data.image_reading import read_image
from training.data.shapes import draw_shapes

# float32 rounding: batches of different sizes add in different orders.
SAME = 1e-5
# TensorFlow and Pillow may resize a pixel to values that differ by one grey level.
NEARLY = 0.03


def encoded(image: Image.Image, image_format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def photo(width: int, height: int) -> Image.Image:
    """Return a detailed image: a mosaic of CIFAR-10 images if available, else of drawn shapes."""
    folder = os.environ.get("CIFAR10_DATA")
    if folder:
        paths = sorted(Path(folder, "images", "test").glob("*/000*.jpg"))[:60]
        tiles = [np.asarray(Image.open(path).convert("RGB")) for path in paths]
    else:
        tiles = list(draw_shapes(60, seed=5).images)
    mosaic = np.concatenate([np.concatenate(tiles[row * 10 : row * 10 + 10], axis=1) for row in range(6)])
    return Image.fromarray(mosaic).resize((width, height), Image.Resampling.BICUBIC)


def orientation(number: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = number
    return exif


def transparent(image: Image.Image) -> Image.Image:
    image = image.convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


def sixteen_bit(image: Image.Image) -> Image.Image:
    grey = np.asarray(image.convert("L")).astype(np.uint16)
    return Image.fromarray(grey * 257 - 31 * (grey > 0).astype(np.uint16))


PHOTO, SMALL = photo(400, 300), photo(32, 32)
# By name: the file, and whether it has the model's image size.
FILES = {
    "jpeg 4:2:0": (encoded(PHOTO, "JPEG", subsampling=2), False),
    "jpeg 4:4:4": (encoded(PHOTO, "JPEG", subsampling=0, quality=95), False),
    "jpeg progressive": (encoded(PHOTO, "JPEG", progressive=True), False),
    "jpeg grey": (encoded(PHOTO.convert("L"), "JPEG"), False),
    "jpeg cmyk": (encoded(PHOTO.convert("CMYK"), "JPEG"), False),
    "jpeg cmyk 32x32": (encoded(SMALL.convert("CMYK"), "JPEG"), True),
    "jpeg tiny": (encoded(photo(20, 20), "JPEG"), False),
    "jpeg 32x32": (encoded(SMALL, "JPEG", subsampling=2), True),
    "png": (encoded(PHOTO, "PNG"), False),
    "png 32x32": (encoded(SMALL, "PNG"), True),
    "png alpha": (encoded(transparent(PHOTO), "PNG"), False),
    "png alpha 32x32": (encoded(transparent(SMALL), "PNG"), True),
    "png palette": (encoded(PHOTO.quantize(64), "PNG"), False),
    "png palette transparent 32x32": (encoded(SMALL.quantize(64), "PNG", transparency=3), True),
    "png 16-bit": (encoded(sixteen_bit(PHOTO), "PNG"), False),
    "png 16-bit 32x32": (encoded(sixteen_bit(SMALL), "PNG"), True),
    "png grey 32x32": (encoded(SMALL.convert("L"), "PNG"), True),
    "png grey alpha 32x32": (encoded(transparent(SMALL).convert("LA"), "PNG"), True),
    "png orientation 6 32x32": (encoded(SMALL, "PNG", exif=orientation(6)), True),
} | {
    f"jpeg orientation {number}": (encoded(PHOTO, "JPEG", exif=orientation(number)), False) for number in range(1, 9)
} | {
    f"jpeg orientation {n} 32x32": (encoded(SMALL, "JPEG", exif=orientation(n)), True) for n in (3, 5, 6, 8)
}  # fmt: skip
SMALL_PNG, SMALL_JPEG = encoded(SMALL, "PNG"), encoded(SMALL, "JPEG", subsampling=2)
# What decoders are strict about, and where they look for the orientation, is not the same for all.
AWKWARD = {
    "png long text": png_with(chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(2_000_000))), file=SMALL_PNG),
    "png damaged text, large profile": png_with(
        damaged(chunk(b"tEXt", b"k\0v")), chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(2_000_000))), file=SMALL_PNG
    ),
    "png turned by a LONG": png_with(
        chunk(b"tEXt", b"k\0" + bytes(300_000)), chunk(b"eXIf", exif(4)), file=encoded(transparent(SMALL), "PNG")
    ),
    "png transparent colour": png_with(chunk(b"tRNS", struct.pack(">3H", *np.asarray(SMALL)[16, 16])), file=SMALL_PNG),
    "jpeg turned by a LONG after fill bytes": jpeg_with(b"\xff" * 7 + app1(exif(4)), file=SMALL_JPEG),
    "jpeg turned behind 650 KB": jpeg_with(*[segment(0xE2, bytes(65_000))] * 10, app1(exif()), file=SMALL_JPEG),
}
FILES |= {f"{name} 32x32": (data, True) for name, data in AWKWARD.items()}
# Formats that only Pillow decodes: accepted as uploads and pixels, refused as image_bytes.
OTHER_FORMATS = {
    "webp": encoded(PHOTO, "WEBP", quality=80),
    "webp orientation 6": encoded(PHOTO, "WEBP", exif=orientation(6).tobytes()),
    "bmp": encoded(PHOTO, "BMP"),
    "gif": encoded(PHOTO, "GIF"),
    "gif animated": encoded(PHOTO, "GIF", save_all=True, append_images=[PHOTO.rotate(90)]),
}


class Routes:
    """Every route from an image file to a served model. Each method returns probabilities, float (classes,)."""

    def __init__(self, served):
        self.url, self.model = served.server.url, served.model
        self.client = Client(self.url)
        address = f"127.0.0.1:{served.server.grpc_port}"
        self.grpc_client = GrpcClient(address, model=self.model)
        channel = grpc.insecure_channel(address)
        self.stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
        self.infer = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            request_serializer=open_inference_pb2.ModelInferRequest.SerializeToString,
            response_deserializer=open_inference_pb2.ModelInferResponse.FromString,
        )
        self.http = httpx.Client(base_url=self.url, timeout=60)
        self.signatures = (loaded := tf.saved_model.load(str(served.version))).signatures
        self.loaded = loaded  # keeps the variables alive

    def upload(self, data):
        response = self.http.post("/predict", files={"image": ("image.png", data)})
        assert response.status_code == 200, response.text
        return np.array(list(response.json()["predictions"][0]["probabilities"].values()))

    def raw_body(self, data):
        response = self.http.post("/predict", content=data, headers={"Content-Type": "image/any"})
        assert response.status_code == 200, response.text
        return np.array(list(response.json()["predictions"][0]["probabilities"].values()))

    def python_client(self, data):
        (prediction,) = self.client.predict([data])
        return np.array(list(prediction.probabilities.values()))

    def python_grpc_client(self, data):
        (prediction,) = self.grpc_client.predict([data])
        (over_rest,) = self.client.predict([data])
        assert list(prediction.probabilities) == list(over_rest.probabilities)
        return np.array(list(prediction.probabilities.values()))

    def grpc(self, signature, **inputs):
        request = predict_pb2.PredictRequest()
        request.model_spec.name = self.model
        request.model_spec.signature_name = signature
        for name, value in inputs.items():
            request.inputs[name].CopyFrom(tf.make_tensor_proto(value))
        return tf.make_ndarray(self.stub.Predict(request, timeout=60).outputs["probabilities"])[0]

    def grpc_bytes(self, data):
        return self.grpc("image_bytes", image_bytes=[data])

    def grpc_pixels(self, data):
        return self.grpc("serving_default", images=self.pixels(data)[None])

    def v2_pixels(self, data):
        pixels = self.pixels(data)[None]
        tensor = {"name": "images", "shape": pixels.shape, "datatype": "UINT8", "data": pixels.tolist()}
        response = self.http.post(f"/v2/models/{self.model}/infer", json={"inputs": [tensor]})
        assert response.status_code == 200, response.text
        (output,) = [output for output in response.json()["outputs"] if output["name"] == "probabilities"]
        return np.array(output["data"])

    def _v2_grpc(self, name, datatype, shape, raw):
        request = open_inference_pb2.ModelInferRequest(model_name=self.model, raw_input_contents=[raw])
        request.inputs.add(name=name, datatype=datatype, shape=shape)
        request.outputs.add(name="probabilities")
        (values,) = self.infer(request, timeout=60).raw_output_contents
        return np.frombuffer(values, "<f4")

    def v2_grpc_pixels(self, data):
        pixels = self.pixels(data)[None]
        return self._v2_grpc("images", "UINT8", pixels.shape, pixels.tobytes())

    def v2_grpc_bytes(self, data):
        return self._v2_grpc("image_bytes", "BYTES", [1], struct.pack("<I", len(data)) + data)

    def rest(self, body):
        response = self.http.post(f"/v1/models/{self.model}:predict", content=json.dumps(body))
        assert response.status_code == 200, response.text
        return np.array(response.json()["predictions"][0]["probabilities"])

    def rest_base64(self, data):
        instance = {"b64": base64.b64encode(data).decode()}
        return self.rest({"signature_name": "image_bytes", "instances": [instance]})

    def rest_pixels(self, data):
        return self.rest({"instances": [self.pixels(data).tolist()]})

    def saved_model_bytes(self, data):
        return self.signatures["image_bytes"](image_bytes=tf.constant([data]))["probabilities"].numpy()[0]

    def saved_model_pixels(self, data):
        pixels = tf.constant(self.pixels(data)[None])
        return self.signatures["serving_default"](images=pixels)["probabilities"].numpy()[0]

    @staticmethod
    def pixels(data):
        """Decode and resize like the training data."""
        return read_image(io.BytesIO(data), image_size=(32, 32))


BY_PILLOW = (
    "upload",
    "raw_body",
    "python_client",
    "rest_pixels",
    "grpc_pixels",
    "v2_pixels",
    "v2_grpc_pixels",
    "saved_model_pixels",
)
IN_THE_GRAPH = ("rest_base64", "grpc_bytes", "v2_grpc_bytes", "python_grpc_client", "saved_model_bytes")


@pytest.fixture(scope="module")
def routes(shapes):
    return Routes(shapes)


@pytest.mark.parametrize("name", FILES)
def test_every_route_gives_the_same_probabilities(routes, name):
    data, is_model_size = FILES[name]
    by_pillow = [getattr(routes, route)(data) for route in BY_PILLOW]
    in_the_graph = [getattr(routes, route)(data) for route in IN_THE_GRAPH]
    for results in (by_pillow, in_the_graph):
        for result in results[1:]:
            np.testing.assert_allclose(result, results[0], atol=SAME)
    np.testing.assert_allclose(in_the_graph[0], by_pillow[0], atol=SAME if is_model_size else NEARLY)


@pytest.mark.parametrize("name", OTHER_FORMATS)
def test_other_formats_agree_where_accepted_and_are_refused_elsewhere(routes, name):
    data = OTHER_FORMATS[name]
    results = [getattr(routes, route)(data) for route in BY_PILLOW]
    for result in results[1:]:
        np.testing.assert_allclose(result, results[0], atol=SAME)
    body = {"signature_name": "image_bytes", "instances": [{"b64": base64.b64encode(data).decode()}]}
    refused = routes.http.post(f"/v1/models/{routes.model}:predict", json=body)
    assert refused.status_code == 400
    assert "image_bytes must hold JPEG or PNG files" in refused.json()["error"]
    with pytest.raises(tf.errors.InvalidArgumentError, match="must hold JPEG or PNG"):
        routes.saved_model_bytes(data)
    # The client decodes these itself for `image_bytes`; only the resize differs.
    np.testing.assert_allclose(routes.python_grpc_client(data), results[0], atol=NEARLY)


def test_batch_prediction_gives_the_predictions_and_the_reasons_of_the_service(routes, shapes, tmp_path):
    pytest.importorskip("pyarrow", reason="needs pyarrow, of the extra [batch]")
    refused = {
        "cut off.png": FILES["png"][0][:300],
        "damaged.png": SMALL_PNG[:100] + b"\0\0" + SMALL_PNG[102:],
        "cut off.jpg": FILES["jpeg 4:2:0"][0][:300],
        "text.png": b"no image",
        "empty.png": b"",
        "large.png": SMALL_PNG[:16] + (30_000).to_bytes(4) * 2 + SMALL_PNG[24:],
    }
    files = {name: data for name, (data, _) in FILES.items()} | OTHER_FORMATS | refused
    folder = tmp_path / "files"
    folder.mkdir()
    for name, data in files.items():
        (folder / name.replace(":", "")).write_bytes(data)
    summary = predict_source(shapes.version.parent, str(folder), tmp_path / "out.parquet", batch_size=16)
    assert (summary.images, summary.unreadable) == (len(files), len(refused))
    rows = {Path(row["source"]).name: row for row in pyarrow_rows(tmp_path / "out.parquet")}
    for name, data in files.items():
        row = rows[name.replace(":", "")]
        response = routes.http.post("/predict", files={"image": ("image.png", data)})
        if name in refused and "large" not in name:
            assert (response.status_code, row["error"]) == (400, response.json()["errors"][0]["error"]), name
        elif name in refused:
            assert response.status_code == 413
            for error in (row["error"], response.json()["error"]):
                assert "the image has 30000 x 30000 pixels" in error
        else:
            (prediction,) = response.json()["predictions"]
            expected = list(prediction["probabilities"].values())
            np.testing.assert_allclose(row["probabilities"], expected, atol=SAME, err_msg=name)
            for field in ("label", "class_id", "is_typical", "label_set"):
                assert row[field] == prediction[field], name
            assert row["typicality"] == pytest.approx(prediction["typicality"], rel=1e-3, abs=1e-3)


def pyarrow_rows(path):
    from pyarrow import parquet

    return parquet.read_table(path).to_pylist()


def test_the_orientation_and_the_transparency_of_awkward_files_count(routes):
    """Otherwise they would be the same by every route where none looked for them."""
    plain = {"png": routes.rest_base64(SMALL_PNG), "jpe": routes.rest_base64(SMALL_JPEG)}
    for name, data in AWKWARD.items():
        is_changed = "turned" in name or "transparent" in name
        assert (np.abs(routes.rest_base64(data) - plain[name[:3]]).max() > 10 * SAME) == is_changed, name


def test_the_model_distinguishes_images(routes):
    # A constant model would pass all other tests.
    results = [routes.upload(encoded(Image.fromarray(image), "PNG")) for image in draw_shapes(20, seed=9).images]
    assert len({result.argmax() for result in results}) > 4


def test_real_images_give_the_same_probabilities_by_every_route(cifar10):
    routes = Routes(cifar10)
    for path in sorted(Path(os.environ["CIFAR10_DATA"], "images", "test").glob("*/0001.jpg")):
        data = path.read_bytes()
        expected = routes.saved_model_pixels(data)
        for route in (*BY_PILLOW, *IN_THE_GRAPH):
            np.testing.assert_allclose(getattr(routes, route)(data), expected, atol=SAME, err_msg=f"{path} {route}")


def test_the_client_measures_the_accuracy_of_the_evaluation(cifar10):
    images = Path(json.loads((cifar10.run / "config.json").read_text())["data"], "test")
    url = cifar10.server.url
    command = [sys.executable, "-m", "client", "predict", str(images), "--url", url, "--json", "--labels-from-folders"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    labels = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(labels) == 2_000
    correct = sum(Path(line["file"]).parent.name == line["label"] for line in labels)
    accuracy = json.loads((cifar10.run / "evaluation.json").read_text())["test"]["accuracy"]
    assert correct == round(accuracy * 2_000)
    assert f"({correct:,} of 2,000)" in done.stderr
