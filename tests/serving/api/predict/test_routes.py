from __future__ import annotations

import io
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from flask import Flask
from flask.testing import FlaskClient
from PIL import Image
from werkzeug.test import TestResponse, create_environ, run_wsgi_app

from serving.api.app import create_app
from serving.api.predict.routes import class_names, picture_size
from serving.errors import InvalidRequest
from serving.inference.signatures import Signature, TensorSpec
from serving.settings import Settings
from tests.serving.conftest import encode, picture

# Colours at full strength: the classifier's answers are then beyond doubt.
RED, GREEN, BLUE = (picture(colour) for colour in ("red", "lime", "blue"))


def send_files(client: FlaskClient, *files: tuple[str, str, bytes], query: str = "") -> TestResponse:
    """Post (field, file name, data) triples as a multipart form, in this order."""
    boundary = "b0undary"
    body = b"".join(
        f'--{boundary}\r\nContent-Disposition: form-data; name="{field}"; filename="{name}"\r\n\r\n'.encode()
        + data
        + b"\r\n"
        for field, name, data in files
    )
    return client.post(
        f"/predict{query}",
        data=body + f"--{boundary}--\r\n".encode(),
        content_type=f"multipart/form-data; boundary={boundary}",
    )


def send_body(client: FlaskClient, data: bytes, query: str = "", kind: str = "image/png") -> TestResponse:
    # As a stream: the test client would make a good form of some of what it is given as data.
    return client.post(f"/predict{query}", input_stream=io.BytesIO(data), content_length=len(data), content_type=kind)


def answer(response: TestResponse, status: int = 200) -> Any:
    assert response.status_code == status, response.text
    assert response.mimetype == "application/json"
    return json.loads(response.data)


def test_one_picture_as_the_body(client: FlaskClient) -> None:
    body = answer(send_body(client, BLUE))
    assert body["model"] == {"name": "colours", "version": 7}
    (prediction,) = body["predictions"]
    assert prediction["file"] is None
    assert (prediction["label"], prediction["class_id"]) == ("blue", 2)
    assert list(prediction["probabilities"]) == ["red", "green", "blue"]
    assert prediction["confidence"] == prediction["probabilities"]["blue"] > 0.99
    assert sum(prediction["probabilities"].values()) == pytest.approx(1)
    assert set(body["timing_ms"]) == {"decode", "predict"}
    assert all(value >= 0 for value in body["timing_ms"].values())


def test_probabilities_are_those_of_the_model_to_the_last_bit(app: Flask, client: FlaskClient) -> None:
    predictor = app.extensions["repository"].resolve("colours").predictor
    image = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), dtype=np.uint8)
    expected = predictor.predict("serving_default", {"images": image})["probabilities"][0]
    (prediction,) = answer(send_body(client, encode(Image.fromarray(image[0]))))["predictions"]
    np.testing.assert_array_equal(np.array(list(prediction["probabilities"].values()), np.float32), expected)


def test_files_are_answered_in_the_order_sent_whatever_their_fields(client: FlaskClient) -> None:
    body = answer(
        send_files(
            client,
            ("a", "1.png", RED),
            ("b", "2.jpg", picture("blue", (300, 200), "JPEG")),
            ("a", "3.png", GREEN),
            ("", "héllo wörld.webp", picture("blue", (10, 90), "WEBP")),
        )
    )
    assert [(p["file"], p["label"]) for p in body["predictions"]] == [
        ("1.png", "red"),
        ("2.jpg", "blue"),
        ("3.png", "green"),
        ("héllo wörld.webp", "blue"),
    ]


def test_form_fields_beside_the_files_are_ignored(client: FlaskClient) -> None:
    response = client.post("/predict", data={"note": "hello", "image": (io.BytesIO(RED), "red.png")})
    assert [p["label"] for p in answer(response)["predictions"]] == ["red"]


def test_unreadable_files_are_named_and_nothing_is_predicted(client: FlaskClient) -> None:
    body = answer(send_files(client, ("f", "a.png", RED), ("f", "b.png", b"text"), ("f", "c.png", RED[:50])), 400)
    assert "2 of 3 images could not be read" in body["error"]
    assert [(e["index"], e["file"]) for e in body["errors"]] == [(1, "b.png"), (2, "c.png")]
    assert "expected JPEG, PNG" in body["errors"][0]["error"]
    assert "cut off" in body["errors"][1]["error"]
    body = answer(send_body(client, b"text"), 400)
    assert body["error"].startswith("the image could not be read: unknown image format: expected JPEG")
    assert body["errors"] == [{"index": 0, "file": None, "error": body["errors"][0]["error"]}]
    assert "empty" in answer(send_body(client, b""), 400)["error"]


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"{}", "application/json"),
        (b"a=b", "application/x-www-form-urlencoded"),
        (b"x", "application/octet-stream"),
        (b"x", ""),
    ],
)
def test_other_bodies_are_415(client: FlaskClient, data: bytes, kind: str) -> None:
    assert "multipart/form-data" in answer(send_body(client, data, kind=kind), 415)["error"]


@pytest.mark.parametrize(
    ("data", "kind", "message"),
    [
        (b"", "multipart/form-data", "names no boundary"),
        (b"", "multipart/form-data; boundary=x", "malformed"),
        (b"--x\r\n", "multipart/form-data; boundary=x", "malformed"),
        (b"--x--\r\n", "multipart/form-data; boundary=x", "no file"),
        (b"--x\r\n\r\nno header\r\n--x--\r\n", "multipart/form-data; boundary=x", "malformed"),
        (RED, "multipart/form-data; boundary=\xe9", "boundary"),
        (
            b'--x\r\nContent-Disposition: form-data; name="image"\r\n\r\n@cat.png\r\n--x--\r\n',
            "multipart/form-data; boundary=x",
            "curl -F image=@",
        ),
    ],
)
def test_forms_without_files_are_400(client: FlaskClient, data: bytes, kind: str, message: str) -> None:
    assert message in answer(send_body(client, data, kind=kind), 400)["error"]


FIELD = b'--x\r\nContent-Disposition: form-data; name="f"\r\n\r\nv\r\n'
FILE = b'--x\r\nContent-Disposition: form-data; name="i"; filename="a.png"\r\n\r\n' + RED + b"\r\n"


@pytest.mark.parametrize("fields", [101, 300])  # with one image there are fewer parts than all limits allow, or more
def test_a_form_with_too_many_fields_names_that_limit(client: FlaskClient, fields: int) -> None:
    kind = "multipart/form-data; boundary=x"
    form = FIELD * fields + FILE + b"--x--\r\n"
    assert answer(client.post("/predict", data=form, content_type=kind), 413)["error"] == (
        "too many fields in the form: at most 100 are taken beside the images"
    )
    form = FIELD * 100 + FILE + b"--x--\r\n"
    assert len(answer(client.post("/predict", data=form, content_type=kind))["predictions"]) == 1


def test_limits_are_413(client: FlaskClient) -> None:
    assert "at most 5" in answer(send_files(client, *[("f", "a.png", RED)] * 6), 413)["error"]
    assert len(answer(send_files(client, *[("f", "a.png", RED)] * 5))["predictions"]) == 5
    too_wide = picture("red", (1000, 251))
    assert (
        "wide.png: the picture has 1000 x 251" in answer(send_files(client, ("f", "wide.png", too_wide)), 413)["error"]
    )
    assert "250,000" in answer(send_body(client, too_wide), 413)["error"]
    assert answer(send_body(client, picture("red", (1000, 250))))["predictions"][0]["label"] == "red"
    assert "200,000 bytes" in answer(send_body(client, b"x" * 200_001), 413)["error"]
    assert "200,000 bytes" in answer(send_files(client, ("f", "a", b"x" * 200_001)), 413)["error"]


class Endless(io.RawIOBase):
    """A body that never ends, and remembers how much of it was taken."""

    taken = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self.taken += len(buffer)
        buffer[:] = b"x" * len(buffer)
        return len(buffer)


def send_stream(app: Flask, body: Endless, *, kind: str, length: int | None) -> str:
    """Post as a server does that may not know how long a body will be; returns the status."""
    environ = create_environ("/predict", method="POST", content_type=kind)
    environ.update({"wsgi.input": body, "wsgi.input_terminated": True})
    if length is not None:
        environ["CONTENT_LENGTH"] = str(length)
    return run_wsgi_app(app, environ)[1]


@pytest.mark.parametrize("kind", ["image/png", "multipart/form-data; boundary=x"])
def test_no_more_of_a_body_is_read_than_the_limit(app: Flask, kind: str) -> None:
    announced, unannounced = Endless(), Endless()
    assert send_stream(app, announced, kind=kind, length=10**12).startswith("413")
    assert announced.taken == 0
    assert send_stream(app, unannounced, kind=kind, length=None).startswith("413")
    assert unannounced.taken <= 200_001


def test_model_and_version_can_be_chosen(client: FlaskClient) -> None:
    for query in ("?model=colours", "?version=7", "?model=colours&version=007", f"?version={'0' * 40}7"):
        assert answer(send_body(client, RED, query))["model"]["version"] == 7
    assert answer(send_body(client, RED, "?model=m"), 404) == {"error": 'there is no model "m"; there are colours'}
    assert answer(send_body(client, RED, "?version=3"), 404) == {
        "error": "there is no version 3 of model colours; available: 7"
    }


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("label_=x", 'unknown query parameter "label_"; there are model, version, label'),
        ("Version=7", 'unknown query parameter "Version"'),
        ("top=3&model=colours", 'unknown query parameter "top"'),
        ("version=7&version=8", "the query parameter version is given twice"),
        ("model=colours&model=colours", "the query parameter model is given twice"),
        ("model=", "the query parameter model has no value"),
        ("version=", "the query parameter version has no value"),
        ("label", "the query parameter label has no value"),
        ("version=7&label=stable", "choose a version by its number or by its label, not by both"),
        ("label=stable", 'model colours has no label "stable"; it has none'),
    ],
)
def test_a_query_that_is_not_understood_is_refused(client: FlaskClient, query: str, message: str) -> None:
    assert message in answer(send_body(client, RED, f"?{query}"), 400)["error"]
    assert message in answer(client.post(f"/predict?{query}", data={"image": (io.BytesIO(RED), "a.png")}), 400)["error"]


def test_a_version_can_be_chosen_by_its_label(models_dir: Path, tmp_path: Path) -> None:
    config = tmp_path / "models.config"
    config.write_text(
        f'model_config_list {{ config {{ name: "m" base_path: "{models_dir / "colours"}" '
        "model_version_policy { all {} } "
        'version_labels { key: "stable" value: 2 } version_labels { key: "canary" value: 10 } } }'
    )
    app = create_app(Settings(models_dir=models_dir, model_config_file=config))
    client = app.test_client()
    assert "still being loaded" in answer(send_body(client, RED, "?label=stable"), 503)["error"]
    app.extensions["repository"].load()
    assert answer(send_body(client, RED))["model"]["version"] == 10
    assert answer(send_body(client, RED, "?label=stable"))["model"] == {"name": "m", "version": 2}
    assert answer(send_body(client, RED, "?label=canary&model=m"))["model"]["version"] == 10
    for label in ("beta", "Stable"):
        error = answer(send_body(client, RED, f"?label={label}"), 400)["error"]
        assert error == f'model m has no label "{label}"; it has canary, stable'


# The number, and the status everywhere: 200 of version 7, 404 of another, 400 where it is no version number.
VERSION_NUMBERS = {
    "7": 200,
    "0007": 200,
    "0" * 300 + "7": 200,
    "0": 404,
    "8": 404,
    "9223372036854775807": 404,
    "000009223372036854775807": 404,
    "9223372036854775808": 400,
    "9999999999999999999": 400,
    "9" * 5_000: 400,
    "x": 400,
    "-7": 400,
    "+7": 400,
    "7.0": 400,
    "0x7": 400,
    "1_0": 400,
    "\u0667": 400,
    "\u00b2": 400,
    " 7": 400,
}


@pytest.mark.parametrize("number", VERSION_NUMBERS, ids=lambda number: number[:20])
def test_every_protocol_has_the_same_rule_for_version_numbers(client: FlaskClient, number: str) -> None:
    status = VERSION_NUMBERS[number]
    version = quote(number)
    responses = [
        client.get(f"/v1/models/colours/versions/{version}/metadata"),
        client.get(f"/v2/models/colours/versions/{version}"),
        client.get(f"/v2/models/colours/versions/{version}/ready"),
        client.post(f"/predict?version={version}", data=RED, content_type="image/png"),
    ]
    assert [response.status_code for response in responses] == [status] * 4
    if status == 400:
        first, *others = (response.get_json()["error"] for response in responses)
        assert len(set(others)) == 1
        assert "the version must be a whole number from 0 to 9223372036854775807" in others[0]
        # Under /v1 what is no number is no path, as in TensorFlow Serving.
        assert first == others[0] or (
            first.startswith("Malformed request") and not (number.isascii() and number.isdecimal())
        )


@pytest.fixture(scope="module")
def two_models(tmp_path_factory: pytest.TempPathFactory, colours: Path, adder: Path) -> FlaskClient:
    models_dir = tmp_path_factory.mktemp("two")
    shutil.copytree(colours, models_dir / "colours" / "1")
    (models_dir / "colours" / "1" / "assets.extra" / "model.json").unlink()
    shutil.copytree(adder, models_dir / "adder" / "4")
    app = create_app(Settings(models_dir=models_dir))
    app.extensions["repository"].load()
    return app.test_client()


def test_of_several_models_one_must_be_chosen(two_models: FlaskClient) -> None:
    assert answer(send_body(two_models, RED), 400) == {
        "error": "several models are served: adder, colours; choose one with the query parameter model",
        "models": ["adder", "colours"],
    }
    assert answer(send_body(two_models, RED, "?model=colours"))["model"] == {"name": "colours", "version": 1}


def test_without_a_card_classes_go_by_their_numbers(two_models: FlaskClient) -> None:
    (prediction,) = answer(send_body(two_models, GREEN, "?model=colours"))["predictions"]
    assert prediction["label"] == "green"
    assert list(prediction["probabilities"]) == ["0", "1", "2"]


def test_a_model_that_takes_no_pictures_says_where_to_go(two_models: FlaskClient) -> None:
    error = answer(send_body(two_models, RED, "?model=adder"), 400)["error"]
    assert "does not take pictures" in error
    assert "/v1/models/adder:predict" in error


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a", "b"], ["a", "b"]),
        (["a", "b", "c"], ["0", "1"]),
        (["a", "a"], ["0", "1"]),
        ("ab", ["0", "1"]),
        (None, ["0", "1"]),
        ([1, None], ["1", "None"]),
    ],
)
def test_class_names_of_a_card_are_used_if_they_fit(names: Any, expected: list[str]) -> None:
    assert class_names({"class_names": names}, count=2) == expected
    assert class_names(None, count=2) == ["0", "1"]


def signature_of(images: TensorSpec, *outputs: TensorSpec) -> dict[str, Signature]:
    return {
        "serving_default": Signature(
            "serving_default", "", {images.name: images}, {output.name: output for output in outputs}
        )
    }


class DescribedPredictor:
    def __init__(self, signatures: dict[str, Signature]) -> None:
        self.signatures = signatures

    def predict(
        self, signature: str, inputs: Mapping[str, np.ndarray], *, deadline_s: float | None = None
    ) -> dict[str, np.ndarray]:
        raise NotImplementedError


PICTURES = TensorSpec("images", "DT_UINT8", (None, 20, 30, 3), "x:0")
OUTPUTS = (
    TensorSpec("probabilities", "DT_FLOAT", (None, 3), "y:0"),
    TensorSpec("class_id", "DT_INT64", (None,), "y:1"),
    TensorSpec("label", "DT_STRING", None, "y:2"),
)


def test_pictures_are_those_of_the_signature() -> None:
    assert picture_size(DescribedPredictor(signature_of(PICTURES, *OUTPUTS)), model="m") == (20, 30)
    for images in (
        TensorSpec("images", "DT_FLOAT", (None, 20, 30, 3), "x:0"),
        TensorSpec("images", "DT_UINT8", (None, 20, 30, 1), "x:0"),
        TensorSpec("images", "DT_UINT8", (None, None, None, 3), "x:0"),
        TensorSpec("images", "DT_UINT8", (8, 20, 30, 3), "x:0"),
        TensorSpec("images", "DT_UINT8", None, "x:0"),
        TensorSpec("pixels", "DT_UINT8", (None, 20, 30, 3), "x:0"),
    ):
        with pytest.raises(InvalidRequest, match="does not take pictures"):
            picture_size(DescribedPredictor(signature_of(images, *OUTPUTS)), model="m")
    for missing in range(3):
        outputs = OUTPUTS[:missing] + OUTPUTS[missing + 1 :]
        with pytest.raises(InvalidRequest, match="does not take pictures"):
            picture_size(DescribedPredictor(signature_of(PICTURES, *outputs)), model="m")
    with pytest.raises(InvalidRequest, match="does not take pictures"):
        picture_size(DescribedPredictor({}), model="m")
