"""`Client`: forms of images, order, batches and memory."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import client as client_package
from client import Client, Failure, ImageRejected, ImageSource, Prediction, batches, find_images
from tests.client.conftest import pixels_of, png_of, write_png
from tests.client.service import COLOURS, Service, respond


def test_public_api() -> None:
    assert client_package.__all__ == [
        "AsyncClient",
        "Client",
        "ClientError",
        "ConnectionFailed",
        "Failure",
        "GrpcClient",
        "ImageRejected",
        "ImageSource",
        "ModelNotFound",
        "ModelStatus",
        "Prediction",
        "RequestRejected",
        "RequestTimedOut",
        "ServerBusy",
        "ServerFailed",
        "ServiceStatus",
        "UnexpectedResponse",
        "__version__",
        "find_images",
    ]
    assert all(hasattr(client_package, name) for name in client_package.__all__)


def test_import_needs_only_the_clients_dependencies() -> None:
    script = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top in {"tensorflow", "keras", "rich", "orjson", "flask", "grpc", "serving", "training", "matplotlib"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
try:
    import tensorflow
except ModuleNotFoundError:
    pass
else:
    sys.exit("TensorFlow can be imported")
import client, client.__main__
assert "tensorflow" not in sys.modules
client.Client("http://127.0.0.1:1").close()
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_prediction_has_all_fields_of_the_response(service: Service, images: list[Path]) -> None:
    with Client(service.url, model="colours", version=3) as client:
        (prediction,) = client.predict(images[1])
    assert prediction.file == str(images[1])
    assert prediction.label == "green"
    assert prediction.class_id == 1
    assert prediction.confidence == prediction.probabilities["green"] == max(prediction.probabilities.values())
    assert list(prediction.probabilities) == list(COLOURS)
    assert (prediction.model, prediction.model_version) == ("colours", 3)
    assert service.received[0].query == {"model": ["colours"], "version": ["3"]}


def test_top_returns_the_most_probable_labels_first() -> None:
    prediction = Prediction("a.png", "b", 1, 0.6, {"a": 0.1, "b": 0.6, "c": 0.3}, "m", 1)
    assert prediction.top(2) == [("b", 0.6), ("c", 0.3)]
    assert prediction.top(9) == [("b", 0.6), ("c", 0.3), ("a", 0.1)]
    with pytest.raises(ValueError, match="at least 1"):
        prediction.top(0)


def test_every_form_of_an_image_is_accepted(service: Service, tmp_path: Path) -> None:
    path = write_png(tmp_path / "photo.png", "green")
    forms: list[ImageSource] = [
        str(path),
        path,
        png_of("green"),
        pixels_of("green"),
        Image.fromarray(pixels_of("green")),
        Image.open(path),
    ]
    with Client(service.url) as client:
        predictions = client.predict(forms)
        alone = [client.predict(form)[0] for form in forms]
    assert {prediction.label for prediction in predictions} == {"green"}
    assert [prediction.file for prediction in predictions] == [str(path), str(path), None, None, None, None]
    assert alone == predictions


def test_files_are_sent_unchanged_and_pixels_lossless(service: Service, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (17, 23, 3), np.uint8)
    jpeg = tmp_path / "photo.jpg"
    Image.fromarray(noise).save(jpeg, quality=70)
    with Client(service.url) as client:
        client.predict([jpeg, jpeg.read_bytes(), noise, Image.fromarray(noise)])
    sent = [data for _, data in service.received[0].files]
    assert sent[0] == sent[1] == jpeg.read_bytes()
    for data in sent[2:]:
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), noise)


def test_array_of_rank_4_is_several_images(service: Service) -> None:
    with Client(service.url) as client:
        labels = [prediction.label for prediction in client.predict(np.stack([pixels_of(c) for c in COLOURS]))]
    assert labels == list(COLOURS)


def test_batches_keep_the_order_and_reuse_the_connection(service: Service, images: list[Path]) -> None:
    with Client(service.url, batch_size=3) as client:
        predictions = client.predict(images)
    assert [prediction.file for prediction in predictions] == [str(path) for path in images]
    assert [prediction.label for prediction in predictions] == [COLOURS[index % 3] for index in range(7)]
    assert sorted(service.batches) == [["0.png", "1.png", "2.png"], ["3.png", "4.png", "5.png"], ["6.png"]]
    assert len({request.connection for request in service.received}) <= 2


def test_batch_size_is_limited_in_bytes(service: Service, images: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    size = images[0].stat().st_size
    monkeypatch.setattr(batches, "MAX_BATCH_BYTES", 2 * size + size // 2)
    with Client(service.url) as client:
        assert len(client.predict(images)) == 7
    assert sorted(len(batch) for batch in service.batches) == [1, 2, 2, 2]


def test_no_images_send_no_request(service: Service) -> None:
    with Client(service.url) as client:
        assert client.predict([]) == []
    assert service.received == []


def test_predict_iter_yields_before_all_images_are_read(service: Service) -> None:
    given: list[str] = []

    def endless() -> Iterator[bytes]:
        while True:
            given.append(COLOURS[len(given) % 3])
            yield png_of(given[-1])

    with Client(service.url, batch_size=4) as client:
        results = client.predict_iter(endless())
        outcomes = [next(results) for _ in range(10)]
    assert [outcome.label for outcome in outcomes if isinstance(outcome, Prediction)] == given[:10]
    assert len(given) <= 25  # three more batches, and the image that ended the last one


def test_predict_iter_has_bounded_memory(service: Service) -> None:
    service.received = deque(maxlen=1)
    script = """
import gc, sys, tracemalloc
import numpy as np
from client import Client

pixels = np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)  # more than 120,000 bytes as PNG
with Client(sys.argv[1], batch_size=4) as client:
    client.predict(pixels)
    gc.disable()  # the result must not depend on garbage collections
    tracemalloc.start()
    count = sum(1 for _ in client.predict_iter(pixels for _ in range(200)))
print(count, tracemalloc.get_traced_memory()[1])
"""
    done = subprocess.run(
        [sys.executable, "-c", script, service.url], check=True, capture_output=True, text=True, timeout=60
    )
    count, peak_bytes = map(int, done.stdout.split())
    assert count == 200
    assert peak_bytes < 200 * 120_000 / 3  # 20 images, also encoded and copied into requests


def test_unreadable_image_does_not_affect_the_others(service: Service, images: list[Path], tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("not an image")
    empty = tmp_path / "empty.png"
    empty.touch()
    given: list[ImageSource] = [images[0], text, tmp_path / "missing.png", images[1], empty, b"neither", images[2]]
    with Client(service.url) as client:
        outcomes = list(client.predict_iter(given))
    assert [getattr(outcome, "label", None) for outcome in outcomes] == ["red", None, None, "green", None, None, "blue"]
    assert [outcome for outcome in outcomes if isinstance(outcome, Failure)] == [
        Failure(1, str(text), "not an image"),
        Failure(2, str(tmp_path / "missing.png"), "file not found"),
        Failure(4, str(empty), "the image is empty: it has no bytes"),
        Failure(5, None, "not an image"),
    ]
    assert service.batches == [["0.png", "notes.txt", "1.png", "image-5", "2.png"], ["0.png", "1.png", "2.png"]]


def test_nothing_is_sent_again_if_all_images_are_unreadable(service: Service) -> None:
    with Client(service.url) as client:
        outcomes = list(client.predict_iter([b"one", b"two"]))
    assert [outcome.index for outcome in outcomes if isinstance(outcome, Failure)] == [0, 1]
    assert len(service.received) == 1


def test_local_failures_have_bounded_memory(service: Service, tmp_path: Path) -> None:
    missing = tmp_path / "missing.png"
    given = 0

    def many():
        nonlocal given
        while True:
            given += 1
            yield missing

    with Client(service.url, batch_size=4) as client:
        results = client.predict_iter(many())
        assert all(isinstance(next(results), Failure) for _ in range(8))
    assert given <= 21
    assert service.received == []


def test_predict_raises_for_the_first_unreadable_image(service: Service, images: list[Path], tmp_path: Path) -> None:
    with Client(service.url) as client, pytest.raises(ImageRejected) as caught:
        client.predict([images[0], tmp_path / "missing.png", b"bad"])
    assert (caught.value.index, caught.value.file) == (1, str(tmp_path / "missing.png"))
    assert str(caught.value) == f"{tmp_path / 'missing.png'}: file not found"
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    with Client(service.url) as client, pytest.raises(ImageRejected, match="image 1 of those given"):
        client.predict([png_of("red"), b"bad"])


def test_too_large_request_is_sent_in_parts(service: Service, images: list[Path]) -> None:
    service.max_images = 2
    with Client(service.url) as client:
        labels = [prediction.label for prediction in client.predict(images)]
    assert labels == [COLOURS[index % 3] for index in range(7)]
    assert max(len(batch) for batch in service.batches[1:]) < 7


def test_too_large_image_does_not_affect_the_others(service: Service, images: list[Path], tmp_path: Path) -> None:
    huge = tmp_path / "huge.png"
    Image.new("L", (2000, 1000)).save(huge)
    with Client(service.url) as client:
        outcomes = list(client.predict_iter([*images[:3], huge, *images[3:]]))
    assert outcomes[3] == Failure(3, str(huge), "the image has too many pixels")
    assert sum(isinstance(outcome, Prediction) for outcome in outcomes) == 7


def test_413_of_a_proxy_is_quoted(service: Service) -> None:
    service.script.append(respond(413, b"<h1>413 Request Entity Too Large</h1>", "text/html"))
    with Client(service.url) as client:
        (outcome,) = client.predict_iter(png_of("red"))
    assert isinstance(outcome, Failure)
    assert "413 Request Entity Too Large" in outcome.reason


@pytest.mark.parametrize("given", [3, None, io.BytesIO(b"x"), [3], [b"x", None], {"cat.png": 1}.values()])
def test_other_types_raise_a_type_error(service: Service, given: Any) -> None:
    with Client(service.url) as client, pytest.raises(TypeError, match=r"uint8 array \(height, width, 3\)"):
        client.predict(given)
    assert service.received == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"timeout_s": 0}, "timeout_s must be more than 0 seconds, not 0"),
        ({"timeout_s": float("nan")}, "timeout_s must be more than 0 seconds, not nan"),
        ({"retries": -1}, "retries must be at least 0, not -1"),
    ],
)
def test_arguments_out_of_range_raise_a_value_error(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Client("http://127.0.0.1:8501", **options)


def test_file_names_that_are_not_text_are_sent(service: Service, tmp_path: Path) -> None:
    odd = os.fsdecode(os.fsencode(tmp_path) + b'/b\xff"\n.png')
    Path(odd).write_bytes(png_of("blue"))
    with Client(service.url) as client:
        (prediction,) = client.predict(odd)
    assert (prediction.file, prediction.label) == (odd, "blue")


def test_folder_of_images_is_streamed(service: Service, tmp_path: Path) -> None:
    for name, colour in (("b/2.PNG", "green"), ("b/10.png", "red"), ("a/z.png", "blue"), ("top.png", "red")):
        write_png(tmp_path / name, colour)
    (tmp_path / "b" / "readme.txt").write_text("no image")
    with Client(service.url) as client:
        outcomes = list(client.predict_iter(find_images(tmp_path)))
    found = [Path(outcome.file or "").relative_to(tmp_path).as_posix() for outcome in outcomes]
    assert found == ["top.png", "a/z.png", "b/10.png", "b/2.PNG"]
    assert [outcome.label for outcome in outcomes if isinstance(outcome, Prediction)] == ["red", "blue", "red", "green"]
