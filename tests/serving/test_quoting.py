"""Error messages in responses do not contain paths of the server."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from serving.api.flask_app import ServingApp
from serving.errors import ServingError
from serving.quoting import hide_paths
from tests.serving.conftest import picture


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (
            "cannot read /srv/models/m/1/saved_model.pb: Input/output error",
            "cannot read saved_model.pb: Input/output error",
        ),
        (
            "NOT_FOUND: /srv/data/vocab.txt; No such file or directory",
            "NOT_FOUND: vocab.txt; No such file or directory",
        ),
        ("('/opt/x/a.py', '/opt/x')", "('a.py', 'x')"),
        ("in file:///srv/x/y", "in file://y"),
        ("no folder /srv/x/", "no folder x"),
        # Not a path
        (
            "send it to http://127.0.0.1:8501/v1/models/m:predict",
            "send it to http://127.0.0.1:8501/v1/models/m:predict",
        ),
        ("node model/dense/MatMul, 3/4 of 1/2", "node model/dense/MatMul, 3/4 of 1/2"),
        ("expected image/png, or I/O", "expected image/png, or I/O"),
    ],
)
def test_absolute_paths_are_shortened_to_their_last_name(text: str, shown: str) -> None:
    assert hide_paths(text) == shown


@pytest.mark.parametrize("is_absolute", [True, False])
def test_known_folders_are_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_absolute: bool) -> None:
    (tmp_path / "real models").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real models")
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "link" if is_absolute else Path("link")
    for path in ("link", tmp_path / "link", tmp_path / "real models"):
        if is_absolute and path == "link":
            continue
        assert (
            hide_paths(f"no {path}/7/x.pb, '{path}'", {folder: r"the m\odel"}) == r"no the m\odel/7/x.pb, 'the m\odel'"
        )
    assert hide_paths("links and a/link", {folder: "m"}) == "links and a/link"


def test_an_error_of_a_kernel_does_not_contain_paths(app: ServingApp, monkeypatch: pytest.MonkeyPatch) -> None:
    import tensorflow as tf

    from serving.inference.saved_model import _to_serving_error

    error = _to_serving_error(
        tf.errors.NotFoundError(None, None, "/srv/secret/assets/vocab.txt; No such file or directory")
    )
    assert (str(error), error.code) == ("vocab.txt; No such file or directory", "NOT_FOUND")

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(app.inference.repository.resolve("colours").predictor, "predict", fail)
    response = app.test_client().post("/predict", data=picture("red"), content_type="image/png")
    assert os.sep not in response.json["error"]  # type: ignore[index]
    assert isinstance(error, ServingError)
