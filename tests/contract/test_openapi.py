"""The OpenAPI document describes the app's routes, and responses are as it describes them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from flask.testing import FlaskClient

from serving.api.flask_app import ServingApp
from serving.api.operation import COMMON_ERRORS
from serving.api.predict.messages import QUERY_PARAMETERS
from serving.api.tensorflow_serving.operations import CALLS
from serving.app import make_app
from serving.open_inference.tensors import DATATYPES
from serving.settings import Settings
from tests.serving.access.test_tokens import hash_of, write
from tests.serving.conftest import app, client, colours

__all__ = ["app", "client", "colours"]  # fixtures of tests/serving

HTTP = Path(__file__).parents[2] / "serving" / "http"
ARGUMENT = re.compile(r"<(?:\w+:)?(\w+)>")


@pytest.fixture(scope="module")
def document(app: ServingApp) -> Any:
    return app.test_client().get("/openapi.json").json


def test_it_describes_every_route_and_no_other(app: ServingApp, document: Any) -> None:
    described = {(path, method) for path, methods in document["paths"].items() for method in methods}
    routes = {
        (ARGUMENT.sub(r"{\1}", rule.rule).rstrip("/") or "/", method.lower())
        for rule in app.url_map.iter_rules()
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}
    }
    # One rule for all methods: its paths are in the dispatcher's table.
    dispatched = {(path, method) for path, method in described if path.startswith("/v1/")}
    assert [rule.endpoint for rule in app.url_map.iter_rules() if not rule.methods] == [
        "tensorflow_serving.respond"
    ] * 2
    assert described - dispatched == routes
    assert {operation.endpoint for operation in app.operations} == {rule.endpoint for rule in app.url_map.iter_rules()}


def test_every_path_under_v1_is_dispatched(document: Any, client: FlaskClient) -> None:
    paths = [(path, method) for path, methods in document["paths"].items() if path[:4] == "/v1/" for method in methods]
    assert len(paths) == 3 * (len(CALLS) + 2)
    for path, method in paths:
        response = client.open(
            path.format(model="nobody", version=7, label="stable"), method=method, json={"examples": [{}]}
        )
        assert "Malformed request" not in response.text, path
    assert client.post("/v1/models/nobody:explain", json={}).status_code == 400


def test_parameters_and_datatypes_are_those_that_are_parsed(document: Any) -> None:
    predict = document["paths"]["/predict"]["post"]
    assert {each["name"] for each in predict["parameters"] if each["in"] == "query"} == set(QUERY_PARAMETERS)
    form = predict["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert form["properties"]["image"]["maxItems"] == 5  # the app's setting
    infer = document["paths"]["/v2/models/{model}/infer"]["post"]["requestBody"]["content"]["application/json"]
    tensor = infer["schema"]["properties"]["inputs"]["items"]
    assert tensor["properties"]["datatype"]["enum"] == [datatype.name for datatype in DATATYPES.values()]


def test_every_refusal_by_the_http_server_is_described(document: Any) -> None:
    sources = "".join(path.read_text() for path in HTTP.glob("*.py"))
    statuses = set(map(int, re.findall(r'"([45]\d\d) [A-Z][A-Za-z ]+"', sources)))
    assert statuses == {400, 408, 431, 500, 501, 505}
    assert "refused with 501" in document["info"]["description"]  # an unknown method belongs to no path
    refusals = (statuses - {501}) | {413, 503}  # `refusal_response`
    assert refusals == set(COMMON_ERRORS)
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            assert refusals <= set(map(int, operation["responses"])), (method, path)


def test_the_examples_are_predicted(document: Any, client: FlaskClient) -> None:
    operation = document["paths"]["/v1/models/{model}:predict"]["post"]
    model = next(each["example"] for each in operation["parameters"] if each["name"] == "model")
    example = operation["requestBody"]["content"]["application/json"]["example"]
    response = client.post(f"/v1/models/{model}:predict", json=example)
    assert response.json is not None
    assert response.json["outputs"]["label"] == ["red"]


def test_the_page_shows_every_route_and_loads_only_files_of_the_service(document: Any, client: FlaskClient) -> None:
    page = client.get("/docs")
    assert (page.status_code, page.mimetype) == (200, "text/html")
    for path in document["paths"]:
        assert f"<code>{path}</code>" in page.text
    links = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert links
    for link in links:
        assert client.get(f"/{link.removeprefix('./')}").status_code == 200, link
    assert "<script" not in page.text
    assert "default-src 'none'" in page.headers["Content-Security-Policy"]


def test_the_document_names_the_prefix_of_the_urls(client: FlaskClient) -> None:
    response = client.get("/openapi.json", environ_overrides={"SCRIPT_NAME": "/models-api"})
    assert response.json is not None
    assert response.json["servers"] == [{"url": "/models-api"}]


def test_access_control_is_described_where_it_is_on(document: Any, tmp_path: Path) -> None:
    assert not {"401", "403", "429"} & document["paths"]["/models.json"]["get"]["responses"].keys()
    assert "security" not in document["paths"]["/models.json"]["get"]
    (tmp_path / "models").mkdir()
    tokens = write(tmp_path / "tokens", f"shop predict {hash_of('secret')}")
    app = make_app(Settings(models_dir=tmp_path / "models", auth_token_file=tokens, rate_limit=100, url_prefix="/api"))
    headers = {"Authorization": "Bearer secret"}
    described: Any = app.test_client().get("/api/openapi.json", headers=headers).json
    assert described["servers"] == [{"url": "/api"}]
    closed = described["paths"]["/models.json"]["get"]
    assert closed["responses"].keys() >= {"401", "403", "429"}
    assert "Retry-After" in closed["responses"]["429"]["headers"]
    assert closed["security"] == [{"token": []}]
    assert described["components"]["securitySchemes"]["token"] == {"type": "http", "scheme": "bearer"}
    for path in ("/healthz", "/readyz", "/v2/health/live", "/v2/health/ready"):
        assert not {"401", "403", "429"} & described["paths"][path]["get"]["responses"].keys()
