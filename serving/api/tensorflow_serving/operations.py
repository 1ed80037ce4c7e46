"""The paths of TensorFlow Serving's REST API, and their description for `/openapi.json`.

One Flask route takes every request under `/v1/`; its dispatcher and the description use the names here.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from serving.api.operation import (
    NAME,
    OBJECT,
    PREDICT_ERRORS,
    RESOLVE_ERRORS,
    STRING,
    TIMEOUT_HEADER,
    Json,
    Operation,
    json_body,
    list_of,
    object_of,
)
from serving.inference.signatures import Signature
from serving.settings import Settings

CALLS = ("predict", "classify", "regress")  # methods of a model: `POST /v1/models/M:predict`
METADATA = "/metadata"
_MODEL_PATHS = (
    "/v1/models/{model}",
    "/v1/models/{model}/versions/{version}",
    "/v1/models/{model}/labels/{label}",
)

_ROWS = list_of({}, minItems=1, description="A row each, of all inputs.")
_COLUMNS: Json = {"description": "All rows of the input, or an object with all rows of each input."}
PREDICT_REQUEST: Json = {
    **object_of({"signature_name": STRING, "instances": _ROWS, "inputs": _COLUMNS}, optional=("instances", "inputs")),
    "required": [],
    "oneOf": [{"required": ["instances"]}, {"required": ["inputs"]}],
}
PREDICT_RESPONSE: Json = {
    **object_of({"predictions": {"type": "array", "description": "A row each."}, "outputs": {}}),
    "required": [],
    "oneOf": [{"required": ["predictions"]}, {"required": ["outputs"]}],
}
EXAMPLES_REQUEST = object_of(
    {"signature_name": STRING, "context": OBJECT, "examples": list_of(OBJECT, minItems=1)},
    optional=("signature_name", "context"),
)
STATUS = object_of(
    {
        "model_version_status": list_of(
            object_of(
                {
                    "version": STRING,
                    "state": {"type": "string", "enum": ["START", "LOADING", "AVAILABLE", "UNLOADING", "END"]},
                    "status": object_of({"error_code": NAME, "error_message": STRING}),
                }
            )
        )
    }
)
DESCRIPTION = object_of(
    {
        "model_spec": object_of({"name": STRING, "signature_name": STRING, "version": STRING}),
        "metadata": object_of({"signature_def": OBJECT}),
    }
)


def describe_operations(_: Settings) -> Sequence[Operation]:
    """Describe the routes of this package."""
    return (*(_describe_call(call) for call in CALLS), _describe_status(), _describe_metadata())


def _describe_call(call: str) -> Operation:
    predicts = call == "predict"
    return Operation(
        endpoint="tensorflow_serving.respond",
        method="POST",
        paths=[f"{path}:{call}" for path in _MODEL_PATHS],
        summary="Run a model" if predicts else f"Signatures of tf.Example messages: {call}",
        description=(
            "`instances` has a row in each element and `inputs` has columns; the response has `predictions` or "
            '`outputs`. Bytes, such as image files, are `{"b64": "..."}`. The inputs have to fit the signature.'
            if predicts
            else "The request is validated as TensorFlow Serving does; such signatures themselves are not implemented."
        ),
        parameters=(TIMEOUT_HEADER,),
        content={"application/json": {"schema": PREDICT_REQUEST if predicts else EXAMPLES_REQUEST}},
        responses={200: json_body(PREDICT_RESPONSE, "The outputs.")} if predicts else {},
        errors=PREDICT_ERRORS,
        failures={} if predicts else {501: f"{call} is not implemented."},
        make_example=make_example if predicts else None,
    )


def _describe_status() -> Operation:
    return Operation(
        endpoint="tensorflow_serving.respond",
        paths=_MODEL_PATHS,
        summary="State of the versions of a model",
        responses={200: json_body(STATUS, "The versions, newest first.")},
        errors=RESOLVE_ERRORS,
    )


def _describe_metadata() -> Operation:
    return Operation(
        endpoint="tensorflow_serving.respond",
        paths=[path + METADATA for path in _MODEL_PATHS],
        summary="Signatures of a model",
        responses={200: json_body(DESCRIPTION, "The signatures.")},
        errors=RESOLVE_ERRORS,
    )


def make_example(signature: Signature, inputs: Mapping[str, np.ndarray]) -> Any:
    """Return a request for a signature."""
    columns = {
        name: [{"b64": b64encode(element).decode()} for element in array.ravel().tolist()]
        if array.dtype.hasobject
        else array.tolist()
        for name, array in inputs.items()
    }
    return {"signature_name": signature.name, "inputs": columns}
