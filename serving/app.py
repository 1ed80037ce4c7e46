"""`create_app()`: the objects of the service, the blueprint of each protocol, and the JSON of every error."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from flask import Response, request
from werkzeug.exceptions import HTTPException, MethodNotAllowed, NotFound, RequestEntityTooLarge

from serving.api import monitoring
from serving.api.flask_app import ServingApp, current_app, error_response, json_response
from serving.api.open_inference import routes as open_inference
from serving.api.predict import routes as predict
from serving.api.tensorflow_serving import routes as tensorflow_serving
from serving.api.web import routes as web
from serving.errors import ServingError
from serving.inference.backends import make_repository
from serving.inference.liveness import Liveness
from serving.inference.service import InferenceService
from serving.memory import MemoryBudget
from serving.metrics import Metrics
from serving.settings import Settings

logger = logging.getLogger(__name__)


def create_app(models: str | Path | Settings = "models", **options: Any) -> ServingApp:
    """Make the service as a WSGI application, ready to serve: `gunicorn "serving:create_app()"`.

    The first request loads the models, in the process that serves it, and waits for them; health checks do not wait.
    It is a Flask app: hooks, blueprints, error handlers and the test client work as Flask documents them.

    Args:
        models: the folder: `<name>/<version>/saved_model.pb`, or all settings. New versions replace old ones while it
            runs.
        options: other settings by their names in `serving.Settings`, such as `max_batch_size`. Those of ports and of
            connections have no effect here.

    Raises:
        StartupError: a setting is invalid, or the folder is missing.

    Example:
        >>> client = serving.create_app("models").test_client()
        >>> client.get("/v1/models/colours").json["model_version_status"][0]["state"]
        'AVAILABLE'
    """
    app = make_app(models if isinstance(models, Settings) else Settings(models_dir=Path(models), **options))
    app.loads_models = True
    return app


def make_app(settings: Settings) -> ServingApp:
    """Make the service for the models that the settings name; `app.watcher.start()` loads them.

    Raises:
        StartupError: there is no model to serve.
    """
    metrics = Metrics()
    liveness = Liveness()
    memory = MemoryBudget(settings.memory_budget)
    repository = make_repository(settings, metrics, liveness)
    metrics.watch(repository)
    metrics.watch_memory(memory)
    app = ServingApp(
        settings,
        inference=InferenceService(repository, max_rows=settings.max_rows),
        metrics=metrics,
        liveness=liveness,
        memory=memory,
    )
    for module in (monitoring, predict, tensorflow_serving, open_inference, web):
        app.register_blueprint(module.blueprint)
    app.register_error_handler(ServingError, error_response)
    app.register_error_handler(HTTPException, _http_error_response)
    app.register_error_handler(Exception, _internal_error_response)
    return app


def _http_error_response(error: HTTPException) -> Response | HTTPException:
    if error.code is None or error.code < 400:
        return error  # a redirect
    if isinstance(error, NotFound):
        message = f"there is nothing at {request.path}"
    elif isinstance(error, MethodNotAllowed):
        methods = " or ".join(sorted(set(error.valid_methods or ()) - {"HEAD", "OPTIONS"}))
        message = f"{request.path} takes {methods}, not {request.method}"
    elif isinstance(error, RequestEntityTooLarge):
        message = f"the request is too large: at most {current_app.config['MAX_CONTENT_LENGTH']:,} bytes"
    else:
        message = error.description or error.name
    response = json_response({"error": message}, status=error.code)
    response.headers.extend(header for header in error.get_headers() if header[0] != "Content-Type")
    return response


def _internal_error_response(error: Exception) -> Response:
    logger.error("%s %s failed", request.method, request.path, exc_info=error)
    return json_response({"error": "internal error; the reason is in the service's log"}, status=500)
