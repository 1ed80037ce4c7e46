from __future__ import annotations

import io
import json
import subprocess
import sys

import numpy as np
import pytest
from flask.testing import FlaskClient
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from werkzeug.exceptions import ServiceUnavailable, TooManyRequests

from serving.api.flask_app import ServingApp
from serving.errors import InvalidRequest, ModelFailed, NotReady, Overloaded
from tests.serving.conftest import PROJECT, encode, picture

PATHS = [
    "/",
    "/predict",
    "/predict?model=colours",
    "/predict?model=%00&version=99999999999999999999",
    "/healthz",
    "/readyz",
    "/metrics",
    "/monitoring/prometheus/metrics",
    "/v1/models",
    "/v1/models/colours",
    "/v1/models/colours/metadata",
    "/v1/models/colours/versions/7",
    "/v1/models/colours:predict",
    "/v1/models/colours/versions/7:predict",
    "/v1/models/colours/versions/x:predict",
    "/static/../../etc/passwd",
]
CONTENT_TYPES = [
    "image/png",
    "image/",
    "multipart/form-data; boundary=x",
    "multipart/form-data",
    "multipart/form-data; boundary=",
    "application/json",
    "application/x-www-form-urlencoded; charset=nonsense",
]
GOOD = picture("red")
FORM = b'--x\r\nContent-Disposition: form-data; name="a"; filename="a.png"\r\n\r\n' + GOOD + b"\r\n--x--\r\n"
JSON = json.dumps({"instances": np.zeros((1, 32, 32, 3), int).tolist()}).encode()


def is_success_or_client_error(response: object) -> bool:
    status = response.status_code  # type: ignore[attr-defined]
    if status >= 400 and response.data:  # type: ignore[attr-defined]  # empty for OPTIONS under /v1
        body = response.get_json()  # type: ignore[attr-defined]
        assert isinstance(body["error"], str)
        assert "Traceback" not in body["error"]
    return bool(200 <= status < 300 or 400 <= status < 500 or status == 503)


@given(
    method=st.sampled_from(["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"]),
    path=st.sampled_from(PATHS) | st.binary(max_size=30).map(lambda path: "/" + path.decode("latin-1")),
    content_type=st.sampled_from(CONTENT_TYPES)
    | st.text(st.characters(max_codepoint=255, exclude_characters="\r\n"), max_size=40),
    body=st.binary(max_size=300) | st.sampled_from([GOOD, FORM, JSON]),
)
@settings(max_examples=400, deadline=None, derandomize=True)
def test_no_request_causes_a_server_error(
    app: ServingApp, method: str, path: str, content_type: str, body: bytes
) -> None:
    # As a WSGI server would pass it: the test client corrects some of its arguments.
    path, _, query = path.partition("?")
    response = app.test_client().open(
        method=method,
        environ_overrides={
            "PATH_INFO": path,
            "QUERY_STRING": query,
            "CONTENT_TYPE": content_type,
            "CONTENT_LENGTH": str(len(body)),
            "wsgi.input": io.BytesIO(body),
        },
    )
    assert is_success_or_client_error(response)


@given(
    whole=st.sampled_from([(FORM, CONTENT_TYPES[2]), (JSON, "application/json")]),
    path=st.sampled_from(["/predict", "/v1/models/colours:predict"]),
    cut=st.floats(0, 1),
    insert=st.binary(max_size=10) | st.sampled_from([b"\r\n", b"--x", b"[", b"]", b"NaN", b"1e999", b'"', b"{"]),
    skip=st.integers(0, 20),
)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_no_damaged_request_causes_a_server_error(
    app: ServingApp, whole: tuple[bytes, str], path: str, cut: float, insert: bytes, skip: int
) -> None:
    data, content_type = whole
    place = int(cut * len(data))
    damaged = data[:place] + insert + data[place + skip :]
    assert is_success_or_client_error(app.test_client().post(path, data=damaged, content_type=content_type))


def test_errors_are_json(client: FlaskClient) -> None:
    missing = client.get("/nowhere")
    assert (missing.status_code, missing.json) == (404, {"error": "there is nothing at /nowhere"})
    wrong = client.get("/predict")
    assert (wrong.status_code, wrong.json) == (405, {"error": "/predict takes POST, not GET"})
    assert "POST" in wrong.headers["Allow"]
    assert client.delete("/healthz").json == {"error": "/healthz takes GET, not DELETE"}
    assert client.head("/healthz").status_code == 200
    assert client.options("/predict").status_code == 200


def test_an_internal_error_is_logged_and_hides_its_details(
    app: ServingApp, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    repository = app.inference.repository

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(repository, "resolve", fail)
    response = app.test_client().post("/predict", data=GOOD, content_type="image/png")
    assert response.status_code == 500
    assert response.json == {"error": "internal error; the reason is in the service's log"}
    assert "secret detail" in caplog.text
    assert "POST /predict" in caplog.text


def test_a_model_error_keeps_its_status(app: ServingApp, monkeypatch: pytest.MonkeyPatch) -> None:
    version = app.inference.repository.resolve("colours")

    def run_out(*_: object, **__: object) -> None:
        raise ModelFailed("out of memory", code="RESOURCE_EXHAUSTED")

    monkeypatch.setattr(version.predictor, "predict", run_out)
    response = app.test_client().post("/predict", data=GOOD, content_type="image/png")
    assert (response.status_code, response.json) == (429, {"error": "out of memory"})


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ModelFailed("out of memory", code="RESOURCE_EXHAUSTED"), (429, "1")),
        (ModelFailed("gone", code="UNAVAILABLE"), (503, "1")),
        (NotReady("loading"), (503, "1")),
        (Overloaded("full", shed_reason="queue_full", retry_after_s=7), (503, "7")),
        (TooManyRequests(), (429, "1")),
        (TooManyRequests(retry_after=9), (429, "9")),
        (ServiceUnavailable(), (503, "1")),
        (ModelFailed("late", code="DEADLINE_EXCEEDED"), (504, None)),
        (InvalidRequest("wrong"), (400, None)),
    ],
    ids=repr,
)
def test_every_503_and_429_has_retry_after(
    app: ServingApp, monkeypatch: pytest.MonkeyPatch, error: Exception, expected: tuple[int, str | None]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(app.inference.repository, "resolve", fail)
    for path in ("/predict", "/v1/models/colours:predict", "/v2/models/colours/infer"):
        response = app.test_client().post(path, data=b'{"instances": []}', content_type="image/png")
        assert (response.status_code, response.headers.get("Retry-After")) == expected, path


def test_json_is_exact_for_float32(app: ServingApp) -> None:
    values = np.random.default_rng(0).random(1000, dtype=np.float32)
    with app.app_context():
        text = app.json.dumps({"list": list(values), "array": values, "nan": np.float32("nan")})
    body = json.loads(text)
    np.testing.assert_array_equal(np.float32(body["list"]), values)
    np.testing.assert_array_equal(np.float32(body["array"]), values)
    assert body["nan"] is None


def test_the_app_does_not_import_tensorflow() -> None:
    code = "import sys, serving.__main__, serving.app; sys.exit('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=PROJECT).returncode == 0


def test_one_request_may_mix_image_formats(client: FlaskClient) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = {
        kind: (io.BytesIO(encode(Image.fromarray(noise), kind)), f"noise.{kind.lower()}")
        for kind in ("JPEG", "PNG", "WEBP", "BMP", "GIF")
    }
    response = client.post("/predict", data=data)
    assert response.status_code == 200
    assert response.json is not None
    assert len(response.json["predictions"]) == 5
