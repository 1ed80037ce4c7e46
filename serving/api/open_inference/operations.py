"""Describes the Open Inference Protocol's routes for `/openapi.json`."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from serving.api.open_inference.messages import HEADER_LENGTH
from serving.api.operation import (
    BOOLEAN,
    COUNT,
    OBJECT,
    PREDICT_ERRORS,
    RESOLVE_ERRORS,
    STRING,
    TIMEOUT_HEADER,
    Json,
    Operation,
    header_parameter,
    json_body,
    list_of,
    object_of,
    optional_of,
    query_parameter,
)
from serving.errors import InvalidRequest, ModelControlOff, UnsupportedMedia
from serving.inference.signatures import Signature
from serving.open_inference.requests import BASE64, UNCHANGED_TYPES
from serving.open_inference.tensors import DATATYPES
from serving.settings import Settings

_DATATYPE: Json = {"type": "string", "enum": [datatype.name for datatype in DATATYPES.values()]}
_SIZES = list_of({"type": "integer", "minimum": -1})
_DATA: Json = {"type": "array", "description": "The elements, flat or nested like the shape."}
_TENSOR: dict[str, Json] = {"name": STRING, "datatype": _DATATYPE, "shape": list_of(COUNT)}

_CONTENT_TYPE: Json = {"type": "string", "enum": [BASE64, *UNCHANGED_TYPES]}
INPUT = object_of(
    {**_TENSOR, "data": _DATA, "parameters": optional_of({"binary_data_size": COUNT, "content_type": _CONTENT_TYPE})},
    optional=("data", "parameters"),
)
_CLASSIFICATION: Json = {**COUNT, "description": "Return this many of the largest numbers, with labels."}
REQUESTED_OUTPUT = object_of(
    {"name": STRING, "parameters": optional_of({"binary_data": BOOLEAN, "classification": _CLASSIFICATION})},
    optional=("parameters",),
)
_REQUEST_PARAMETERS = optional_of(
    {
        "signature_name": STRING,
        "binary_data_output": BOOLEAN,
        "timeout": {**COUNT, "description": "Microseconds; shortens the deadline."},
    }
)
REQUEST = object_of(
    {
        "id": STRING,
        "parameters": _REQUEST_PARAMETERS,
        "inputs": list_of(INPUT, minItems=1),
        "outputs": list_of(REQUESTED_OUTPUT),
    },
    optional=("id", "parameters", "outputs"),
)
OUTPUT = object_of(
    {"name": STRING, "parameters": object_of({"binary_data": BOOLEAN}, optional=("binary_data",))},
    optional=("parameters",),
)
REQUEST = object_of(
    {
        "id": STRING,
        "parameters": object_of(
            {"signature_name": STRING, "binary_data_output": BOOLEAN}, optional=("signature_name", "binary_data_output")
        ),
        "inputs": list_of(INPUT, minItems=1),
        "outputs": list_of(REQUESTED_OUTPUT),
    },
    optional=("id", "parameters", "outputs"),
)
OUTPUT = object_of({**_TENSOR, "data": _DATA, "parameters": OBJECT}, optional=("data", "parameters"))
RESPONSE = object_of(
    {"model_name": STRING, "model_version": STRING, "id": STRING, "outputs": list_of(OUTPUT)}, optional=("id",)
)
_DESCRIBED = list_of(object_of({"name": STRING, "datatype": _DATATYPE, "shape": _SIZES}))

_CONFIGURED = list_of(object_of({"name": STRING, "data_type": STRING, "dims": _SIZES}))
CONFIG = object_of(
    {
        "name": STRING,
        "platform": STRING,
        "backend": STRING,
        "max_batch_size": COUNT,
        "input": _CONFIGURED,
        "output": _CONFIGURED,
        "dynamic_batching": object_of({"preferred_batch_size": list_of(COUNT), "max_queue_delay_microseconds": COUNT}),
    },
    optional=("dynamic_batching",),
)
_DURATION = object_of({"count": COUNT, "ns": COUNT})
_COMPUTE = {"compute_input": _DURATION, "compute_infer": _DURATION, "compute_output": _DURATION}
STATISTICS = object_of(
    {
        "model_stats": list_of(
            object_of(
                {
                    "name": STRING,
                    "version": STRING,
                    "last_inference": COUNT,
                    "inference_count": COUNT,
                    "execution_count": COUNT,
                    "inference_stats": object_of(
                        {"success": _DURATION, "fail": _DURATION, "queue": _DURATION, **_COMPUTE}
                    ),
                    "batch_stats": list_of(object_of({"batch_size": COUNT, **_COMPUTE})),
                }
            )
        )
    }
)
INDEX = list_of(
    object_of(
        {
            "name": STRING,
            "version": STRING,
            "state": {"type": "string", "enum": ["READY", "LOADING", "UNLOADING", "UNAVAILABLE"]},
            "reason": STRING,
        }
    )
)

_SIGNATURE_NAME = query_parameter("signature_name", STRING, "The signature; by default serving_default.")


def describe_operations(_: Settings) -> Sequence[Operation]:
    """Describe the routes of this package."""
    return (
        Operation(
            endpoint="open_inference.server_metadata",
            summary="Describe the server",
            responses={
                200: json_body(
                    object_of({"name": STRING, "version": STRING, "extensions": list_of(STRING)}),
                    "Name, version and extensions.",
                )
            },
        ),
        Operation(
            endpoint="open_inference.server_live",
            summary="Liveness of the server",
            responses={200: json_body(object_of({"live": {"const": True}}), "The process is alive.")},
            failures={400: "The process needs a restart."},
        ),
        Operation(
            endpoint="open_inference.server_ready",
            summary="Readiness of the server",
            responses={
                200: json_body(object_of({"ready": {"const": True}}), "The server is ready."),
                400: json_body(
                    object_of({"ready": {"const": False}, "error": STRING}, optional=("error",)), "It is not ready."
                ),
            },
        ),
        Operation(
            endpoint="open_inference.model_ready",
            summary="Readiness of a model",
            responses={
                200: json_body(object_of({"name": STRING, "ready": {"const": True}}), "The model is available.")
            },
            errors=RESOLVE_ERRORS,
            failures={400: "The model is not available."},
        ),
        Operation(
            endpoint="open_inference.model_metadata",
            summary="Describe a model",
            parameters=[_SIGNATURE_NAME],
            responses={
                200: json_body(
                    object_of(
                        {
                            "name": STRING,
                            "versions": list_of(STRING),
                            "platform": STRING,
                            "inputs": _DESCRIBED,
                            "outputs": _DESCRIBED,
                        }
                    ),
                    "The available versions, and inputs and outputs of a signature; -1 is any size.",
                )
            },
            errors=RESOLVE_ERRORS,
        ),
        Operation(
            endpoint="open_inference.model_config",
            summary="Configuration of a model, as Triton describes it",
            parameters=[_SIGNATURE_NAME],
            responses={200: json_body(CONFIG, "The configuration by a signature.")},
            errors=RESOLVE_ERRORS,
        ),
        Operation(
            endpoint="open_inference.model_statistics",
            summary="Statistics of models",
            responses={200: json_body(STATISTICS, "Counts and times of requests and model calls.")},
            errors=RESOLVE_ERRORS,
        ),
        Operation(
            endpoint="open_inference.repository_index",
            method="POST",
            summary="All models with their states",
            content=_json_content(optional_of({"ready": {**BOOLEAN, "description": "Only those that are available."}})),
            is_body_optional=True,
            responses={200: json_body(INDEX, "The versions of all models.")},
            errors=(InvalidRequest,),
        ),
        *(_control(verb) for verb in ("load", "unload")),
        _infer(),
    )


def _json_content(schema: Json) -> dict[str, Json]:
    return {"application/json": {"schema": schema}}


def _control(verb: str) -> Operation:
    return Operation(
        endpoint=f"open_inference.{verb}_model",
        method="POST",
        summary=f"{verb.capitalize()} a model",
        description="Needs --allow-model-control.",
        content=_json_content(OBJECT),
        is_body_optional=True,
        responses={200: json_body(OBJECT, "Done.")},
        errors=(ModelControlOff, *PREDICT_ERRORS),
    )


def _infer() -> Operation:
    binary: Json = {"schema": {"type": "string", "format": "binary", "minLength": 2}}
    return Operation(
        endpoint="open_inference.infer",
        method="POST",
        summary="Run a model",
        description=(
            "The request parameter signature_name names the signature; without it, the names of the inputs choose one. "
            f"Binary tensors follow the JSON, whose length is in the header {HEADER_LENGTH}. Names, datatypes and "
            "shapes have to be those of the signature."
        ),
        parameters=(
            header_parameter(HEADER_LENGTH, COUNT, "Bytes of JSON at the beginning of the body; without it, all."),
            header_parameter(
                "Content-Encoding", {"type": "string", "enum": ["gzip", "deflate", "identity"]}, "Of the body."
            ),
            TIMEOUT_HEADER,
        ),
        content={"application/json": {"schema": REQUEST}, "application/octet-stream": binary},
        responses={
            200: {
                "description": "The outputs.",
                "headers": {HEADER_LENGTH: {"schema": COUNT, "description": "Bytes of JSON, if binary data follows."}},
                "content": {"application/json": {"schema": RESPONSE}, "application/octet-stream": binary},
            }
        },
        errors=(*PREDICT_ERRORS, UnsupportedMedia),
        make_example=make_example,
    )


def make_example(signature: Signature, inputs: Mapping[str, np.ndarray]) -> Any:
    """Return a request for a signature; None if JSON cannot carry its inputs."""
    tensors = []
    for name, array in inputs.items():
        datatype = DATATYPES.get(signature.inputs[name].dtype)
        if datatype is None or not datatype.json_types:
            return None
        tensor: dict[str, Any] = {"name": name, "datatype": datatype.name, "shape": list(array.shape)}
        elements = array.ravel().tolist()
        if datatype.name == "BYTES":
            elements = [b64encode(element).decode() for element in elements]
            tensor["parameters"] = {"content_type": BASE64}
        tensors.append({**tensor, "data": elements})
    return {"parameters": {"signature_name": signature.name}, "inputs": tensors}
