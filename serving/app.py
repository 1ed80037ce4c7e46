"""`create_app()`: the objects of the service and its backend, the blueprints of the protocols, the JSON of errors."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from flask import Response, request
from werkzeug.exceptions import HTTPException, MethodNotAllowed, NotFound, RequestEntityTooLarge

from serving.access.cors import CorsPolicy
from serving.access.http import HttpAccess
from serving.access.model_folders import ModelFolders
from serving.access.peers import TrustedProxies
from serving.access.policy import AccessPolicy
from serving.access.rate_limit import RateLimiter
from serving.access.tokens import TokenFile
from serving.api import monitoring
from serving.api.flask_app import ServingApp, current_app, error_response, json_response
from serving.api.open_inference import routes as open_inference
from serving.api.openapi import routes as openapi
from serving.api.predict import routes as predict
from serving.api.tensorflow_serving import routes as tensorflow_serving
from serving.api.web import routes as web
from serving.drift import DriftMonitor
from serving.errors import ServingError, StartupError
from serving.images.inspection import InspectedPredictor, inspect_images
from serving.inference.batcher import Batcher
from serving.inference.liveness import Liveness
from serving.inference.local import LocalRepository
from serving.inference.model_config import ModelConfig, ModelsFolder, has_versions, read_config_file
from serving.inference.model_folders import read_model_folders
from serving.inference.repository import ModelRepository
from serving.inference.row_independence import find_dependent_signatures
from serving.inference.saved_model import SavedModelPredictor
from serving.inference.service import InferenceService
from serving.inference.signatures import Predictor
from serving.inference.version_loader import InProcessLoader
from serving.inference.version_signature import SignatureVerifier
from serving.memory import MemoryBudget
from serving.metrics import Metrics
from serving.observer import RequestObserver
from serving.request_context import RequestContext
from serving.request_log import log_request
from serving.settings import Settings, name_models
from serving.tracing import make_tracing

logger = logging.getLogger(__name__)


def create_app(models: str | Path | Mapping[str, str | Path] | Settings = "models", **options: Any) -> ServingApp:
    """Make the service as a WSGI application, ready to serve: `gunicorn "serving:create_app()"`.

    The first request loads the models, in the process that serves it, and waits for them; health checks do not wait.
    It is a Flask app: hooks, blueprints, error handlers and the test client work as Flask documents them.

    Args:
        models: the folder: `<name>/<version>/saved_model.pb`; or the name and folder of each model, as for
            `--model`; or all settings. New versions replace old ones while it runs.
        options: other settings by their names in `serving.Settings`, such as `max_batch_size`. Those of ports, of
            connections and of workers have no effect here.

    Raises:
        StartupError: a setting is invalid, or the folder is missing.

    Example:
        >>> client = serving.create_app("models").test_client()
        >>> client.get("/v1/models/colours").json["model_version_status"][0]["state"]
        'AVAILABLE'
    """
    app = make_app(models if isinstance(models, Settings) else Settings(**name_models(models), **options))
    app.loads_models = True
    return app


def make_app(
    settings: Settings,
    *,
    follow: Callable[..., ModelRepository] | None = None,
    processes: int = 1,
    log: Callable[[RequestContext, float], None] = log_request,
) -> ServingApp:
    """Make the service for the models that the settings name; `app.watcher.start()` loads them.

    Args:
        settings: of the service.
        follow: see `make_repository`.
        processes: see `MemoryBudget`.
        log: called with each request that has ended and its time in seconds, if the settings ask for a request log.

    Raises:
        StartupError: there is no model to serve, or the environment asks for traces that cannot be exported.
    """
    tracing = make_tracing(os.environ, remote=settings.remote)
    metrics = Metrics()
    liveness = Liveness()
    memory = MemoryBudget(settings.memory_budget, processes=processes)
    repository = make_repository(settings, metrics, liveness, follow=follow)
    metrics.watch(repository)
    metrics.process.watch_memory(memory)
    drift = DriftMonitor(repository)
    metrics.watch_drift(drift)
    app = ServingApp(
        settings,
        inference=(tracing.make_inference if tracing else InferenceService)(
            repository,
            max_rows=settings.max_rows,
            allow_model_control=settings.allow_model_control,
            record_outputs=drift.record,
        ),
        metrics=metrics,
        observer=(tracing.make_observer if tracing else RequestObserver)(
            metrics, log=log if settings.access_log else None
        ),
        liveness=liveness,
        memory=memory,
        policy=make_policy(settings),
    )
    for module in (predict, tensorflow_serving, open_inference, monitoring, openapi, web):
        app.register_blueprint(module.blueprint)
        app.operations += module.describe_operations(settings)
    app.register_error_handler(ServingError, error_response)
    app.register_error_handler(HTTPException, _http_error_response)
    app.register_error_handler(Exception, _internal_error_response)
    add_access(app)
    return app


def make_policy(settings: Settings) -> AccessPolicy:
    """Make the access policy of HTTP and gRPC.

    Raises:
        StartupError: the token file or a setting of access control is invalid.
    """
    configs = read_config_file(settings.model_config_file) if settings.model_config_file else ()
    listed = [config.base_path for config in configs]
    around = {path.parent for path in listed} - {Path("/")}  # below which is everything
    return AccessPolicy(
        TokenFile(settings.auth_token_file) if settings.auth_token_file else None,
        RateLimiter(settings.rate_limit) if settings.rate_limit else None,
        TrustedProxies(settings.forwarded_allow_ips),
        ModelFolders([settings.models_dir, *sorted(around)], [*listed, *(path for _, path in settings.models)]),
        allow_remote_reload=settings.allow_remote_reload,
    )


def add_access(app: ServingApp) -> None:
    """Put the access control of HTTP in front of the app's routes, unless it has nothing to do.

    Raises:
        StartupError: an origin is invalid.
    """
    settings = app.settings
    cors = CorsPolicy(settings.cors_origins) if settings.cors_origins else None
    access = HttpAccess(app.policy, cors, prefix=settings.url_prefix, metrics_public=settings.metrics_public)
    if access.is_needed(allows_model_control=settings.allow_model_control):
        app.access = access
    if cors:

        @app.after_request
        def add_cors_headers(response: Response) -> Response:
            response.headers.extend(cors.headers(request.headers.get("Origin")))
            return response


def make_repository(
    settings: Settings,
    metrics: Metrics,
    liveness: Liveness,
    *,
    follow: Callable[..., ModelRepository] | None = None,
) -> ModelRepository:
    """Make the model repository; its models are not loaded yet.

    Args:
        settings: of the service.
        metrics: of the predictors and queues.
        liveness: watches model calls.
        follow: makes the repository of a worker process from the arguments `loader` and `wrap_predictor` of
            `LocalRepository`; the supervisor tells it what to serve.

    Raises:
        StartupError: the models folder does not exist, the model config is invalid, or --verify-key cannot be used.
    """
    if settings.remote:
        from serving.inference.remote import RemoteRepository

        def inspect(model: str, predictor: Predictor) -> Predictor:
            return InspectedPredictor(metrics.predictions.time_predictor(model, predictor), settings.image_limits)

        names = name_remote_models(settings)
        return RemoteRepository(settings.remote, names, required=settings.require_models, wrap_predictor=inspect)

    def batch(model: str, predictor: Predictor, unbatched: Collection[str]) -> Predictor:
        batcher = Batcher(
            metrics.predictions.time_predictor(model, predictor),
            max_batch_rows=settings.max_batch_size,
            max_queued_rows=settings.max_queue_size,
            concurrency=settings.concurrency,
            liveness=liveness,
            inspect=partial(inspect_images, settings.image_limits),
            unbatched=unbatched,
        )
        metrics.predictions.watch_queue(model, batcher)
        return batcher

    loader = InProcessLoader(
        partial(SavedModelPredictor, intra_op_threads=settings.intra_op_threads), find_dependent_signatures
    )
    if follow is not None:
        return follow(loader=loader, wrap_predictor=batch)
    return LocalRepository(
        choose_models(settings),
        required=settings.require_models,
        loader=loader,
        wrap_predictor=batch,
        verify_signature=SignatureVerifier(settings.verify_key) if settings.verify_key else None,
    )


def choose_models(settings: Settings) -> Callable[[], Sequence[ModelConfig]]:
    """Return a function that lists the models to serve from this machine's folders, at every poll.

    Raises:
        StartupError: a folder is missing or not what it should be, or the model config is invalid.
    """
    if settings.model_config_file:
        listed = read_config_file(settings.model_config_file)
    elif settings.models:
        listed = read_model_folders(settings.models)
    else:
        return ModelsFolder(settings.models_dir)
    return lambda: listed


def name_remote_models(settings: Settings) -> tuple[str, ...]:
    """Return the models to serve from the remote server: the configured names, otherwise those in the models folder.

    Raises:
        StartupError: no name is configured, and the models folder does not exist or is empty.
    """
    if settings.remote_models:
        return settings.remote_models
    try:
        names = tuple(config.name for config in ModelsFolder(settings.models_dir)() if has_versions(config))
        if not names:
            raise StartupError(f"no model in {settings.models_dir}")
        return names
    except (OSError, StartupError) as error:
        raise StartupError(
            f"{settings.remote} cannot list its models: name each model with --remote-model ({error})"
        ) from error


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
