from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from serving.app import make_app
from serving.inference.local import LocalRepository
from serving.inference.model_config import ModelsFolder
from serving.inference.saved_model import SavedModelPredictor
from serving.inference.signatures import Signature, TensorSpec
from serving.inference.version_loader import InProcessLoader
from serving.settings import Settings
from tests.serving.saved_models import save_colour_classifier

STATIC = Path(__file__).parents[4] / "serving" / "api" / "web" / "static"

COLOURS = {
    "name": "colours",
    "available": True,
    "loading": False,
    "problem": None,
    "version": 7,
    "height": 32,
    "width": 32,
    "class_names": ["red", "green", "blue"],
    "explains": False,
    "dataset": None,
    "test_accuracy": None,
}


def models_in(page: TestResponse) -> Any:
    """Return the models that are embedded in the page."""
    found = re.search(r'<script id="models" type="application/json">(.*?)</script>', page.text, re.DOTALL)
    assert found
    return json.loads(found[1])


def test_the_page_embeds_the_models(client: FlaskClient) -> None:
    page = client.get("/")
    assert (page.status_code, page.mimetype) == (200, "text/html")
    assert models_in(page) == client.get("/models.json").json == [COLOURS]


def test_the_image_size_comes_from_the_signature(tmp_path: Path) -> None:
    save_colour_classifier(tmp_path / "wide" / "1", size=(20, 48), card=False)
    app = make_app(Settings(models_dir=tmp_path))
    app.inference.repository.load()
    (model,) = app.test_client().get("/models.json").json or []
    assert (model["height"], model["width"], model["class_names"]) == (20, 48, ["0", "1", "2"])


def test_a_model_with_heat_maps_explains(tmp_path: Path) -> None:
    save_colour_classifier(tmp_path / "colours" / "1", explain=True)
    app = make_app(Settings(models_dir=tmp_path))
    app.inference.repository.load()
    (model,) = app.test_client().get("/models.json").json or []
    assert model["explains"] is True


def test_valid_parts_of_the_model_info_are_shown(models_dir: Path) -> None:
    info = models_dir / "colours" / "10" / "assets.extra" / "model.json"

    def described(text: str) -> tuple[object, object, object]:
        info.write_text(text)
        app = make_app(Settings(models_dir=models_dir))
        app.inference.repository.load()
        (model,) = app.test_client().get("/models.json").json or []
        return model["class_names"], model["dataset"], model["test_accuracy"]

    names = ["a", "</script><script>alert(1)</script>", "c"]
    whole = {"class_names": names, "dataset": {"name": "paint"}, "test": {"accuracy": 0.75}}
    assert described(json.dumps(whole)) == (names, "paint", 0.75)
    numbers = ["0", "1", "2"]
    assert described('{"dataset": "paint", "test": {"accuracy": "high"}}') == (numbers, None, None)
    assert described('{"class_names": 3, "dataset": {"name": 1}, "test": null}') == (numbers, None, None)


def test_class_names_are_escaped(models_dir: Path) -> None:
    names = ["</script><script>alert(1)</script>", "<!--", "'&\""]
    (models_dir / "colours" / "10" / "assets.extra" / "model.json").write_text(json.dumps({"class_names": names}))
    app = make_app(Settings(models_dir=models_dir))
    app.inference.repository.load()
    page = app.test_client().get("/")
    (model,) = models_in(page)
    assert model["class_names"] == names
    assert "alert(1)</script>" not in page.text


def test_models_that_cannot_classify_images_have_a_problem(models_dir: Path, adder: Path) -> None:
    shutil.copytree(adder, models_dir / "adder" / "1")
    app = make_app(Settings(models_dir=models_dir))
    client = app.test_client()
    for model in client.get("/models.json").json or []:
        assert model["loading"]
        assert f"model {model['name']} is still being loaded" in model["problem"]
    app.inference.repository.load()
    takes_none, takes_some = client.get("/models.json").json or []
    assert (takes_none["name"], takes_none["available"], takes_none["loading"]) == ("adder", True, False)
    assert "is not an image classifier" in takes_none["problem"]
    assert (takes_some["name"], takes_some["version"], takes_some["problem"]) == ("colours", 10, None)


def test_a_model_that_failed_to_load_has_its_reason(models_dir: Path, adder: Path) -> None:
    shutil.copytree(adder, models_dir / "adder" / "1")
    for version in ("2", "10"):
        (models_dir / "colours" / version / "saved_model.pb").write_bytes(b"\xff")
    app = make_app(Settings(models_dir=models_dir))
    app.inference.repository.load()
    _, broken = app.test_client().get("/models.json").json or []
    assert (broken["name"], broken["available"], broken["loading"]) == ("colours", False, False)
    assert "Can't parse" in broken["problem"]


@pytest.mark.parametrize("shape", [None, (None, None)])
def test_the_model_info_has_the_number_of_classes_if_the_signature_has_not(
    models_dir: Path, shape: tuple[int | None, ...] | None
) -> None:
    outputs = {
        "probabilities": TensorSpec("probabilities", "DT_FLOAT", shape, "p:0"),
        "class_id": TensorSpec("class_id", "DT_INT64", (None,), "c:0"),
        "label": TensorSpec("label", "DT_STRING", (None,), "l:0"),
    }
    images = TensorSpec("images", "DT_UINT8", (None, 8, 9, 3), "i:0")

    class UncountedPredictor(SavedModelPredictor):
        signatures = {"serving_default": Signature("serving_default", "predict", {"images": images}, outputs)}  # noqa: RUF012

        def __init__(self, path: Path) -> None:
            pass

    for version in (2, 10):
        (models_dir / "colours" / str(version) / "assets.extra" / "tf_serving_warmup_requests").unlink()
    app = make_app(Settings(models_dir=models_dir))
    repository = LocalRepository(ModelsFolder(models_dir), loader=InProcessLoader(UncountedPredictor))
    app.inference.repository = repository
    repository.load()
    (model,) = app.test_client().get("/models.json").json or []
    assert (model["height"], model["width"], model["class_names"]) == (8, 9, ["red", "green", "blue"])
    (models_dir / "colours" / "10" / "assets.extra" / "model.json").unlink()
    repository = LocalRepository(ModelsFolder(models_dir), loader=InProcessLoader(UncountedPredictor))
    app.inference.repository = repository
    repository.load()
    (model,) = app.test_client().get("/models.json").json or []
    assert model["class_names"] == []


@pytest.mark.parametrize("path", ["/", "/models.json", "/static/page.js", "/static/page.css", "/static/missing.js"])
def test_every_response_has_a_strict_content_security_policy(client: FlaskClient, path: str) -> None:
    headers = client.get(path).headers
    policy = dict(part.split(" ", 1) for part in headers["Content-Security-Policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["require-trusted-types-for"] == "'script'"
    assert "unsafe" not in headers["Content-Security-Policy"]
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer"


def test_static_files_have_their_type_and_an_etag(client: FlaskClient) -> None:
    types = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
    for file in STATIC.iterdir():
        response = client.get(f"/static/{file.name}")
        assert response.data == file.read_bytes()
        assert response.mimetype == types[file.suffix]
        assert response.headers["Cache-Control"] == "no-cache"
        again = client.get(f"/static/{file.name}", headers={"If-None-Match": response.headers["ETag"]})
        assert (again.status_code, again.data) == (304, b"")


def test_no_other_files_are_served(client: FlaskClient) -> None:
    for path in ("/static/", "/static/../pages.py", "/static/%2e%2e/pages.py", "/static/a%00b", "/templates/page.html"):
        response = client.get(path)
        assert response.status_code == 404
        assert "nothing at" in (response.json or {})["error"]
