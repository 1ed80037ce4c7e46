"""Describes the page's routes for `/openapi.json`."""

from __future__ import annotations

from collections.abc import Sequence

from serving.api.operation import (
    BOOLEAN,
    COUNT,
    STRING,
    VERSION,
    Json,
    Operation,
    json_body,
    list_of,
    nullable,
    object_of,
)
from serving.settings import Settings

_AVAILABLE_ONLY = ("version", "height", "width", "class_names", "explains", "dataset", "test_accuracy")
MODEL = object_of(
    {
        "name": STRING,
        "available": BOOLEAN,
        "loading": BOOLEAN,
        "problem": {**nullable(STRING), "description": "Why it cannot classify images."},
        "version": VERSION,
        "height": COUNT,
        "width": COUNT,
        "class_names": list_of(STRING),
        "explains": {**BOOLEAN, "description": "Whether it has heat maps."},
        "dataset": nullable(STRING),
        "test_accuracy": nullable({"type": "number", "minimum": 0, "maximum": 1}),
    },
    optional=_AVAILABLE_ONLY,
)


def describe_operations(_: Settings) -> Sequence[Operation]:
    """Describe the routes of this package."""
    any_type: Json = {"content": {"*/*": {}}}
    return (
        Operation(
            endpoint="pages.page",
            summary="The page to upload images to",
            responses={200: {"description": "HTML.", "content": {"text/html": {}}}},
        ),
        Operation(
            endpoint="pages.models",
            summary="The models that the page shows",
            responses={200: json_body(list_of(MODEL), "All models, in alphabetical order.")},
        ),
        Operation(
            endpoint="pages.static",
            summary="A file of the pages",
            responses={
                200: {"description": "The file.", **any_type},
                206: {"description": "A part of it, for a request with Range.", **any_type},
                304: {"description": "It has not changed."},
            },
            failures={404: "There is no such file.", 416: "The range is not in the file."},
        ),
    )
