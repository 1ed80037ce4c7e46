"""The Open Inference Protocol (V2) over HTTP: `/v2/...`, with the binary tensor data extension.

Follows KServe's specification, and where that is unspecific Triton, which most clients are written for.
docs/open-inference-protocol.md lists the choices.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from typing import Any

from flask import Blueprint, Response, request

from serving.api.flask_app import PlainResponse, current_app, encoded_response
from serving.api.open_inference.messages import HEADER_LENGTH, InferRequest, decompress, find_signature, parse, render
from serving.api.open_inference.operations import describe_operations
from serving.api.open_inference.tensors import datatype_of
from serving.errors import ModelNotFound, NotReady
from serving.greenlets import SMALL_BYTES, run_sized
from serving.inference.repository import ModelVersion
from serving.inference.signatures import DEFAULT_SIGNATURE, TensorSpec

__all__ = ["blueprint", "describe_operations"]

blueprint = Blueprint("open_inference", __name__, url_prefix="/v2")

SERVER_NAME = "image-classifier-serving"


@blueprint.get("")
@blueprint.get("/")
def server_metadata() -> dict[str, Any]:
    """Describe the server."""
    try:
        version = installed_version(SERVER_NAME)
    except PackageNotFoundError:
        version = "unreleased"  # run from source, not installed
    return {"name": SERVER_NAME, "version": version, "extensions": ["binary_tensor_data"]}


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
    return ({"ready": True}, 200) if reason is None else ({"ready": False, "error": reason}, 400)


@blueprint.get("/models/<model>/ready")
@blueprint.get("/models/<model>/versions/<version>/ready")
def model_ready(model: str, version: str | None = None) -> tuple[dict[str, Any], int]:
    """Return 200 if a model, or a version of it, is available, else 400; 404 for an unknown one."""
    try:
        current_app.inference.resolve(model, version=version)
    except (NotReady, ModelNotFound) as error:
        is_known = version is None and model in current_app.inference.repository.all_names()
        if isinstance(error, ModelNotFound) and not is_known:
            raise
        return {"name": model, "ready": False, "error": str(error)}, 400
    return {"name": model, "ready": True}, 200


@blueprint.get("/models/<model>")
@blueprint.get("/models/<model>/versions/<version>")
def model_metadata(model: str, version: str | None = None) -> dict[str, Any]:
    """Describe a model by one of its signatures: `serving_default`, or the query parameter `signature_name`."""
    found = current_app.inference.resolve(model, version=version)
    name = request.args.get("signature_name", DEFAULT_SIGNATURE)
    signature = find_signature(found.name, found.predictor.signatures, name)
    versions = (status.version for status in current_app.inference.status(found.name) if status.state == "AVAILABLE")
    return {
        "name": found.name,
        "versions": [str(number) for number in sorted(versions)],
        "platform": "tensorflow_savedmodel",
        "inputs": _describe(signature.inputs.values()),
        "outputs": _describe(signature.outputs.values()),
    }


@blueprint.post("/models/<model>/infer")
@blueprint.post("/models/<model>/versions/<version>/infer")
def infer(model: str, version: str | None = None) -> Response:
    """Run a model: the signature in the parameter `signature_name`, or the one that has the request's inputs."""
    found = current_app.inference.resolve(model, version=version)
    parsed = _parse_body(found)
    result = current_app.inference.predict(found, parsed)
    size = sum(array.nbytes for array in result.outputs.values())
    body, json_bytes = run_sized(size, render, parsed, result)
    if json_bytes is None:
        return encoded_response(body)
    response = PlainResponse([body], content_type="application/octet-stream")
    response.headers[HEADER_LENGTH] = str(json_bytes)
    return response


def _parse_body(version: ModelVersion) -> InferRequest:
    header_length = request.headers.get(HEADER_LENGTH)
    encoding = request.headers.get("Content-Encoding", "")
    body, json_bytes = decompress(request.get_data(cache=False), encoding, header_length)
    arguments = json_bytes, version.name, version.predictor.signatures
    if json_bytes <= SMALL_BYTES:  # binary data is not parsed, so its size does not matter
        return parse(body, *arguments)
    return current_app.json_process.parse(parse, body, *arguments, json_bytes=json_bytes)


def _describe(specs: Iterable[TensorSpec]) -> list[dict[str, Any]]:
    return [
        {
            "name": spec.name,
            "datatype": datatype_of(spec).name,
            # The protocol cannot express an unknown rank: it is described like one unknown size.
            "shape": [-1 if size is None else size for size in ((None,) if spec.shape is None else spec.shape)],
        }
        for spec in specs
    ]
