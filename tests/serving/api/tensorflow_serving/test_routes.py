from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from flask.testing import FlaskClient
from werkzeug.test import EnvironBuilder, TestResponse, run_wsgi_app

from serving.app import make_app
from serving.settings import Settings
from tests.serving.conftest import PROJECT

GOLDEN = PROJECT / "tests" / "contract" / "golden"
PREDICT = "/v1/models/multi:predict"
ONE = {"signature_name": "one", "inputs": [1, 2]}  # the outputs are [1.0, 0.5]


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> FlaskClient:
    """A client of an app that serves `multi`, versions 1 and 3, which has signatures of many dtypes."""
    models_dir = tmp_path_factory.mktemp("models")
    for version in ("1", "3"):
        shutil.copytree(GOLDEN / "multi" / "1", models_dir / "multi" / version)
    app = make_app(Settings(models_dir=models_dir))
    app.inference.repository.load()
    return app.test_client()


def post(client: FlaskClient, body: Any, path: str = PREDICT, **headers: str) -> TestResponse:
    data = body if isinstance(body, (bytes, str)) else json.dumps(body)
    return client.post(path, data=data, headers={name.replace("_", "-"): value for name, value in headers.items()})


def error(response: TestResponse, status: int = 400) -> str:
    assert response.status_code == status
    assert response.mimetype == "application/json"
    assert response.json is not None
    assert response.json.keys() == {"error"}
    return str(response.json["error"])


@pytest.mark.parametrize("content_type", ["application/json", "text/plain", "application/x-www-form-urlencoded", "x"])
def test_the_content_type_of_a_request_is_ignored(golden: FlaskClient, content_type: str) -> None:
    response = post(golden, ONE, Content_Type=content_type)
    assert response.json == {"outputs": [1.0, 0.5]}
    assert response.content_type == "application/json"


def test_the_response_has_the_format_of_the_request(golden: FlaskClient) -> None:
    rows = post(golden, {"instances": [{"a": [1, 4], "name_bytes": {"b64": "aGk="}}]})
    columns = post(golden, {"inputs": {"a": [[1, 4]], "name_bytes": ["hi"]}})
    (row,) = rows.json["predictions"]  # type: ignore[index]
    assert row.keys() == {"blob_bytes", "dbl", "flag", "idx", "root", "tag"}
    assert (row["blob_bytes"], row["tag"], row["flag"], row["root"]) == ({"b64": "aGk="}, "hi!", True, [1.0, 2.0])
    assert columns.json == {"outputs": {name: [value] for name, value in row.items()}}


def test_an_output_without_rows_needs_the_columnar_format(golden: FlaskClient) -> None:
    assert post(golden, {"signature_name": "two", "inputs": [1, 2]}).json == {"outputs": {"s": 3.0, "y": [2.0, 4.0]}}
    message = error(post(golden, {"signature_name": "two", "instances": [1, 2]}))
    assert message.splitlines()[0] == "Tensor name: s has no shape information "


def test_64_bit_integers_are_exact(golden: FlaskClient) -> None:
    limits = [2**63 - 1, -(2**63)]
    rows = post(golden, {"signature_name": "ints", "instances": limits}).json["predictions"]  # type: ignore[index]
    assert [row["i64"] for row in rows] == limits


def test_strings_that_are_not_utf8_round_trip(golden: FlaskClient) -> None:
    response = post(golden, b'{"instances":[{"a":[1,4],"name_bytes":"caf\xe9"}]}')
    assert response.status_code == 200
    assert b'"tag":"caf\xe9!"' in response.data
    assert b'"b64":"Y2Fm6Q=="' in response.data


BOTH = (
    'JSON Value: {\n    "instances": 1,\n    "inputs": 2\n} Not formatted correctly expecting only one of '
    "'inputs' or 'instances' keys to exist "
)
NO_NAME = (
    'JSON Value: {\n    "signature_name": null\n} not formatted correctly. '
    "'signature_name' key must be a string value."
)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("", "JSON Parse error: The document is empty"),
        ("[1]", "JSON Value: [1] Is not object"),
        ({"signature_name": "x", "instances": [1]}, 'Serving signature name: "x" not found in signature def'),
        (b'{"signature_name":"\xff"}', 'Serving signature name: "?" not found in signature def'),
        (
            {"signature_name": "__saved_model_init_op", "instances": [1]},
            "Failed to get input map for signature: __saved_model_init_op",
        ),
        ({"signature_name": "one"}, "Missing 'inputs' or 'instances' key"),
        ({"instances": 1, "inputs": 2}, BOTH),
        ({"signature_name": None}, NO_NAME),
        ({"signature_name": "half", "inputs": [1.5]}, "Failed to write JSON value for tensor type: half"),
        ({"signature_name": "ints", "inputs": 1}, "input i: expected int64 (n,), got int64 ()"),
        ("[" * 1_000_000, "JSON Parse error: the document is nested deeper than 300 levels"),
    ],
)
def test_invalid_requests_are_400_with_the_reason(golden: FlaskClient, body: Any, message: str) -> None:
    assert error(post(golden, body)) == message


def test_an_invalid_document_is_reported_before_an_unknown_model(golden: FlaskClient) -> None:
    for path in ("/v1/models/nope:predict", "/v1/models/nope/labels/x:predict", "/v1/models/nope/versions/1:classify"):
        assert error(post(golden, "", path)) == "JSON Parse error: The document is empty"
    assert error(post(golden, ONE, "/v1/models/nope:predict"), 404) == "Servable not found for request: Latest(nope)"
    assert error(post(golden, ONE, "/v1/models/multi/versions/7:predict"), 404) == (
        "Servable not found for request: Specific(multi, 7)"
    )
    assert error(post(golden, ONE, "/v1/models/nope/labels/x:predict")) == "Unrecognized servable version label: x"


def test_classify_and_regress_check_the_signature(golden: FlaskClient) -> None:
    examples = {"examples": [{"x": 1}]}
    assert error(post(golden, examples, "/v1/models/multi:classify")) == "Expected one input Tensor."
    message = error(post(golden, {**examples, "signature_name": "one"}, "/v1/models/multi:regress"))
    assert message.splitlines()[0] == "No regression inputs found in SignatureDef: inputs {"


@pytest.mark.parametrize(
    "path",
    [
        "/v1/models/multi:predict",
        "/v1/models/multi/versions/3:predict",
        "/v1/models/multi/versions/0003:predict",
        "/V1/MODELS/multi/Versions/3:predict",
        "/v1/models/%6Dulti:predict",
    ],
)
def test_predict_paths(golden: FlaskClient, path: str) -> None:
    assert post(golden, ONE, path).json == {"outputs": [1.0, 0.5]}


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/models/multi:PREDICT"),
        ("POST", "/v1/models/multi:explain"),
        ("POST", "/v1/models/multi:predict?a=1"),
        ("POST", "/v1/models/multi:predict/"),
        ("POST", "/v1/models/multi/versions/x:predict"),
        ("POST", "/v1/models/multi/versions/٣:predict"),
        ("POST", "/v1/models/multi/versions/1/labels/a:predict"),
        ("POST", "/v1/models/:predict"),
        ("POST", "/v1//models/multi:predict"),
        ("POST", "/v1/models/multi"),
        ("POST", "/v1/models/multi/metadata"),
        ("GET", "/v1/models/multi:predict"),
        ("GET", "/v1/models/multi/"),
        ("GET", "/v1/models//multi"),
        ("GET", "/v1/models/"),
        ("GET", "/v1/"),
        ("GET", "/v1///"),
        ("GET", "/V1/x"),
        ("PUT", "/v1/models/multi:predict"),
        ("DELETE", "/v1/models/multi"),
        ("PATCH", "/v1/models/multi"),
    ],
)
def test_other_paths_and_methods_are_malformed_requests(golden: FlaskClient, method: str, path: str) -> None:
    assert error(golden.open(path, method=method, data="{}")) == f"Malformed request: {method} {path}"


@pytest.mark.parametrize("sent_as", ["REQUEST_URI", "RAW_URI", None])
def test_raw_paths_are_matched_under_any_wsgi_server(golden: FlaskClient, sent_as: str | None) -> None:
    def get(path: str) -> tuple[str, Any]:
        environ = EnvironBuilder(path).get_environ()
        target = environ.pop("REQUEST_URI")
        del environ["RAW_URI"]
        if sent_as:
            environ[sent_as] = target
        chunks, status, _ = run_wsgi_app(golden.application, environ, buffered=True)
        return status[:3], json.loads(b"".join(chunks)).get("error")

    assert get("/v1/models/%6Dulti/versions/3") == ("200", None)
    assert get("/v1/models/multi?x=1") == ("404", "Could not find any versions of model multi?x=1")
    assert get("/v1/models/caf%C3%A9") == ("404", "Could not find any versions of model café")
    assert get("/v1/models/multi/labels/st%61ble/metadata") == ("400", "Unrecognized servable version label: stable")
    if sent_as:
        assert get("/v1/models/m%2Fx") == ("404", "Could not find any versions of model m/x")


def test_other_methods(golden: FlaskClient) -> None:
    assert golden.head("/v1/models/multi").status_code == 400
    for method in ("TRACE", "BREW"):
        error(golden.open(PREDICT, method=method), 501)
    origins = {"http://a.test": 200, "https://a.test": 200, "null": 400, "": 400}
    for origin, status in origins.items():
        response = golden.options(PREDICT, headers={"Origin": origin})
        assert (response.status_code, response.data) == (status, b"")


def test_status_lists_loaded_versions(golden: FlaskClient) -> None:
    available = {"version": "3", "state": "AVAILABLE", "status": {"error_code": "OK", "error_message": ""}}
    for path in (
        "/v1/models/multi",
        "/v1/models/multi/versions/3",
        "/v1/models/multi/labels/any",
        "/v1/Models/multi/METADATA",  # "/metadata" is case-sensitive
    ):
        assert golden.get(path).json == {"model_version_status": [available]}
    assert error(golden.get("/v1/models/multi/versions/1"), 404) == "Could not find version 1 of model multi"
    assert error(golden.get("/v1/models/nope"), 404) == "Could not find any versions of model nope"
    assert error(golden.get("/v1/models/multi?x=1"), 404) == "Could not find any versions of model multi?x=1"
    for path in ("/v1/models", "/v1/models/versions/1", "/v1/models/labels/x", "/v1/models/versions/1/metadata"):
        assert error(golden.get(path)) == "Missing model name in request."


def test_metadata_has_every_signature(golden: FlaskClient) -> None:
    metadata = golden.get("/v1/models/multi/versions/3/metadata").json
    assert metadata is not None
    assert metadata["model_spec"] == {"name": "multi", "signature_name": "", "version": "3"}
    signatures = metadata["metadata"]["signature_def"]["signature_def"]
    assert signatures.keys() == {"__saved_model_init_op", "half", "ints", "one", "scalar", "serving_default", "two"}
    assert signatures["one"] == {
        "inputs": {
            "x": {
                "name": "one_x:0",
                "dtype": "DT_FLOAT",
                "tensor_shape": {"dim": [{"size": "-1", "name": ""}], "unknown_rank": False},
            }
        },
        "outputs": {
            "y": {
                "name": "PartitionedCall_2:0",
                "dtype": "DT_FLOAT",
                "tensor_shape": {"dim": [{"size": "-1", "name": ""}], "unknown_rank": False},
            }
        },
        "method_name": "tensorflow/serving/predict",
        "defaults": {},
    }


@pytest.mark.parametrize("number", [str(2**63), "9" * 5_000])
def test_a_version_number_out_of_range_is_refused(golden: FlaskClient, number: str) -> None:
    shown = number if len(number) < 40 else f"{number[:40]}..."
    message = f"the version must be a whole number from 0 to 9223372036854775807, not '{shown}'"
    assert error(post(golden, ONE, f"/v1/models/multi/versions/{number}:predict")) == message
    assert error(golden.get(f"/v1/models/multi/versions/{number}")) == message
    assert error(golden.get(f"/v1/models/nope/versions/{number}/metadata")) == message


@pytest.mark.parametrize("encoding", ["gzip", "x-gzip", "deflate, gzip"])
def test_gzip_bodies_are_decompressed(golden: FlaskClient, encoding: str) -> None:
    body = gzip.compress(json.dumps(ONE).encode())
    assert post(golden, body, Content_Encoding=encoding).json == {"outputs": [1.0, 0.5]}


def test_an_invalid_gzip_body_counts_as_empty(golden: FlaskClient) -> None:
    body = gzip.compress(json.dumps(ONE).encode())
    damaged = body[:-8] + bytes(8)
    for broken in (json.dumps(ONE).encode(), body[:-9], damaged, body + body, b""):
        assert error(post(golden, broken, Content_Encoding="gzip")) == "JSON Parse error: The document is empty"


def test_a_decompression_bomb_is_413(golden: FlaskClient) -> None:
    bomb = gzip.compress(bytes(100 * 1024 * 1024 + 1))
    assert len(bomb) < 200_000
    assert "104,857,600 bytes" in error(post(golden, bomb, Content_Encoding="gzip"), 413)


def test_a_model_that_is_loading_is_503(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "multi", tmp_path / "multi")
    client = make_app(Settings(models_dir=tmp_path)).test_client()
    assert "still being loaded" in error(post(client, ONE), 503)
    status = client.get("/v1/models/multi").json
    assert status is not None
    assert [version["state"] for version in status["model_version_status"]] == ["START"]
