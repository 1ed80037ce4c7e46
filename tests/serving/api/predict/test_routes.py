from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from flask.testing import FlaskClient
from PIL import Image
from werkzeug.test import TestResponse, create_environ, run_wsgi_app

from serving.api.flask_app import ServingApp
from serving.app import make_app
from serving.settings import Settings
from tests.serving.conftest import encode, picture

# Pure colours, which the classifier labels with near certainty.
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
    # As a stream: the test client would turn some `data` into a valid form.
    return client.post(f"/predict{query}", input_stream=io.BytesIO(data), content_length=len(data), content_type=kind)


def read(response: TestResponse, status: int = 200) -> Any:
    assert response.status_code == status, response.text
    assert response.mimetype == "application/json"
    return json.loads(response.data)


def test_one_image_as_a_raw_body(client: FlaskClient) -> None:
    body = read(send_body(client, BLUE))
    assert body["model"] == {"name": "colours", "version": 7}
    (prediction,) = body["predictions"]
    assert prediction["file"] is None
    assert (prediction["label"], prediction["class_id"]) == ("blue", 2)
    assert list(prediction["probabilities"]) == ["red", "green", "blue"]
    assert prediction["confidence"] == prediction["probabilities"]["blue"] > 0.99
    assert sum(prediction["probabilities"].values()) == pytest.approx(1)
    assert set(body["timing_ms"]) == {"decode", "predict"}
    assert all(value >= 0 for value in body["timing_ms"].values())


def test_probabilities_equal_the_models_exactly(app: ServingApp, client: FlaskClient) -> None:
    predictor = app.inference.repository.resolve("colours").predictor
    image = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), dtype=np.uint8)
    expected = predictor.predict("serving_default", {"images": image})["probabilities"][0]
    (prediction,) = read(send_body(client, encode(Image.fromarray(image[0]))))["predictions"]
    np.testing.assert_array_equal(np.array(list(prediction["probabilities"].values()), np.float32), expected)


def test_predictions_are_in_the_order_of_the_files(client: FlaskClient) -> None:
    body = read(
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


def test_other_form_fields_are_ignored(client: FlaskClient) -> None:
    response = client.post("/predict", data={"note": "hello", "image": (io.BytesIO(RED), "red.png")})
    assert [p["label"] for p in read(response)["predictions"]] == ["red"]


def test_unreadable_files_are_named(client: FlaskClient) -> None:
    body = read(send_files(client, ("f", "a.png", RED), ("f", "b.png", b"text"), ("f", "c.png", RED[:50])), 400)
    assert "2 of 3 images could not be read" in body["error"]
    assert [(e["index"], e["file"]) for e in body["errors"]] == [(1, "b.png"), (2, "c.png")]
    assert "expected JPEG, PNG" in body["errors"][0]["error"]
    assert "cut off" in body["errors"][1]["error"]
    body = read(send_body(client, b"text"), 400)
    assert body["error"].startswith("the image could not be read: unknown image format: expected JPEG")
    assert body["errors"] == [{"index": 0, "file": None, "error": body["errors"][0]["error"]}]
    assert "empty" in read(send_body(client, b""), 400)["error"]


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"{}", "application/json"),
        (b"a=b", "application/x-www-form-urlencoded"),
        (b"x", "application/octet-stream"),
        (b"x", ""),
    ],
)
def test_other_content_types_are_415(client: FlaskClient, data: bytes, kind: str) -> None:
    assert "multipart/form-data" in read(send_body(client, data, kind=kind), 415)["error"]


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
    assert message in read(send_body(client, data, kind=kind), 400)["error"]


FIELD = b'--x\r\nContent-Disposition: form-data; name="f"\r\n\r\nv\r\n'
FILE = b'--x\r\nContent-Disposition: form-data; name="i"; filename="a.png"\r\n\r\n' + RED + b"\r\n"


@pytest.mark.parametrize("fields", [101, 300])  # below and above the parser's limit on parts
def test_a_form_with_too_many_fields_names_that_limit(client: FlaskClient, fields: int) -> None:
    kind = "multipart/form-data; boundary=x"
    form = FIELD * fields + FILE + b"--x--\r\n"
    assert read(client.post("/predict", data=form, content_type=kind), 413)["error"] == (
        "too many fields in the form: at most 100 are accepted in addition to the images"
    )
    form = FIELD * 100 + FILE + b"--x--\r\n"
    assert len(read(client.post("/predict", data=form, content_type=kind))["predictions"]) == 1


def test_requests_over_the_limits_are_413(client: FlaskClient) -> None:
    assert "at most 5" in read(send_files(client, *[("f", "a.png", RED)] * 6), 413)["error"]
    assert len(read(send_files(client, *[("f", "a.png", RED)] * 5))["predictions"]) == 5
    too_wide = picture("red", (1000, 251))
    assert "wide.png: the image has 1000 x 251" in read(send_files(client, ("f", "wide.png", too_wide)), 413)["error"]
    assert "250,000" in read(send_body(client, too_wide), 413)["error"]
    assert read(send_body(client, picture("red", (1000, 250))))["predictions"][0]["label"] == "red"
    assert "200,000 bytes" in read(send_body(client, b"x" * 200_001), 413)["error"]
    assert "200,000 bytes" in read(send_files(client, ("f", "a", b"x" * 200_001)), 413)["error"]


class Endless(io.RawIOBase):
    """An endless body that counts the bytes read."""

    read_bytes = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self.read_bytes += len(buffer)
        buffer[:] = b"x" * len(buffer)
        return len(buffer)


def send_stream(app: ServingApp, body: Endless, *, kind: str, length: int | None) -> str:
    """Post a body whose length the server may not know; returns the status."""
    environ = create_environ("/predict", method="POST", content_type=kind)
    environ.update({"wsgi.input": body, "wsgi.input_terminated": True})
    if length is not None:
        environ["CONTENT_LENGTH"] = str(length)
    return run_wsgi_app(app, environ)[1]


@pytest.mark.parametrize("kind", ["image/png", "multipart/form-data; boundary=x"])
def test_a_body_is_not_read_beyond_the_limit(app: ServingApp, kind: str) -> None:
    announced, unannounced = Endless(), Endless()
    assert send_stream(app, announced, kind=kind, length=10**12).startswith("413")
    assert announced.read_bytes == 0
    assert send_stream(app, unannounced, kind=kind, length=None).startswith("413")
    assert unannounced.read_bytes <= 200_001


def test_model_and_version_can_be_chosen(client: FlaskClient) -> None:
    for query in ("?model=colours", "?version=7", "?model=colours&version=007", f"?version={'0' * 40}7"):
        assert read(send_body(client, RED, query))["model"]["version"] == 7
    assert read(send_body(client, RED, "?model=m"), 404) == {"error": 'there is no model "m"; available: colours'}
    assert read(send_body(client, RED, "?version=3"), 404) == {
        "error": "there is no version 3 of model colours; available: 7"
    }


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("label_=x", 'unknown query parameter "label_"; expected model, version, label'),
        ("Version=7", 'unknown query parameter "Version"'),
        ("top=3&model=colours", 'unknown query parameter "top"'),
        ("version=7&version=8", "the query parameter version is repeated"),
        ("model=colours&model=colours", "the query parameter model is repeated"),
        ("model=", "the query parameter model has no value"),
        ("version=", "the query parameter version has no value"),
        ("label", "the query parameter label has no value"),
        ("version=7&label=stable", "choose a version by its number or by its label, not by both"),
        ("label=stable", 'model colours has no label "stable"; it has no labels'),
    ],
)
def test_an_invalid_query_is_400(client: FlaskClient, query: str, message: str) -> None:
    assert message in read(send_body(client, RED, f"?{query}"), 400)["error"]
    assert message in read(client.post(f"/predict?{query}", data={"image": (io.BytesIO(RED), "a.png")}), 400)["error"]


def test_a_version_can_be_chosen_by_its_label(models_dir: Path, tmp_path: Path) -> None:
    config = tmp_path / "models.config"
    config.write_text(
        f'model_config_list {{ config {{ name: "m" base_path: "{models_dir / "colours"}" '
        "model_version_policy { all {} } "
        'version_labels { key: "stable" value: 2 } version_labels { key: "canary" value: 10 } } }'
    )
    app = make_app(Settings(models_dir=models_dir, model_config_file=config))
    client = app.test_client()
    assert "still being loaded" in read(send_body(client, RED, "?label=stable"), 503)["error"]
    app.inference.repository.load()
    assert read(send_body(client, RED))["model"]["version"] == 10
    assert read(send_body(client, RED, "?label=stable"))["model"] == {"name": "m", "version": 2}
    assert read(send_body(client, RED, "?label=canary&model=m"))["model"]["version"] == 10
    for label in ("beta", "Stable"):
        error = read(send_body(client, RED, f"?label={label}"), 400)["error"]
        assert error == f'model m has no label "{label}"; it has canary, stable'


# Expected status in every protocol: 200 for version 7, 404 for another version, 400 for an invalid number.
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
def test_every_protocol_validates_version_numbers_alike(client: FlaskClient, number: str) -> None:
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
        # Under /v1 the path has to match first, like in TensorFlow Serving.
        assert first == others[0] or (
            first.startswith("Malformed request") and not (number.isascii() and number.isdecimal())
        )


@pytest.fixture(scope="module")
def two_models(tmp_path_factory: pytest.TempPathFactory, colours: Path, adder: Path) -> FlaskClient:
    models_dir = tmp_path_factory.mktemp("two")
    shutil.copytree(colours, models_dir / "colours" / "1")
    (models_dir / "colours" / "1" / "assets.extra" / "model.json").unlink()
    shutil.copytree(adder, models_dir / "adder" / "4")
    app = make_app(Settings(models_dir=models_dir))
    app.inference.repository.load()
    return app.test_client()


def test_a_request_must_name_one_of_several_models(two_models: FlaskClient) -> None:
    assert read(send_body(two_models, RED), 400) == {
        "error": "several models are served: adder, colours; choose one with the query parameter model",
        "models": ["adder", "colours"],
    }
    assert read(send_body(two_models, RED, "?model=colours"))["model"] == {"name": "colours", "version": 1}


def test_with_an_empty_models_folder_no_model_is_served(tmp_path: Path) -> None:
    app = make_app(Settings(models_dir=tmp_path))
    app.inference.repository.load()
    client = app.test_client()
    for query in ("", "?version=1"):
        assert read(send_body(client, RED, query), 404) == {"error": "no model is served"}
        assert read(send_files(client, ("image", "a.png", RED), query=query), 404) == {"error": "no model is served"}
    assert 'there is no model "colours"' in read(send_body(client, RED, "?model=colours"), 404)["error"]


def test_without_model_info_class_names_are_numbers(two_models: FlaskClient) -> None:
    (prediction,) = read(send_body(two_models, GREEN, "?model=colours"))["predictions"]
    assert prediction["label"] == "green"
    assert list(prediction["probabilities"]) == ["0", "1", "2"]


def test_a_model_of_other_inputs_refers_to_predict(two_models: FlaskClient) -> None:
    error = read(send_body(two_models, RED, "?model=adder"), 400)["error"]
    assert "is not an image classifier" in error
    assert "/v1/models/adder:predict" in error
