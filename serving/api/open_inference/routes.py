"""The Open Inference Protocol (V2) over HTTP: `/v2/...`, with the binary tensor data extension.

Follows KServe's specification, and where that is unspecific Triton, which most clients are written for; Triton's
extensions follow Triton's documentation of them. docs/open-inference-protocol.md lists the choices.
"""

from __future__ import annotations

from typing import Any

from flask import Blueprint, Response, request

from serving.api.flask_app import PlainResponse, current_app, encoded_response, json_response, shows_details
from serving.api.open_inference.messages import HEADER_LENGTH, decompress, parse, parse_object, render
from serving.api.open_inference.operations import describe_operations
from serving.errors import InvalidRequest
from serving.greenlets import SMALL_BYTES, run_sized
from serving.inference.repository import ModelVersion
from serving.inference.signatures import DEFAULT_SIGNATURE
from serving.open_inference import descriptions
from serving.open_inference.requests import InferRequest
from serving.open_inference.results import run
from serving.quoting import quote

__all__ = ["blueprint", "describe_operations"]

blueprint = Blueprint("open_inference", __name__, url_prefix="/v2")


@blueprint.get("")
@blueprint.get("/")
def server_metadata() -> dict[str, Any]:
    """Describe the server."""
    return descriptions.describe_server(current_app.inference)


@blueprint.get("/health/live")
def server_live() -> tuple[dict[str, Any], int]:
    """Return 200 while the process is alive; 400 if it needs a restart."""
    problem = current_app.liveness.problem
    return ({"live": True}, 200) if problem is None else ({"live": False, "error": problem}, 400)


@blueprint.get("/health/ready")
def server_ready() -> tuple[dict[str, Any], int]:
    """Return 200 when loading has finished, and at least one model and all required models are available; else 400.

    The protocol specifies a 4xx for "not ready"; Triton uses 400.
    """
    reason = current_app.inference.not_ready_because
    if reason is None:
        return {"ready": True}, 200
    return {"ready": False, "error": reason} if shows_details() else {"ready": False}, 400


@blueprint.get("/models/<model>/ready")
@blueprint.get("/models/<model>/versions/<version>/ready")
def model_ready(model: str, version: str | None = None) -> tuple[dict[str, Any], int]:
    """Return 200 if a model, or a version of it, is available, else 400; 404 for an unknown one."""
    reason = descriptions.explain_not_ready(current_app.inference, model, version)
    if reason is not None:
        return {"name": model, "ready": False, "error": reason}, 400
    return {"name": model, "ready": True}, 200


@blueprint.get("/models/<model>")
@blueprint.get("/models/<model>/versions/<version>")
def model_metadata(model: str, version: str | None = None) -> dict[str, Any]:
    """Describe a model by one of its signatures: `serving_default`, or the query parameter `signature_name`."""
    return descriptions.describe_model(current_app.inference, model, version, _signature_name())


@blueprint.get("/models/<model>/config")
@blueprint.get("/models/<model>/versions/<version>/config")
def model_config(model: str, version: str | None = None) -> dict[str, Any]:
    """Describe a model as Triton's model configuration does, by the same signature as the metadata."""
    return descriptions.describe_config(current_app.inference, model, version, _signature_name())


@blueprint.get("/models/stats")
@blueprint.get("/models/<model>/stats")
@blueprint.get("/models/<model>/versions/<version>/stats")
def model_statistics(model: str | None = None, version: str | None = None) -> dict[str, Any]:
    """Return the statistics of all available versions, of those of a model, or of one."""
    return descriptions.describe_statistics(current_app.inference, model, version)


@blueprint.post("/repository/index")
def repository_index() -> Response:
    """List the versions of all models with their states; with `ready: true` those that are available."""
    ready_only = _read_options().get("ready", False)
    if not isinstance(ready_only, bool):
        raise InvalidRequest(f"ready must be true or false, not {quote(ready_only)}")
    return json_response(descriptions.list_models(current_app.inference, ready_only=ready_only))


@blueprint.post("/repository/models/<model>/load")
def load_model(model: str) -> Response:
    """Load a model, also one that was unloaded, and return when it is available."""
    descriptions.check_load_parameters(_read_options().get("parameters"))
    current_app.inference.load_model(model)
    return encoded_response(b"{}")


@blueprint.post("/repository/models/<model>/unload")
def unload_model(model: str) -> Response:
    """Take a model out of service until it is loaded."""
    _read_options()
    current_app.inference.unload_model(model)
    return encoded_response(b"{}")


@blueprint.post("/models/<model>/infer")
@blueprint.post("/models/<model>/versions/<version>/infer")
def infer(model: str, version: str | None = None) -> Response:
    """Run a model: the signature in the parameter `signature_name`, or the one that has the request's inputs."""
    inference = current_app.inference
    found = inference.resolve(model, version=version)
    parsed = _parse_body(found)
    result = run(inference, found, parsed)
    size = sum(array.nbytes for array in result.outputs.values())
    body, json_bytes = run_sized(size, render, parsed, result)
    if json_bytes is None:
        return encoded_response(body)
    response = PlainResponse([body], content_type="application/octet-stream")
    response.headers[HEADER_LENGTH] = str(json_bytes)
    return response


def _parse_body(version: ModelVersion) -> InferRequest:
    headers = request.headers
    encoding = headers.get("Content-Encoding", "")
    body, json_bytes = decompress(request.get_data(cache=False), encoding, headers.get(HEADER_LENGTH))
    arguments = json_bytes, version.name, version.predictor.signatures
    if json_bytes <= SMALL_BYTES:  # binary data is not parsed, so its size does not matter
        return parse(body, *arguments)
    return current_app.json_process.parse(parse, body, *arguments, json_bytes=json_bytes)


def _read_options() -> dict[str, Any]:
    """Return the JSON object of a request to the repository; it may be left out."""
    body = request.get_data(cache=False)
    return parse_object(body, expected="a JSON object") if body else {}


def _signature_name() -> str:
    return request.args.get("signature_name", DEFAULT_SIGNATURE)
