"""The Open Inference Protocol (V2) over HTTP: `/v2/...`, with the binary tensor data extension.

After the specification of KServe, and where it leaves things open after Triton, which most of its clients were written
for. docs/open-inference-protocol.md has the choices.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from typing import Any

import numpy as np
import orjson
from flask import Blueprint, Response, current_app, g, request

from serving.api.json_arrays import write_large
from serving.api.json_process import JsonProcess
from serving.api.model_choice import choose_version
from serving.api.open_inference.request import (
    HEADER_LENGTH,
    inflate_body,
    json_length,
    read_id,
    read_inputs,
    read_outputs,
    read_signature_name,
    split_body,
)
from serving.api.open_inference.tensors import datatype_of, encode_binary, encode_json, quote
from serving.api.responses import PlainResponse, encoded_response
from serving.errors import InvalidRequest, ModelNotFound, NotReady
from serving.greenlets import SMALL_BYTES, run_sized
from serving.inference.liveness import Liveness
from serving.inference.repository import ModelRepository, ModelVersion
from serving.inference.signatures import DEFAULT_SIGNATURE, Signature, TensorSpec
from serving.request_context import current_request

blueprint = Blueprint("v2", __name__, url_prefix="/v2")

SERVER_NAME = "image-classifier-serving"
PLATFORM = "tensorflow_savedmodel"
EXTENSIONS = ["binary_tensor_data"]


@blueprint.get("")
@blueprint.get("/")
def server_metadata() -> dict[str, Any]:
    """Describe the server."""
    return {"name": SERVER_NAME, "version": _server_version(), "extensions": EXTENSIONS}


@blueprint.get("/health/live")
def server_live() -> tuple[dict[str, Any], int]:
    """Return whether the process works, without need of a restart; 400 if not, as for `server_ready`."""
    liveness: Liveness = current_app.extensions["liveness"]
    problem = liveness.problem
    return ({"live": True}, 200) if problem is None else ({"live": False, "error": problem}, 400)


@blueprint.get("/health/ready")
def server_ready() -> tuple[dict[str, Any], int]:
    """Return whether every model had its first load attempt, and all required ones and at least one can be used.

    The protocol's word for no is a 4xx, and Triton's a 400.
    """
    reason = _repository().not_ready_because
    return ({"ready": True}, 200) if reason is None else ({"ready": False, "error": reason}, 400)


@blueprint.get("/models/<model>/ready")
@blueprint.get("/models/<model>/versions/<version>/ready")
def model_ready(model: str, version: str | None = None) -> tuple[dict[str, Any], int]:
    """Answer whether a model, or a version of it, can be asked; 404 for one that is not known at all."""
    try:
        _resolve(model, version)
    except NotReady as error:
        return {"name": model, "ready": False, "error": str(error)}, 400
    except ModelNotFound as error:
        if version is not None or model not in _repository().all_names():
            raise
        return {"name": model, "ready": False, "error": str(error)}, 400
    return {"name": model, "ready": True}, 200


@blueprint.get("/models/<model>")
@blueprint.get("/models/<model>/versions/<version>")
def model_metadata(model: str, version: str | None = None) -> dict[str, Any]:
    """Describe a model by one of its signatures: `serving_default`, or the one in the query `signature_name`."""
    found = _resolve(model, version)
    name = request.args.get("signature_name", DEFAULT_SIGNATURE)
    signature = _signature(found.name, found.predictor.signatures, name)
    versions = (status.version for status in _repository().versions(found.name) if status.state == "AVAILABLE")
    return {
        "name": found.name,
        "versions": [str(number) for number in sorted(versions)],
        "platform": PLATFORM,
        "inputs": _describe(signature.inputs.values()),
        "outputs": _describe(signature.outputs.values()),
    }


@blueprint.post("/models/<model>/infer")
@blueprint.post("/models/<model>/versions/<version>/infer")
def infer(model: str, version: str | None = None) -> Response:
    """Run the signature of a model that takes the request's inputs, or the one in its parameter `signature_name`."""
    found = _resolve(model, version)
    header_length = request.headers.get(HEADER_LENGTH)
    body = inflate_body(request.get_data(cache=False), request.headers.get("Content-Encoding", ""), header_length)
    read = _read_request(body, header_length, found)
    signature = found.predictor.signatures[read.signature_name]
    reply = {"model_name": found.name, "model_version": str(found.version)}
    if read.identifier is not None:
        reply["id"] = read.identifier
    arrays = found.predictor.predict(signature.name, read.inputs, deadline_s=current_request.get().deadline_s)
    size = sum(array.nbytes for array in arrays.values())
    return run_sized(size, _encode_reply, reply, arrays, signature, read.outputs)


@dataclass(frozen=True)
class InferRequest:
    """An inference request, read."""

    signature_name: str
    identifier: str | None
    inputs: Mapping[str, np.ndarray]
    outputs: Mapping[str, bool]  # wanted, and whether as binary data


def _read_request(body: bytes, header_length: str | None, version: ModelVersion) -> InferRequest:
    json_bytes = json_length(body, header_length)
    if json_bytes <= SMALL_BYTES:  # the rest is not parsed
        return read_infer(body, header_length, version.name, version.predictor.signatures)
    process: JsonProcess = current_app.extensions["json_process"]
    signatures = version.predictor.signatures
    return process.parse(read_infer, body, header_length, version.name, signatures, json_bytes=json_bytes)


def read_infer(body: bytes, header_length: str | None, model: str, signatures: Mapping[str, Signature]) -> InferRequest:
    """Read an inference request.

    Raises:
        InvalidRequest: it is malformed, or does not fit the signature.
    """
    document, binary = split_body(body, header_length)
    signature = _signature(model, signatures, read_signature_name(document, signatures))
    identifier = read_id(document)
    outputs = read_outputs(document, signature)
    return InferRequest(signature.name, identifier, read_inputs(document, binary, signature), outputs)


def _encode_reply(
    reply: dict[str, Any], arrays: Mapping[str, np.ndarray], signature: Signature, wanted: Mapping[str, bool]
) -> Response:
    outputs = []
    chunks = []
    for name, is_binary in wanted.items():
        array, spec = arrays[name], signature.outputs[name]
        output: dict[str, Any] = {"name": name, "datatype": datatype_of(spec).name, "shape": array.shape}
        if is_binary:
            chunk, size = encode_binary(array, spec)
            chunks.append(chunk)
            output["parameters"] = {"binary_data_size": size}
        else:
            data = encode_json(array, spec)
            output["data"] = write_large(data) if isinstance(data, np.ndarray) else data
        outputs.append(output)
    text = orjson.dumps({**reply, "outputs": outputs}, option=orjson.OPT_SERIALIZE_NUMPY)
    if not chunks:
        return encoded_response(text)
    response = PlainResponse([b"".join((text, *chunks))], content_type="application/octet-stream")
    response.headers[HEADER_LENGTH] = str(len(text))
    return response


def _resolve(model: str, version: str | None) -> ModelVersion:
    found = choose_version(_repository(), model, version=version)
    g.model = found.name
    return found


def _signature(model: str, signatures: Mapping[str, Signature], name: str) -> Signature:
    signature = signatures.get(name)
    if signature is None:
        names = ", ".join(name for name, other in signatures.items() if other.inputs)
        raise InvalidRequest(f"model {model} has no signature {quote(name)}; it has {names}")
    return signature


def _describe(specs: Iterable[TensorSpec]) -> list[dict[str, Any]]:
    return [
        {"name": spec.name, "datatype": datatype_of(spec).name, "shape": _describe_shape(spec.shape)} for spec in specs
    ]


def _describe_shape(shape: tuple[int | None, ...] | None) -> list[int]:
    if shape is None:
        return [-1]  # of any rank, which the protocol cannot say
    return [-1 if size is None else size for size in shape]


def _server_version() -> str:
    try:
        return installed_version(SERVER_NAME)
    except PackageNotFoundError:
        return "unreleased"  # run from its source


def _repository() -> ModelRepository:
    repository: ModelRepository = current_app.extensions["repository"]
    return repository
