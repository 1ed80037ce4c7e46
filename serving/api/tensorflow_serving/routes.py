"""TensorFlow Serving's REST API: `/v1/models/...`.

After `model_servers/http_rest_api_handler.cc` and its documentation, "RESTful API". The differences that are meant
are listed in docs/tensorflow-serving.md.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import quote, unquote

import numpy as np
from flask import Blueprint, Response, current_app, g, request
from flask.blueprints import BlueprintSetupState
from werkzeug.exceptions import NotImplemented as MethodNotImplemented
from werkzeug.routing import BaseConverter, Rule

from serving.api.compression import inflate
from serving.api.json_process import LARGE_JSON_BYTES, JsonProcess
from serving.api.responses import encoded_response, json_response
from serving.api.tensorflow_serving.classify_regress import check_examples, refusal
from serving.api.tensorflow_serving.json_document import parse_document
from serving.api.tensorflow_serving.json_pixels import find_pixel_input, read_pixels
from serving.api.tensorflow_serving.json_quoting import printable, quote_document
from serving.api.tensorflow_serving.json_response import encode_outputs
from serving.api.tensorflow_serving.json_tensor import decode_inputs
from serving.errors import InvalidRequest, ServingError
from serving.greenlets import run_sized
from serving.inference.model_config import read_version_number
from serving.inference.repository import ModelRepository, ModelVersion
from serving.inference.signatures import DEFAULT_SIGNATURE, Signature, TensorSpec, check_rows
from serving.inference.tensor_proto import write_tensor
from serving.request_context import current_request
from serving.settings import Settings

R = TypeVar("R")

JSON_ELEMENT_BYTES = 16  # of a response: a float32 with its comma

blueprint = Blueprint("tfserving", __name__)

_METHODS = ("GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS")
# The request target is matched as it was sent, with its query and its percent-escapes; the name of the model and the
# label are decoded afterwards. Paths match in any case; the words after the colon and at the end as they are.
_MODEL = "[^/:]+"
_VERSION = r"(?:/versions/(?P<version>[0-9]+)|/labels/(?P<label>[^/:]+))?"
_CALL = re.compile(rf"(?i:/v1/models/(?P<model>{_MODEL}){_VERSION}):(?P<method>predict|classify|regress)")
_BAD_ESCAPE = re.compile("%(?![0-9A-Fa-f]{2})")
_STATUS = re.compile(rf"(?i:/v1/models(?:/(?P<model>{_MODEL}))?{_VERSION}(?P<metadata>/metadata)?)")


class _RestOfPath(BaseConverter):
    """Everything that follows, empty parts and slashes included."""

    regex = ".*"
    part_isolating = False


@blueprint.record_once
def add_routes(state: BlueprintSetupState) -> None:
    """Route every path under /v1/, and every method: werkzeug's rules can, Flask's have to name their methods."""
    state.app.url_map.converters["rest"] = _RestOfPath
    for prefix in ("/v1/", "/V1/"):
        state.app.url_map.add(Rule(prefix + "<rest:_>", endpoint="tfserving.answer"))
    state.app.view_functions["tfserving.answer"] = answer


def answer(_: str) -> Response:
    """Answer any request under /v1/."""
    method = request.method
    if method not in _METHODS:
        raise MethodNotImplemented(f"{method} is not a method of this API")
    path = _request_target()
    if method == "OPTIONS":
        return Response(status=200 if re.search("https?://", request.headers.get("Origin", "")) else 400)
    if method == "POST" and (call := _CALL.fullmatch(path)):
        return _predict(call) if call["method"] == "predict" else _classify_or_regress(call)
    if method == "GET" and (status := _STATUS.fullmatch(path)):
        return _metadata(status) if status["metadata"] == "/metadata" else _status(status)
    raise InvalidRequest(f"Malformed request: {method} {path}")


def _request_target() -> str:
    """Return the path as it was sent, with the query."""
    environ = request.environ
    sent = environ.get("REQUEST_URI") or environ.get(
        "RAW_URI"
    )  # which of the two, if any, differs between WSGI servers
    if sent is None:
        query = environ["QUERY_STRING"]
        sent = quote(environ["PATH_INFO"], encoding="latin-1") + (f"?{query}" if query else "")
    target: str = sent.encode("latin-1").decode("utf-8", "replace")
    if _BAD_ESCAPE.search(target):
        raise InvalidRequest(f"Malformed request: {request.method} {target} holds a % without two hexadecimal digits")
    return target


@dataclass(frozen=True)
class PredictRequest:
    """A predict request's JSON, read."""

    signature_name: str
    inputs: Mapping[str, np.ndarray]
    as_rows: bool  # it came as `instances`


def _predict(call: re.Match[str]) -> Response:
    g.model, g.is_tfs_predict = _model_name(call), True
    number = _version(call)
    body = _read_body()
    problem = None
    signatures: Mapping[str, Signature] | None = None
    try:
        predictor = _resolve(call, number).predictor
        signatures = predictor.signatures
    except ServingError as error:
        problem = error  # a fault in the body is reported first
    read = None if signatures is None else _read_pixels(body, signatures)
    if read is None:
        settings: Settings = current_app.extensions["settings"]
        read = _parse(read_predict, body, signatures, settings.max_rows)
    if problem:
        raise problem
    assert read is not None  # the model is known
    outputs = predictor.predict(read.signature_name, read.inputs, deadline_s=current_request.get().deadline_s)
    signature = predictor.signatures[read.signature_name]
    size = sum(array.size for array in outputs.values()) * JSON_ELEMENT_BYTES
    return encoded_response(run_sized(size, encode_outputs, outputs, signature, as_rows=read.as_rows))


def _read_pixels(body: bytes, signatures: Mapping[str, Signature]) -> PredictRequest | None:
    """Read a request for a model of images that holds nothing but pixels; None where it is another."""
    spec = find_pixel_input(signatures.get(DEFAULT_SIGNATURE))
    if spec is None or len(body) > LARGE_JSON_BYTES:
        return None
    read = run_sized(len(body), read_pixels, body, spec)
    return None if read is None else PredictRequest(DEFAULT_SIGNATURE, {spec.name: read[0]}, as_rows=read[1])


def read_predict(body: bytes, signatures: Mapping[str, Signature] | None, max_rows: int) -> PredictRequest | None:
    """Read a predict request.

    Args:
        body: the JSON.
        signatures: the model's; None where there is no such model, so that only the document itself is checked.
        max_rows: most rows of a request.

    Raises:
        InvalidRequest: it is not JSON, or does not fit the signature.
        TooLarge: it has more rows.
    """
    document = _read_document(body)
    if signatures is None:
        return None
    signature = _signature(document, signatures)
    if isinstance(document.get("instances"), list):
        check_rows(len(document["instances"]), max_rows)
    return PredictRequest(signature.name, decode_inputs(document, signature), as_rows="instances" in document)


def _classify_or_regress(call: re.Match[str]) -> Response:
    number = _version(call)
    name = _parse(read_examples, _read_body())
    predictor = _resolve(call, number).predictor
    raise refusal(name, predictor.signatures, method=call["method"])


def read_examples(body: bytes) -> str:
    """Check a classify or regress request; returns the name of its signature.

    Raises:
        InvalidRequest: it is not JSON, or its `examples` are not.
    """
    document = _read_document(body)
    check_examples(document)
    name: str = document.get("signature_name", "")
    return name


def _parse(function: Callable[..., R], body: bytes, *args: Any) -> R:
    process: JsonProcess = current_app.extensions["json_process"]
    return process.parse(function, body, *args)


def _read_document(body: bytes) -> dict[str, Any]:
    """Read a request's JSON, which comes first: a bad document for a model that is not there is a bad document."""
    document = parse_document(body)
    if not isinstance(document, dict):
        raise InvalidRequest(f"JSON Value: {quote_document(document)} Is not object")
    if not isinstance(document.get("signature_name", ""), str):
        raise InvalidRequest(
            f"JSON Value: {quote_document(document)} not formatted correctly. "
            "'signature_name' key must be a string value."
        )
    return document


def _resolve(match: re.Match[str], number: int | None) -> ModelVersion:
    label = None if match["label"] is None else unquote(match["label"])
    version = _repository().resolve(_model_name(match), version=number, label=label)
    g.model = version.name
    return version


def _signature(document: Mapping[str, Any], signatures: Mapping[str, Signature]) -> Signature:
    """Return the signature that a request asks for, once it is sure that the request has tensors for it."""
    name = document.get("signature_name") or DEFAULT_SIGNATURE
    signature = signatures.get(name)
    if signature is None:
        raise InvalidRequest(f'Serving signature name: "{printable(name)}" not found in signature def')
    if not signature.inputs:
        raise InvalidRequest(f"Failed to get input map for signature: {document.get('signature_name') or 'DEFAULT'}")
    if "instances" in document and "inputs" in document:
        raise InvalidRequest(
            f"JSON Value: {quote_document(document)} Not formatted correctly expecting only one of 'inputs' or "
            "'instances' keys to exist "
        )
    if "instances" not in document and "inputs" not in document:
        raise InvalidRequest("Missing 'inputs' or 'instances' key")
    return signature


def _status(match: re.Match[str]) -> Response:
    number = _version(match)
    name = _model_name(match)
    versions = _repository().versions(name, number)
    return json_response(
        {
            "model_version_status": [
                {
                    "version": str(version.version),
                    "state": version.state,
                    "status": {"error_code": version.error_code, "error_message": version.error_message},
                }
                for version in versions
            ]
        }
    )


def _metadata(match: re.Match[str]) -> Response:
    version = _resolve(match, _version(match))
    return json_response(
        {
            "model_spec": {"name": version.name, "signature_name": "", "version": str(version.version)},
            "metadata": {"signature_def": {"signature_def": _describe_signatures(version)}},
        }
    )


def _describe_signatures(version: ModelVersion) -> dict[str, Any]:
    return {
        name: {
            "inputs": {key: _describe_tensor(spec) for key, spec in signature.inputs.items()},
            "outputs": {key: _describe_tensor(spec) for key, spec in signature.outputs.items()},
            "method_name": signature.method_name,
            "defaults": {
                key: _describe_default(array, signature.inputs[key]) for key, array in signature.defaults.items()
            },
        }
        for name, signature in version.predictor.signatures.items()
    }


def _describe_default(array: np.ndarray, spec: TensorSpec) -> dict[str, Any]:
    from google.protobuf import json_format
    from tensorflow.core.framework import tensor_pb2

    tensor = tensor_pb2.TensorProto()
    write_tensor(tensor, array, dtype_name=spec.dtype)
    described: dict[str, Any] = json_format.MessageToDict(
        tensor, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return described


def _describe_tensor(spec: TensorSpec) -> dict[str, Any]:
    dimensions = [{"size": str(-1 if size is None else size), "name": ""} for size in spec.shape or ()]
    return {
        "name": spec.tensor_name,
        "dtype": spec.dtype,
        "tensor_shape": {"dim": dimensions, "unknown_rank": spec.shape is None},
    }


def _read_body() -> bytes:
    """Read the request's body, inflated if it says it is gzip; what is not gzip counts as empty, as it does there."""
    body: bytes = request.get_data(cache=False)
    if "gzip" not in request.environ.get("HTTP_CONTENT_ENCODING", ""):
        return body
    try:
        return inflate(body)
    except ValueError:
        return b""


def _model_name(match: re.Match[str]) -> str:
    if not match["model"]:
        raise InvalidRequest("Missing model name in request.")
    return unquote(match["model"])


def _version(match: re.Match[str]) -> int | None:
    if match["version"] is None:
        return None
    return read_version_number(match["version"])


def _repository() -> ModelRepository:
    repository: ModelRepository = current_app.extensions["repository"]
    return repository
