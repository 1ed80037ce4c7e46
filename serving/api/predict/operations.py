"""Describes `/predict` for `/openapi.json`."""

from __future__ import annotations

from collections.abc import Sequence

from serving.api.operation import (
    BOOLEAN,
    COUNT,
    NAME,
    PREDICT_ERRORS,
    STRING,
    TIMEOUT_HEADER,
    VERSION,
    Json,
    Operation,
    json_body,
    list_of,
    nullable,
    object_of,
    query_parameter,
)
from serving.api.predict.messages import QUERY_PARAMETERS
from serving.errors import UnsupportedMedia
from serving.settings import Settings

_SHARE: Json = {"type": "number", "minimum": 0, "maximum": 1.000_001}  # rounding in the softmax
_FILE: Json = {"type": "string", "format": "binary"}

_PARAMETERS: dict[str, tuple[Json, str]] = {
    "model": (NAME, "Name of the model; required where several are served."),
    "version": (VERSION, "Number of the version; by default the newest."),
    "label": (NAME, "Label of the version, instead of its number."),
}

PREDICTION = object_of(
    {
        "file": {**nullable(STRING), "description": "File name in the form; null for a raw body."},
        "label": {**STRING, "description": "The most probable class."},
        "class_id": COUNT,
        "confidence": {**_SHARE, "description": "Probability of the class."},
        "probabilities": {"type": "object", "additionalProperties": _SHARE, "description": "Of every class."},
        "typicality": {
            **_SHARE,
            "description": "Share of the validation images that are less typical of the training images.",
        },
        "is_typical": {**BOOLEAN, "description": "False for an image that is unlike the training images."},
        "label_set": {**list_of(STRING), "description": "The labels that cannot be ruled out."},
    },
    optional=("typicality", "is_typical", "label_set"),
)


def describe_operations(settings: Settings) -> Sequence[Operation]:
    """Describe the routes of this package."""
    limits = (
        f"A file has at most {settings.max_image_pixels:,} pixels and sides of at most {settings.max_image_side:,}; "
        f"the body has at most {settings.max_request_bytes:,} bytes."
    )
    form = object_of({"image": list_of(_FILE, minItems=1, maxItems=settings.max_images)})
    predict = Operation(
        endpoint="predict.predict",
        method="POST",
        summary="Classify images",
        description=(
            "Takes JPEG, PNG, WebP, AVIF, BMP and GIF files: one or more in a form, in fields of any name, or one as "
            f"the body. If a file cannot be read, none is predicted. {limits}"
        ),
        parameters=(*(query_parameter(name, *_PARAMETERS[name]) for name in QUERY_PARAMETERS), TIMEOUT_HEADER),
        content={"multipart/form-data": {"schema": form}, "image/*": {"schema": _FILE}},
        responses={
            200: json_body(
                object_of(
                    {
                        "model": object_of({"name": STRING, "version": VERSION}),
                        "predictions": list_of(PREDICTION, minItems=1),
                        "timing_ms": object_of({"decode": {"type": "number"}, "predict": {"type": "number"}}),
                    }
                ),
                "A prediction for each image, in the order of the images.",
            )
        },
        errors=(*PREDICT_ERRORS, UnsupportedMedia),
    )
    return (predict,)
