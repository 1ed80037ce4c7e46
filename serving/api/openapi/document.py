"""The OpenAPI document: paths and methods from the app's routes, all else from the `Operation` of each."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from werkzeug.routing import Map

from serving.api.openapi.examples import make_inputs
from serving.api.operation import PATH_PARAMETERS, Json, Operation
from serving.errors import ServingError, Unauthenticated
from serving.inference.repository import ModelVersion

Refusals = Callable[[str, str], Sequence[type[ServingError]]]

OPENAPI_VERSION = "3.1.0"
_ERROR: Json = {
    "type": "object",
    "properties": {
        "error": {"type": "string", "description": "What was expected, and what came."},
        "errors": {
            "type": "array",
            "description": "Each image that cannot be read.",
            "items": {
                "type": "object",
                "properties": {
                    "index": {"type": "integer"},
                    "file": {"type": ["string", "null"]},
                    "error": {"type": "string"},
                },
                "required": ["index", "file", "error"],
            },
        },
        "models": {"type": "array", "items": {"type": "string"}, "description": "The served models."},
    },
    "required": ["error"],
}
_ERROR_REFERENCE: Json = {"$ref": "#/components/schemas/Error"}
_RETRY_AFTER: Json = {
    "Retry-After": {"schema": {"type": "integer", "minimum": 0}, "description": "Seconds to wait.", "required": True}
}
_RULE_ARGUMENT = re.compile(r"<(?:[^:<>]+:)?([^<>]+)>")


def list_paths(routes: Map, operation: Operation) -> list[str]:
    """Return the paths of an operation, as OpenAPI templates."""
    if operation.paths:
        return list(operation.paths)
    rules = [rule for rule in routes.iter_rules(operation.endpoint) if operation.method in (rule.methods or ())]
    paths = [_RULE_ARGUMENT.sub(r"{\1}", rule.rule) for rule in rules]
    return [path for path in paths if path == "/" or path.removesuffix("/") not in {*paths} - {path}]


def make_document(
    routes: Map,
    operations: Iterable[Operation],
    models: Sequence[ModelVersion],
    *,
    version: str,
    root: str = "",
    list_refusals: Refusals = lambda *_: (),
) -> dict[str, Any]:
    """Make the OpenAPI document.

    Args:
        routes: of the app.
        operations: what each route does.
        models: whose names and signatures are shown as examples.
        version: of the service.
        root: path prefix of all routes.
        list_refusals: returns the errors of access control, by path and method.
    """
    paths: dict[str, dict[str, Any]] = {}
    tags: dict[str, None] = {}
    for operation in operations:
        tag = operation.endpoint.partition(".")[0].replace("_", " ")
        tags[tag] = None
        for path in list_paths(routes, operation):
            refusals = list_refusals(path, operation.method)
            paths.setdefault(path, {})[operation.method.lower()] = _describe(operation, path, tag, models, refusals)
    return {
        "openapi": OPENAPI_VERSION,
        "info": {
            "title": "Image classifier",
            "version": version,
            "description": (
                "Classifies images and runs SavedModels. An error is a JSON object with the member `error`. "
                "A method that the server does not know is refused with 501, one that the path does not take with 405. "
                "The header X-Request-ID of a request is repeated in its response, which has a new one otherwise."
            ),
        },
        "servers": [{"url": root or "/"}],
        "tags": [{"name": tag} for tag in tags],
        "paths": paths,
        "components": {
            "schemas": {"Error": _ERROR},
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


def _describe(
    operation: Operation,
    path: str,
    tag: str,
    models: Sequence[ModelVersion],
    refusals: Sequence[type[ServingError]],
) -> dict[str, Any]:
    model, body = _find_example(operation, models)
    parameters = [*_path_parameters(path), *map(dict, operation.parameters)]
    if model is not None:
        for parameter in parameters:
            if parameter["name"] in ("model", "version"):
                parameter["example"] = model.name if parameter["name"] == "model" else model.version
    described: dict[str, Any] = {
        "tags": [tag],
        "operationId": "_".join(re.findall(r"\w+", f"{operation.method.lower()} {path}")),
        "summary": operation.summary,
    }
    if operation.description:
        described["description"] = operation.description
    if parameters:
        described["parameters"] = parameters
    if operation.content is not None:
        content = {media_type: dict(media) for media_type, media in operation.content.items()}
        if body is not None:
            content["application/json"]["example"] = body
        described["requestBody"] = {"required": not operation.is_body_optional, "content": content}
    described["responses"] = dict(_responses(operation, operation.describe_errors(refusals)))
    if Unauthenticated in refusals:
        described["security"] = [{"token": []}]
    return described


def _find_example(operation: Operation, models: Sequence[ModelVersion]) -> tuple[ModelVersion | None, Any]:
    """Return a model to show as an example, and the body of a request to it: the first model that has one."""
    for model in models if operation.make_example else ():
        for signature, inputs in make_inputs(model.predictor.signatures):
            if operation.make_example and (body := operation.make_example(signature, inputs)) is not None:
                return model, body
    return (models[0] if models else None), None


def _path_parameters(path: str) -> Iterator[dict[str, Any]]:
    for name in re.findall(r"{(\w+)}", path):
        yield {"name": name, "in": "path", "required": True, **PATH_PARAMETERS[name]}


def _responses(operation: Operation, errors: Mapping[int, str]) -> Iterator[tuple[str, Json]]:
    for status in sorted({*operation.responses, *errors}):
        response: Json = operation.responses.get(status, {})
        if status in errors:
            own = response.get("content", {}).get("application/json", {}).get("schema")
            response = {
                "description": " ".join(filter(None, (response.get("description"), errors[status]))),
                **({"headers": _RETRY_AFTER} if status in (429, 503) else {}),
                "content": {
                    "application/json": {"schema": {"anyOf": [own, _ERROR_REFERENCE]} if own else _ERROR_REFERENCE}
                },
            }
        yield str(status), response
