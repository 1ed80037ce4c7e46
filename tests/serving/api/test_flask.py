"""The app is Flask's: hooks, sessions, blueprints and URLs work as Flask documents them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from flask import Blueprint, Flask, Response, abort, g, redirect, request, request_tearing_down, session, url_for
from werkzeug.middleware.dispatcher import DispatcherMiddleware
from werkzeug.test import Client

from serving.app import make_app
from serving.settings import Settings


@pytest.fixture
def app(tmp_path: Path) -> Flask:
    folder = tmp_path / "m" / "1"
    folder.mkdir(parents=True)
    (folder / "saved_model.pb").touch()  # never loaded
    return make_app(Settings(models_dir=tmp_path))


def test_a_before_request_hook_can_refuse_any_request(app: Flask) -> None:
    @app.before_request
    def authenticate() -> None:
        if request.headers.get("Authorization") != "Bearer secret":
            abort(401)

    client = app.test_client()
    for path in ("/", "/healthz", "/v1/models/m", "/v2", "/metrics", "/nothing"):
        assert client.get(path).status_code == 401, path
    assert client.post("/predict", data=b"").status_code == 401
    authorized = {"Authorization": "Bearer secret"}
    assert client.get("/healthz", headers=authorized).status_code == 200
    assert client.get("/nothing", headers=authorized).status_code == 404


def test_every_kind_of_hook_is_called_once(app: Flask) -> None:
    called: list[str] = []
    app.url_value_preprocessor(lambda *_: called.append("url"))
    app.before_request(lambda: called.append("before"))

    @app.after_request
    def after(response: Response) -> Response:
        called.append("after")
        return response

    app.teardown_request(lambda _: called.append("teardown"))
    app.teardown_appcontext(lambda _: called.append("app"))

    def tear_down(*_: object, **__: object) -> None:
        called.append("signal")

    with request_tearing_down.connected_to(tear_down, app):
        app.test_client().get("/healthz")
    assert called == ["url", "before", "after", "teardown", "signal", "app"]


def test_the_teardown_signal_is_sent_without_hooks(app: Flask) -> None:
    sent: list[object] = []
    with request_tearing_down.connected_to(lambda *_, **__: sent.append(1), app):
        app.test_client().get("/healthz")
    assert sent == [1]


def test_a_failing_teardown_leaves_no_request_in_flight(app: Flask) -> None:
    @app.teardown_request
    def fail(_: object) -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        app.test_client().get("/healthz")
    app.teardown_request_funcs.clear()
    assert "serving_requests_in_flight 1.0" in app.test_client().get("/metrics").text


def test_a_users_blueprint_works(app: Flask) -> None:
    blueprint = Blueprint("mine", __name__, url_prefix="/mine")

    @blueprint.url_value_preprocessor
    def take_language(_: str | None, values: dict[str, Any] | None) -> None:
        g.language = (values or {}).pop("language")

    @blueprint.errorhandler(403)
    def forbidden(_: object) -> tuple[str, int]:
        return "not yours", 403

    @blueprint.post("/<language>/echo")
    def echo() -> dict[str, Any]:
        return {"language": g.language, "text": request.get_data(as_text=True)}

    @blueprint.post("/<language>/form")
    def form() -> dict[str, Any]:
        return {"form": request.form.to_dict(), "json": request.get_json(silent=True)}

    @blueprint.post("/<language>/twice")
    def twice() -> dict[str, Any]:
        return {"first": request.get_data().decode(), "second": request.get_data(as_text=True)}

    @blueprint.get("/<language>/secret")
    def secret() -> str:
        abort(403)

    app.register_blueprint(blueprint)
    client = app.test_client()
    for _ in range(2):  # a hook that pops URL values does not change the next request
        assert client.post("/mine/en/echo", data="hi").json == {"language": "en", "text": "hi"}
    assert client.post("/mine/en/form", data={"a": "b"}).json == {"form": {"a": "b"}, "json": None}
    assert client.post("/mine/en/form", json=[1]).json == {"form": {}, "json": [1]}
    assert client.post("/mine/en/twice", data="hi").json == {"first": "hi", "second": "hi"}
    assert (client.get("/mine/en/secret").status_code, client.get("/mine/en/secret").text) == (403, "not yours")


def test_max_content_length_applies_to_every_way_to_read_a_body(app: Flask) -> None:
    app.config["MAX_CONTENT_LENGTH"] = 10
    app.add_url_rule("/text", view_func=lambda: request.get_data(as_text=True), methods=["POST"], endpoint="text")
    app.add_url_rule("/form", view_func=lambda: str(len(request.form)), methods=["POST"], endpoint="form")
    client = app.test_client()
    assert client.post("/text", data="0123456789").text == "0123456789"
    assert client.post("/text", data="0123456789a").status_code == 413
    assert client.post("/form", data={"a": "0123456789"}).status_code == 413


def test_sessions_work(app: Flask) -> None:
    app.secret_key = "x"

    @app.get("/count")
    def count() -> str:
        session["count"] = session.get("count", 0) + 1
        return str(session["count"])

    client = app.test_client()
    assert [client.get("/count").text for _ in range(3)] == ["1", "2", "3"]
    assert app.test_client().get("/count").text == "1"


def test_urls_have_the_host_and_the_mount_path(app: Flask) -> None:
    @app.get("/there")
    def there() -> str:
        return url_for("there", _external=True)

    @app.get("/here")
    def here() -> Any:
        return redirect(url_for("there"))

    client = Client(DispatcherMiddleware(app, {"/mounted": app}))
    assert client.get("/there", base_url="https://example.org").text == "https://example.org/there"
    assert client.get("/mounted/there").text == "http://localhost/mounted/there"
    assert client.get("/mounted/here").headers["Location"] == "/mounted/there"


def test_trusted_hosts_are_enforced(app: Flask) -> None:
    app.config["TRUSTED_HOSTS"] = ["example.org"]
    client = app.test_client()
    assert client.get("/healthz", base_url="http://example.org").status_code == 200
    assert client.get("/healthz", base_url="http://example.com").status_code == 400


def test_options_lists_the_allowed_methods(app: Flask) -> None:
    response = app.test_client().options("/healthz")
    assert response.status_code == 200
    assert {"GET", "HEAD", "OPTIONS"} <= set(response.headers["Allow"].split(", "))


def test_an_async_view_runs_or_names_the_missing_extra(app: Flask) -> None:
    @app.get("/async")
    async def view() -> str:
        return "done"

    app.config["PROPAGATE_EXCEPTIONS"] = True
    try:
        import asgiref  # type: ignore[import-not-found,unused-ignore]  # noqa: F401
    except ImportError:
        app.error_handler_spec[None][None].pop(Exception)
        with pytest.raises(RuntimeError, match="'async' extra"):
            app.test_client().get("/async")
    else:
        assert app.test_client().get("/async").text == "done"
