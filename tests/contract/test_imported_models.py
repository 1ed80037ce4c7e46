"""A Keras file becomes a served model by one command, and gives Keras's own predictions over every protocol."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import keras
import numpy as np
import pytest
from keras import layers

from tests.contract.conftest import Served
from tests.contract.test_same_prediction import SAME, SMALL_JPEG, SMALL_PNG, Routes
from tests.serving.conftest import Server
from training.data.image_reading import read_image

LABELS = [f"label {number}" for number in range(10)]


def build() -> keras.Model:
    """Return the convnet of Keras's guide for small images, on values from 0 to 1, with random weights."""
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((32, 32, 3)),
            layers.Conv2D(32, kernel_size=(3, 3), activation="relu"),
            layers.MaxPooling2D(pool_size=(2, 2)),
            layers.Conv2D(64, kernel_size=(3, 3), activation="relu"),
            layers.MaxPooling2D(pool_size=(2, 2)),
            layers.Flatten(),
            layers.Dropout(0.5),
            layers.Dense(10, activation="softmax"),
        ]
    )


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("imported")
    build().save(folder / "guide.keras")
    command = [sys.executable, "-m", "training", "import", str(folder / "guide.keras"), "--input-scale", "0..1"]
    options = ["--labels", ",".join(LABELS), "--models-dir", str(folder / "models")]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # nothing of TensorFlow's
    assert done.stdout.endswith(f"exported       {folder / 'models' / 'guide' / '1'}\n")
    server = Server(folder / "models", folder / "log")
    server.wait_for("/readyz")
    yield Served(server, folder, folder / "models" / "guide" / "1")
    assert server.stop() == 0


@pytest.mark.parametrize("data", [SMALL_PNG, SMALL_JPEG], ids=["png", "jpeg"])
def test_every_protocol_gives_the_predictions_of_keras(imported: Served, data: bytes) -> None:
    pixels = read_image(io.BytesIO(data), image_size=(32, 32))
    (expected,) = build().predict(pixels[np.newaxis].astype(np.float32) / 255, verbose=0)
    routes = Routes(imported)
    ways = [name for name in vars(Routes) if re.match(r"(?!grpc$|rest$|pixels$|_)", name)]
    assert len(ways) >= 11
    for name in ways:
        np.testing.assert_allclose(getattr(routes, name)(data), expected, atol=SAME, err_msg=name)


def test_the_page_and_the_api_know_the_labels(imported: Served) -> None:
    url = imported.server.url
    assert "text/html" in httpx.get(url).headers["content-type"]
    reply = httpx.post(f"{url}/predict", files={"image": ("a.png", SMALL_PNG)}).json()
    assert list(reply["predictions"][0]["probabilities"]) == LABELS
    metadata = httpx.get(f"{url}/v1/models/guide/metadata").json()["metadata"]["signature_def"]["signature_def"]
    assert {"serving_default", "image_bytes", "labels"} <= metadata.keys()


def test_wrong_shapes_are_rejected_as_for_a_trained_model(imported: Served) -> None:
    wrong = {"instances": np.zeros((1, 31, 32, 3), int).tolist()}
    assert httpx.post(f"{imported.server.url}/v1/models/guide:predict", json=wrong).status_code == 400
    assert (imported.version / "assets.extra" / "tf_serving_warmup_requests").stat().st_size > 0
    assert Path(imported.version, "assets.extra", "SHA256SUMS").is_file()
