"""Liveness (`/healthz`), readiness (`/readyz`) and Prometheus metrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flask import Blueprint, Response

from serving.api.flask_app import current_app, shows_details
from serving.api.operation import BOOLEAN, COUNT, STRING, VERSION, Operation, json_body, list_of, nullable, object_of
from serving.metrics import CONTENT_TYPE
from serving.settings import Settings

blueprint = Blueprint("health", __name__)


@blueprint.get("/healthz")
def healthz() -> tuple[dict[str, Any], int]:
    """Return 200 while the process is alive, with or without models; 503 with the reason if it needs a restart."""
    problem = current_app.liveness.problem
    return ({"status": "alive"}, 200) if problem is None else ({"status": "dead", "reason": problem}, 503)


@blueprint.get("/readyz")
def readyz() -> tuple[dict[str, Any], int]:
    """Return 200 when at least one model and all required models are loaded and warmed up, else 503 with the reason.

    `models` lists every version that was tried to load, with its `error`. `problems` lists the folders that cannot be
    read; `model` is null for the models folder itself. Where tokens are required, callers without one get only `ready`.
    """
    repository = current_app.inference.repository
    reason = repository.not_ready_because
    if not shows_details():
        return {"ready": reason is None}, 200 if reason is None else 503
    models = [
        {
            "name": version.name,
            "version": version.version,
            "state": version.state,
            "warmup_records": version.warmup_records,
            "error": version.error_message or None,
        }
        for version in repository.all_versions()
    ]
    problems = [{"model": problem.model, "error": problem.reason} for problem in repository.folder_problems]
    body = {"ready": reason is None, "reason": reason, "models": models, "problems": problems}
    return body, 200 if reason is None else 503


@blueprint.get("/metrics")
@blueprint.get("/monitoring/prometheus/metrics")
def metrics() -> Response:
    """Return the metrics in Prometheus' text format."""
    return Response(current_app.metrics.render(), content_type=CONTENT_TYPE)


def describe_operations(_: Settings) -> Sequence[Operation]:
    """Describe the routes of this module."""
    model = object_of(
        {
            "name": STRING,
            "version": VERSION,
            "state": STRING,
            "warmup_records": COUNT,
            "error": nullable(STRING),
        }
    )
    readiness = object_of(
        {
            "ready": BOOLEAN,
            "reason": nullable(STRING),
            "models": list_of(model),
            "problems": list_of(object_of({"model": nullable(STRING), "error": STRING})),
        },
        optional=("reason", "models", "problems"),  # not shown without a token, where tokens are required
    )
    return (
        Operation(
            endpoint="health.healthz",
            summary="Liveness",
            responses={
                200: json_body(object_of({"status": {"const": "alive"}}), "The process is alive."),
                503: json_body(
                    object_of({"status": {"const": "dead"}, "reason": STRING}), "The process needs a restart."
                ),
            },
        ),
        Operation(
            endpoint="health.readyz",
            summary="Readiness",
            responses={
                200: json_body(readiness, "The service is ready."),
                503: json_body(readiness, "The service is not ready, for the given reason."),
            },
        ),
        Operation(
            endpoint="health.metrics",
            summary="Metrics",
            responses={200: {"description": "In Prometheus' text format.", "content": {"text/plain": {}}}},
        ),
    )
