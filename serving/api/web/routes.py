"""`/`: the page on which people drop pictures, and what it is told about the models."""

from __future__ import annotations

from typing import Any

from flask import Blueprint, Response, current_app, render_template

from serving.api.predict.routes import class_names, picture_size
from serving.errors import InvalidBackendResponse, ModelNotFound, NotReady, ServingError
from serving.inference.model_info import MAX_CLASSES
from serving.inference.repository import ModelRepository, ModelVersion
from serving.inference.signatures import DEFAULT_SIGNATURE

blueprint = Blueprint("pages", __name__, template_folder="templates", static_folder="static", static_url_path="/static")

# Nothing runs or is drawn but what this service sends as a file of its own, and no text ever becomes markup.
_CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' blob:",  # blob: the pictures that were dropped
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)


@blueprint.after_request
def _restrict(response: Response) -> Response:
    response.headers["Content-Security-Policy"] = _CONTENT_SECURITY_POLICY
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers["Referrer-Policy"] = "no-referrer"
    response.headers.setdefault("Cache-Control", "no-cache")
    return response


@blueprint.get("/")
def page() -> str:
    """Answer the page, with the description of the models in it."""
    return render_template("page.html", models=describe_models())


@blueprint.get("/models.json")
def models() -> list[dict[str, Any]]:
    """Answer what the page shows of the models, for a page whose service has loaded other ones since."""
    return describe_models()


def describe_models() -> list[dict[str, Any]]:
    """Describe every model, in alphabetical order, then the folders that may be models and cannot be read.

    Returns:
        For each model its `name`, whether a version is `available`, whether it is `loading`, and its `problem`: None,
        or why it cannot take pictures. Where there is no problem, also its `version`, `height` and `width` in pixels,
        `class_names`, and what its model info says of it, None where it does not: `dataset` (a name) and
        `test_accuracy` (0 to 1).
    """
    repository: ModelRepository = current_app.extensions["repository"]
    names = repository.all_names()
    described = [_describe(repository, name) for name in names]
    unreadable = (problem for problem in repository.folder_problems if problem.model not in (None, *names))
    return described + [
        {"name": each.model, "available": False, "loading": False, "problem": each.reason} for each in unreadable
    ]


def _describe(repository: ModelRepository, name: str) -> dict[str, Any]:
    try:
        version = repository.resolve(name)
        height, width = picture_size(version.predictor, model=name)
    except NotReady as error:
        return {"name": name, "available": False, "loading": True, "problem": str(error)}
    except ModelNotFound:
        return {"name": name, "available": False, "loading": False, "problem": repository.problem(name)}
    except ServingError as error:
        return {
            "name": name,
            "available": not isinstance(error, InvalidBackendResponse),
            "loading": False,
            "problem": str(error),
        }
    return {
        "name": name,
        "available": True,
        "loading": False,
        "problem": None,
        "version": version.version,
        "height": height,
        "width": width,
        "class_names": _class_names(version),
        "dataset": _look_up(version.card, "dataset", "name", kind=str),
        "test_accuracy": _look_up(version.card, "test", "accuracy", kind=float),
    }


def _class_names(version: ModelVersion) -> list[str]:
    """Return the names of the classes; none where neither the signature nor the card tells how many there are."""
    shape = version.predictor.signatures[DEFAULT_SIGNATURE].outputs["probabilities"].shape
    count = None if shape is None else shape[1]
    if count is None or count > MAX_CLASSES:  # a signature may say anything
        count = len(_look_up(version.card, "class_names", kind=list) or [])
    return class_names(version.card, count=count)


def _look_up(card: Any, *keys: str, kind: type) -> Any:
    """Return what a card says under nested keys; None where it says nothing, or nothing of this kind."""
    for key in keys:
        card = card.get(key) if isinstance(card, dict) else None
    return card if isinstance(card, kind) else None
