"""`/`: the page to upload images to, and `/models.json`, the models it shows."""

from __future__ import annotations

from typing import Any

from flask import Blueprint, render_template

from serving.api.flask_app import current_app
from serving.api.page_headers import restrict_page
from serving.api.web.operations import describe_operations
from serving.errors import InvalidBackendResponse, ModelNotFound, NotReady, ServingError
from serving.inference.image_classifier import can_explain, class_names, image_size
from serving.inference.model_info import MAX_CLASSES
from serving.inference.repository import ModelRepository, ModelVersion
from serving.inference.signatures import DEFAULT_SIGNATURE

__all__ = ["blueprint", "describe_operations"]

blueprint = Blueprint("pages", __name__, template_folder="templates", static_folder="static", static_url_path="/static")

blueprint.after_request(restrict_page)

_UNAVAILABLE = {"available": False, "loading": False}


@blueprint.get("/")
def page() -> str:
    """Return the page, with the models embedded as JSON."""
    return render_template("page.html", models=models())


@blueprint.get("/models.json")
def models() -> list[dict[str, Any]]:
    """Describe all models in alphabetical order, then the model folders that cannot be read.

    An open page refreshes them after a version swap.

    Returns:
        For each model its `name`, whether a version is `available`, whether it is `loading`, and its `problem`: None,
        or the reason why it cannot classify images. Without a problem also its `version`, `height` and `width` in
        pixels, `class_names`, whether it `explains` its predictions by heat maps, and from its model info `dataset` (a
        name or None) and `test_accuracy` (0 to 1 or None).
    """
    repository = current_app.inference.repository
    names = repository.all_names()
    unreadable = (problem for problem in repository.folder_problems if problem.model not in (None, *names))
    described = [{"name": each.model, **_UNAVAILABLE, "problem": each.reason} for each in unreadable]
    return [_describe(repository, name) for name in names] + described


def _describe(repository: ModelRepository, name: str) -> dict[str, Any]:
    try:
        version = repository.resolve(name)
        height, width = image_size(version.predictor, model=name)
    except NotReady as error:
        return {"name": name, "available": False, "loading": True, "problem": str(error)}
    except ModelNotFound:
        return {"name": name, **_UNAVAILABLE, "problem": repository.problem(name)}
    except ServingError as error:
        available = not isinstance(error, InvalidBackendResponse)
        return {"name": name, "available": available, "loading": False, "problem": str(error)}
    return {
        "name": name,
        "available": True,
        "loading": False,
        "problem": None,
        "version": version.version,
        "height": height,
        "width": width,
        "class_names": _class_names(version),
        "explains": can_explain(version.predictor),
        "dataset": version.info.dataset,
        "test_accuracy": version.info.test_accuracy,
    }


def _class_names(version: ModelVersion) -> list[str]:
    """Return the class names; an empty list if neither the signature nor the model info has their number."""
    shape = version.predictor.signatures[DEFAULT_SIGNATURE].outputs["probabilities"].shape
    count = None if shape is None else shape[1]
    if count is None or count > MAX_CLASSES:  # unknown, or implausible
        count = len(version.info.class_names)
    return class_names(version, count=count)
