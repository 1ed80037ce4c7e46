"""The Open Inference Protocol, version 2, over HTTP: `/v2/...`, with the binary tensor data extension.

After the KServe project's "Open Inference Protocol (V2)" and Triton's extensions; docs/open-inference-protocol.md
has the choices that they leave.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.metadata import version as package_version
from typing import Any

import numpy as np
import orjson
from flask import Blueprint, Response, current_app, g, request

from serving.errors import InvalidRequest, ModelNotFound, NotReady
from serving.liveness import Liveness
from serving.predictor import DEFAULT_SIGNATURE, Signature, TensorSpec
from serving.repository import ModelRepository, ModelVersion
from serving.rest.body import DEFLATE, GZIP, inflate
from serving.rest.v2_tensors import (
    datatype_of,
    read_binary_data,
    read_json_data,
    read_shape,
    write_binary_data,
    write_json_data,
)

blueprint = Blueprint("v2", __name__, url_prefix="/v2")

HEADER_LENGTH = "Inference-Header-Content-Length"
PLATFORM = "tensorflow_savedmodel"
SERVER_NAME = "image-classifier-serving"


@blueprint.get("")
@blueprint.get("/")
def server() -> dict[str, Any]:
    """Describe the server."""
    return {"name": SERVER_NAME, "version": package_version("tensorflow"), "extensions": ["binary_tensor_data"]}


@blueprint.get("/health/live")
def live() -> tuple[dict[str, bool], int]:
    """Answer whether the process is of use; the protocol says no with a 4xx."""
    liveness: Liveness = current_app.extensions["liveness"]
    return ({"live": True}, 200) if liveness.problem is None else ({"live": False}, 400)


@blueprint.get("/health/ready")
def ready() -> tuple[dict[str, bool], int]:
    """Answer whether every model is loaded and warmed up."""
    return ({"ready": True}, 200) if _repository().ready else ({"ready": False}, 400)


@blueprint.get("/models/<model>")
@blueprint.get("/models/<model>/versions/<version>")
def model_metadata(model: str, version: str | None = None) -> dict[str, Any]:
    """Describe a model by its default signature."""
    found = _resolve(model, version)
    signature = _signature(found, DEFAULT_SIGNATURE)
    versions = [status.version for status in _repository().versions(model) if status.state == "AVAILABLE"]
    return {
        "name": found.name,
        "versions": [str(number) for number in sorted(versions)],
        "platform": PLATFORM,
        "inputs": _describe(signature.inputs.values()),
        "outputs": _describe(signature.outputs.values()),
    }


@blueprint.get("/models/<model>/ready")
@blueprint.get("/models/<model>/versions/<version>/ready")
def model_ready(model: str, version: str | None = None) -> tuple[dict[str, Any], int]:
    """Answer whether a model can be asked."""
    try:
        _resolve(model, version)
    except NotReady:
        return {"name": model, "ready": False}, 400
    return {"name": model, "ready": True}, 200


@blueprint.post("/models/<model>/infer")
@blueprint.post("/models/<model>/versions/<version>/infer")
def infer(model: str, version: str | None = None) -> Response:
    """Run a signature: `serving_default`, or the one in the request's parameter `signature_name`."""
    found = _resolve(model, version)
    document, binary = _read_request()
    parameters = _read_parameters(document, of="the request")
    name = parameters.get("signature_name", DEFAULT_SIGNATURE)
    if not isinstance(name, str):
        raise InvalidRequest(f"the parameter signature_name must be a string, not {name!r}")
    signature = _signature(found, name)
    wanted = _read_wanted(document, signature, as_binary=parameters.get("binary_data_output") is True)
    outputs = found.predictor.predict(name, _read_inputs(document, binary, signature))
    head: dict[str, Any] = {"model_name": found.name, "model_version": str(found.version)}
    if "id" in document:
        head["id"] = str(document["id"])
    return _reply(head, outputs, signature, wanted)


def _resolve(model: str, version: str | None) -> ModelVersion:
    if version is not None and not (version.isascii() and version.isdigit() and len(version) < 20):
        raise ModelNotFound(f"a version is a whole number, not {version}")
    found = _repository().resolve(model, version=None if version is None else int(version))
    g.model = found.name
    return found


def _signature(version: ModelVersion, name: str) -> Signature:
    signature = version.predictor.signatures.get(name)
    if signature is None or not signature.inputs:
        names = ", ".join(name for name, other in version.predictor.signatures.items() if other.inputs)
        raise InvalidRequest(f"model {version.name} has no signature {name}; it has {names}")
    return signature


def _describe(specs: Iterable[TensorSpec]) -> list[dict[str, Any]]:
    return [
        {
            "name": spec.name,
            "datatype": datatype_of(spec),
            "shape": [-1 if size is None else size for size in spec.shape or ()],
        }
        for spec in specs
    ]


def _read_request() -> tuple[dict[str, Any], memoryview]:
    """Read the JSON at the body's start and the binary data behind it."""
    body: bytes = request.get_data(cache=False)
    encoding = request.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding != "identity":
        wbits = {"gzip": GZIP, "deflate": DEFLATE}.get(encoding)
        if wbits is None:
            raise InvalidRequest(f"the Content-Encoding {encoding} is not understood; gzip and deflate are")
        try:
            body = inflate(body, wbits=wbits)
        except ValueError as error:
            raise InvalidRequest(f"the body cannot be inflated as {encoding}: {error}") from error
    length = len(body)
    if (announced := request.headers.get(HEADER_LENGTH)) is not None:
        if not (announced.isascii() and announced.isdigit() and len(announced) < 20 and int(announced) <= length):
            raise InvalidRequest(f"{HEADER_LENGTH} must be from 0 to the body's {length} bytes, not {announced}")
        length = int(announced)
    view = memoryview(body)
    try:
        document = orjson.loads(view[:length])
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"the request is no JSON: {error}") from error
    if not isinstance(document, dict):
        raise InvalidRequest("expected a JSON object with inputs")
    return document, view[length:]


def _read_parameters(owner: Mapping[str, Any], *, of: str) -> dict[str, Any]:
    parameters = owner.get("parameters", {})
    if not isinstance(parameters, dict):
        raise InvalidRequest(f"the parameters of {of} must be an object")
    if shared := sorted(name for name in parameters if name.startswith("shared_memory")):
        raise InvalidRequest(f"{shared[0]}: shared memory is not supported; send the data")
    return parameters


def _read_inputs(document: Mapping[str, Any], binary: memoryview, signature: Signature) -> dict[str, np.ndarray]:
    tensors = document.get("inputs")
    if not isinstance(tensors, list) or not all(isinstance(tensor, dict) for tensor in tensors):
        raise InvalidRequest("expected inputs as a list of objects with name, shape, datatype and data")
    inputs: dict[str, np.ndarray] = {}
    for tensor in tensors:
        name = tensor.get("name")
        if not isinstance(name, str) or name not in signature.inputs:
            names = ", ".join(signature.inputs)
            raise InvalidRequest(f'signature "{signature.name}": {name!r} is no input of it: {names}')
        if name in inputs:
            raise InvalidRequest(f"input {name} is there twice")
        spec = signature.inputs[name]
        shape = read_shape(name, tensor, spec)
        size = _read_parameters(tensor, of=f"input {name}").get("binary_data_size")
        if size is None:
            inputs[name] = read_json_data(name, tensor.get("data"), spec, shape)
            continue
        if type(size) is not int or not 0 <= size <= len(binary) or "data" in tensor:
            raise InvalidRequest(
                f"input {name}: binary_data_size must be from 0 to the {len(binary)} bytes that are left behind the "
                f"JSON, without data in it; got {size!r}"
            )
        inputs[name] = read_binary_data(name, binary[:size], spec, shape)
        binary = binary[size:]
    if len(binary):
        raise InvalidRequest(f"{len(binary)} bytes of binary data belong to no input")
    return inputs


def _read_wanted(document: Mapping[str, Any], signature: Signature, *, as_binary: bool) -> dict[str, bool]:
    """Return the names of the outputs to answer with, and whether each is to be binary."""
    asked = document.get("outputs")
    if asked is None or asked == []:
        return dict.fromkeys(signature.outputs, as_binary)
    if not isinstance(asked, list) or not all(isinstance(output, dict) for output in asked):
        raise InvalidRequest("expected outputs as a list of objects with name")
    wanted: dict[str, bool] = {}
    for output in asked:
        name = output.get("name")
        if not isinstance(name, str) or name not in signature.outputs:
            names = ", ".join(signature.outputs)
            raise InvalidRequest(f'signature "{signature.name}": {name!r} is no output of it: {names}')
        parameters = _read_parameters(output, of=f"output {name}")
        if parameters.get("classification"):
            raise InvalidRequest(f"output {name}: classification is not supported; ask for the probabilities")
        wanted[name] = parameters.get("binary_data", as_binary) is True
    return wanted


def _reply(
    head: dict[str, Any], outputs: Mapping[str, np.ndarray], signature: Signature, wanted: Mapping[str, bool]
) -> Response:
    tensors = []
    parts = []
    for name, is_binary in wanted.items():
        array, spec = outputs[name], signature.outputs[name]
        tensor: dict[str, Any] = {"name": name, "datatype": datatype_of(spec), "shape": array.shape}
        if is_binary:
            parts.append(write_binary_data(array, spec))
            tensor["parameters"] = {"binary_data_size": len(parts[-1])}
        else:
            tensor["data"] = write_json_data(array, spec)
        tensors.append(tensor)
    text = orjson.dumps({**head, "outputs": tensors}, option=orjson.OPT_SERIALIZE_NUMPY)
    if not any(wanted.values()):
        return Response(text, mimetype="application/json")
    response = Response(b"".join([text, *parts]), mimetype="application/octet-stream")
    response.headers[HEADER_LENGTH] = str(len(text))
    return response


def _repository() -> ModelRepository:
    repository: ModelRepository = current_app.extensions["repository"]
    return repository
