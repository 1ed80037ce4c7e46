"""`/openapi.json` and `/docs`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flask import Blueprint, Response, render_template, request

from image_formats import __version__
from serving.api.flask_app import current_app
from serving.api.openapi.document import make_document
from serving.api.operation import OBJECT, Operation, json_body
from serving.api.page_headers import restrict_page
from serving.errors import ServingError
from serving.inference.image_classifier import FILES_SIGNATURE
from serving.inference.repository import ModelVersion
from serving.settings import Settings

blueprint = Blueprint("openapi", __name__, template_folder="templates")


@blueprint.get("/openapi.json")
def openapi() -> dict[str, Any]:
    """Return the OpenAPI document."""
    access = current_app.access
    return make_document(
        current_app.url_map,
        current_app.operations,
        _available_models(),
        version=__version__,
        root=request.script_root,
        **({"list_refusals": access.list_refusals} if access else {}),
    )


@blueprint.get("/docs")
def docs() -> Response:
    """Return the document as a page."""
    page = current_app.make_response(render_template("docs.html", document=openapi()))
    return restrict_page(page)


def _available_models() -> list[ModelVersion]:
    """Return the newest version of each model; those that take image files first, as the best examples."""
    models = []
    for name in current_app.inference.repository.names():
        try:
            models.append(current_app.inference.repository.resolve(name))
        except ServingError:  # unloaded meanwhile
            continue
    return sorted(models, key=lambda model: FILES_SIGNATURE not in model.predictor.signatures)


def describe_operations(_: Settings) -> Sequence[Operation]:
    """Describe the routes of this package."""
    return (
        Operation(
            endpoint="openapi.openapi",
            summary="This description",
            responses={200: json_body(OBJECT, "An OpenAPI 3.1 document.")},
        ),
        Operation(
            endpoint="openapi.docs",
            summary="This description, as a page",
            responses={200: {"description": "HTML.", "content": {"text/html": {}}}},
        ),
    )
