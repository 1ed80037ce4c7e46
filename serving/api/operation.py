"""`Operation`: describes a route for `/openapi.json`. Each protocol describes its own, in `describe_operations`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from serving.errors import (
    HTTP_STATUS_OF_CODE,
    InvalidBackendResponse,
    InvalidRequest,
    ModelFailed,
    ModelNotFound,
    NotReady,
    Overloaded,
    ServingError,
    TooLarge,
)
from serving.inference.model_config import MAX_VERSION
from serving.inference.signatures import Signature

Json = Mapping[str, Any]

# What resolving a model, and running it, can raise (`InferenceService`).
RESOLVE_ERRORS = (InvalidRequest, ModelNotFound, NotReady, InvalidBackendResponse)
PREDICT_ERRORS = (*RESOLVE_ERRORS, TooLarge, Overloaded, ModelFailed)

# Refusals that any request can get: by the HTTP server, before the request reaches a route, and for errors of the
# service itself.
COMMON_ERRORS: Mapping[int, str] = {
    400: "The HTTP request cannot be parsed.",
    408: "The request arrives too slowly.",
    413: "The body is larger than the limit.",
    431: "The request line and headers are longer than the limit.",
    500: "An internal error: the reason is in the service's log.",
    503: "The service has no memory or time for the request now.",
    505: "The HTTP version is not supported.",
}

OBJECT: Json = {"type": "object"}
STRING: Json = {"type": "string"}
BOOLEAN: Json = {"type": "boolean"}
COUNT: Json = {"type": "integer", "minimum": 0}
VERSION: Json = {"type": "integer", "minimum": 0, "maximum": MAX_VERSION}
NAME: Json = {"type": "string", "minLength": 1}

PATH_PARAMETERS: Mapping[str, Json] = {
    "model": {"description": "Name of a model.", "schema": NAME},
    "version": {"description": "Version number.", "schema": VERSION},
    "label": {"description": "Label of a version.", "schema": NAME},
    "filename": {"description": "Name of a file.", "schema": {"type": "string"}},
}


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One method of a route, or of several routes that differ in their path only.

    Attributes:
        endpoint: of Flask: its routes are the paths.
        method: in capital letters.
        summary: a short sentence, without a full stop.
        description: more, in Markdown.
        parameters: of the query and the headers, as OpenAPI parameter objects.
        content: the request body: a media type object for each media type; None: no body.
        is_body_optional: the request may have no body.
        responses: an OpenAPI response object for each status that is not an error.
        errors: what it raises; the statuses follow.
        failures: descriptions of other statuses with an error as their body.
        paths: for an endpoint whose route is a pattern: the paths it takes, like `/v1/models/{model}`.
        make_example: returns the JSON body of a request with these inputs of a signature, or None if there is none.
    """

    endpoint: str
    method: str = "GET"
    summary: str
    description: str = ""
    parameters: Sequence[Json] = ()
    content: Mapping[str, Json] | None = None
    is_body_optional: bool = False
    responses: Mapping[int, Json]
    errors: Sequence[type[ServingError]] = ()
    failures: Mapping[int, str] = field(default_factory=dict)
    paths: Sequence[str] = ()
    make_example: Callable[[Signature, Mapping[str, np.ndarray]], Any] | None = None

    def describe_errors(self, refusals: Sequence[type[ServingError]] = ()) -> dict[int, str]:
        """Return a description of each status with an error as its body; `refusals` are those of access control."""
        texts: dict[int, list[str]] = {status: [text] for status, text in self.failures.items()}
        for error in (*self.errors, *refusals):
            if error is not ModelFailed:  # its status depends
                texts.setdefault(error.status, []).append((error.__doc__ or "").partition("\n")[0])
        others = {status: [text] for status, text in COMMON_ERRORS.items()}
        if ModelFailed in self.errors:
            for code, status in HTTP_STATUS_OF_CODE.items():
                others.setdefault(status, []).append(f"The model or the remote server failed: {code}.")
        texts = {**others, **texts}
        return {status: " ".join(texts[status]) for status in sorted(texts)}


def object_of(properties: Mapping[str, Json], *, optional: Sequence[str] = (), **more: Any) -> Json:
    """Return the schema of an object with these properties, of which all but `optional` are required."""
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": dict(properties), **({"required": required} if required else {}), **more}


def optional_of(properties: Mapping[str, Json]) -> Json:
    """Return the schema of an object with these properties, of which none is required."""
    return object_of(properties, optional=tuple(properties))


def list_of(items: Json, **more: Any) -> Json:
    """Return the schema of an array."""
    return {"type": "array", "items": items, **more}


def nullable(schema: Json) -> Json:
    """Return the schema of a value that may be null."""
    return {**schema, "type": [schema["type"], "null"]}


def json_body(schema: Json, description: str, **headers: Json) -> Json:
    """Return the response object of a JSON response."""
    return {"description": description, "content": {"application/json": {"schema": schema}}, **headers}


def query_parameter(name: str, schema: Json, description: str) -> Json:
    """Return an optional query parameter."""
    return {"name": name, "in": "query", "schema": schema, "description": description}


def header_parameter(name: str, schema: Json, description: str) -> Json:
    """Return an optional header of a request."""
    return {"name": name, "in": "header", "schema": schema, "description": description}


TIMEOUT_HEADER = header_parameter(
    "X-Request-Timeout-S",
    {"type": "number", "exclusiveMinimum": 0},
    "Deadline of this request in seconds; it can only shorten the service's own.",
)
