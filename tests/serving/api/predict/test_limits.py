"""`/predict` says what limits a prediction, if the model does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from flask.testing import FlaskClient
from PIL import Image

from serving.app import make_app
from serving.settings import Settings
from tests.serving.api.predict.test_routes import read, send_body, send_files
from tests.serving.conftest import encode, picture
from tests.serving.saved_models import save_colour_classifier

GREY = picture("grey")  # as much red as green as blue


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> FlaskClient:
    models = tmp_path_factory.mktemp("guarded")
    save_colour_classifier(models / "colours" / "1", guarded=True)
    app = make_app(Settings(models_dir=models))
    app.inference.repository.load()
    return app.test_client()


@pytest.mark.parametrize("format_name", ["PNG", "JPEG"])  # decoded by the model, and by Pillow
def test_limits_are_in_the_response(client: FlaskClient, format_name: str) -> None:
    files = [("f", colour, picture(colour, (32, 32), format_name)) for colour in ("red", "grey")]
    red, grey = read(send_files(client, *files))["predictions"]
    assert (red["is_typical"], red["label_set"]) == (True, ["red"])
    assert red["typicality"] == red["confidence"]
    assert (grey["is_typical"], grey["label_set"]) == (False, ["red", "green", "blue"])


def test_probabilities_are_those_of_the_plain_signature(client: FlaskClient) -> None:
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    (prediction,) = read(send_body(client, encode(Image.fromarray(image))))["predictions"]
    document = {"instances": [image.tolist()]}
    plain = read(client.post("/v1/models/colours:predict", json=document))["predictions"][0]
    assert list(prediction["probabilities"].values()) == pytest.approx(plain["probabilities"], rel=1e-6)


def save_with_other_guard(path: Path) -> None:
    """Write a classifier whose signature `guarded` has other outputs than an export's."""

    @tf.function(input_signature=[tf.TensorSpec((None, 32, 32, 3), tf.uint8, "images")])
    def classify(images: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"probabilities": tf.nn.softmax(tf.reduce_mean(tf.cast(images, tf.float32), (1, 2)))}

    tf.saved_model.save(tf.Module(), str(path), signatures={"serving_default": classify, "guarded": classify})


def test_a_signature_with_the_name_and_other_outputs_is_not_used(tmp_path: Path) -> None:
    save_with_other_guard(tmp_path / "colours" / "1")
    app = make_app(Settings(models_dir=tmp_path))
    app.inference.repository.load()
    (prediction,) = read(send_body(app.test_client(), GREY))["predictions"]
    assert prediction.keys() == {"file", "label", "class_id", "confidence", "probabilities"}


def test_a_model_without_limits_has_no_such_fields(tmp_path: Path) -> None:
    save_colour_classifier(tmp_path / "colours" / "1")
    app = make_app(Settings(models_dir=tmp_path))
    app.inference.repository.load()
    prediction: dict[str, Any] = read(send_body(app.test_client(), GREY))["predictions"][0]
    assert not prediction.keys() & {"typicality", "is_typical", "label_set"}
