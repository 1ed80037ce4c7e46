"""TensorFlow Serving's REST API: `/v1/models/...`.

After `model_servers/http_rest_api_handler.cc` and its documentation, "RESTful API". The differences that are meant
are listed in docs/tensorflow-serving.md.
"""

from __future__ import annotations

import re
import zlib
from typing import Any

from flask import Blueprint, Response, current_app, g, request
from werkzeug.exceptions import NotFound

from serving.errors import InvalidRequest, ModelNotFound, TooLarge
from serving.predictor import DEFAULT_SIGNATURE, Signature, TensorSpec
from serving.repository import MAX_VERSION, ModelRepository, ModelVersion
from serving.rest.json_document import NestedTooDeep, parse_document, quote_document
from serving.rest.json_tensor import decode_inputs, encode_outputs

blueprint = Blueprint("tfserving", __name__)

_METHODS = ("GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS")
_MAX_INFLATED_BYTES = 100_000_000
_VERSION = r"(?:/versions/(?P<version>[0-9]+)|/labels/(?P<label>[^/:]+))?"
_CALL = re.compile(rf"/v1/models/(?P<model>[^/:]+){_VERSION}:(?P<method>predict|classify|regress)")
_STATUS = re.compile(rf"/v1/models(?:/(?P<model>[^/:]+))?{_VERSION}(?P<metadata>/metadata)?")


@blueprint.get("/v1")
def nothing() -> Response:
    """Answer 404, where Flask would redirect to /v1/."""
    raise NotFound


@blueprint.route("/v1/", defaults={"_": ""}, methods=_METHODS, provide_automatic_options=False)
@blueprint.route("/v1/<path:_>", methods=_METHODS, provide_automatic_options=False)
@blueprint.route("/V1/<path:_>", methods=_METHODS, provide_automatic_options=False)
def answer(_: str) -> Response:
    """Answer any request under /v1/."""
    query = request.query_string.decode("latin-1")
    # The query is part of the path that is matched, as it is there.
    path = request.path + ("?" + query if query else "")
    if request.method == "OPTIONS":
        return Response(status=200 if re.match("https?://", request.headers.get("Origin", "")) else 400)
    if request.method == "POST" and (call := _CALL.fullmatch(path)):
        return _call(call)
    if request.method == "GET" and (status := _STATUS.fullmatch(path)):
        return _metadata(status) if status["metadata"] else _status(status)
    raise InvalidRequest(f"Malformed request: {request.method} {path}")


def _call(call: re.Match[str]) -> Response:
    if call["label"]:
        raise InvalidRequest(f"Unrecognized servable version label: {call['label']}")
    version = _repository().resolve(call["model"], version=_version(call))
    g.model = version.name
    assert version.predictor is not None
    signatures = version.predictor.signatures
    if call["method"] != "predict":
        kind = {"classify": "classification", "regress": "regression"}[call["method"]]
        default = signatures.get(DEFAULT_SIGNATURE)
        inputs = "\n".join(f"  {name}: {spec}" for name, spec in default.inputs.items()) if default else ""
        raise InvalidRequest(f"No {kind} inputs found in SignatureDef: inputs {{\n{inputs}\n}}")
    try:
        document = parse_document(_read_body())
    except NestedTooDeep as error:
        default = signatures.get(DEFAULT_SIGNATURE)
        names = ", ".join(default.inputs) if default else "inputs"
        raise InvalidRequest(f"tensor parsing error: {names}\nThe request is {error}") from error
    signature = _signature(document, signatures)
    outputs = version.predictor.predict(signature.name, decode_inputs(document, signature))
    return Response(encode_outputs(outputs, signature, as_rows="instances" in document), mimetype="application/json")


def _signature(document: Any, signatures: Any) -> Signature:
    """Check the request as a whole, and return the signature it asks for."""
    if not isinstance(document, dict):
        raise InvalidRequest(f"JSON Value: {quote_document(document)} Is not object")
    name = document.get("signature_name", "")
    if not isinstance(name, str):
        raise InvalidRequest(
            f"JSON Value: {quote_document(document)} not formatted correctly. "
            "'signature_name' key must be a string value."
        )
    signature = signatures.get(name or DEFAULT_SIGNATURE)
    if signature is None:
        raise InvalidRequest(f'Serving signature name: "{name or DEFAULT_SIGNATURE}" not found in signature def')
    if "instances" in document and "inputs" in document:
        raise InvalidRequest(
            f"JSON Value: {quote_document(document)} Not formatted correctly expecting only one of 'inputs' or "
            "'instances' keys to exist "
        )
    if "instances" not in document and "inputs" not in document:
        raise InvalidRequest("Missing 'inputs' or 'instances' key")
    found: Signature = signature
    return found


def _status(match: re.Match[str]) -> Response:
    name = _model_name(match)
    versions = _repository().versions(name)
    if match["version"] is not None:
        number = _version(match)
        versions = [version for version in versions if version.version == number]
        if not versions:
            raise ModelNotFound(f"Could not find version {number} of model {name}")
    return _json(
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
    if match["label"]:
        raise InvalidRequest(f"Unrecognized servable version label: {match['label']}")
    version = _repository().resolve(_model_name(match), version=_version(match))
    return _json(
        {
            "model_spec": {"name": version.name, "signature_name": "", "version": str(version.version)},
            "metadata": {"signature_def": {"signature_def": _describe_signatures(version)}},
        }
    )


def _describe_signatures(version: ModelVersion) -> dict[str, Any]:
    assert version.predictor is not None
    return {
        name: {
            "inputs": {key: _describe_tensor(spec) for key, spec in signature.inputs.items()},
            "outputs": {key: _describe_tensor(spec) for key, spec in signature.outputs.items()},
            "method_name": signature.method_name,
            "defaults": {},
        }
        for name, signature in version.predictor.signatures.items()
    }


def _describe_tensor(spec: TensorSpec) -> dict[str, Any]:
    dimensions = [{"size": str(-1 if size is None else size), "name": ""} for size in spec.shape or ()]
    return {
        "name": spec.tensor_name,
        "dtype": spec.dtype,
        "tensor_shape": {"dim": dimensions, "unknown_rank": spec.shape is None},
    }


def _read_body() -> bytes:
    """Read the request's body, inflated if it says it is gzip; what is no gzip counts as empty, as it does there."""
    body = request.get_data(cache=False)
    if request.headers.get("Content-Encoding") != "gzip":
        return body
    inflater = zlib.decompressobj(16 + zlib.MAX_WBITS)
    try:
        inflated = inflater.decompress(body, _MAX_INFLATED_BYTES)
    except zlib.error:
        return b""
    if inflater.unconsumed_tail:
        raise TooLarge(f"the gzip body is larger than {_MAX_INFLATED_BYTES:,} bytes when inflated")
    return inflated if inflater.eof else b""


def _model_name(match: re.Match[str]) -> str:
    if not match["model"]:
        raise InvalidRequest("Missing model name in request.")
    return match["model"]


def _version(match: re.Match[str]) -> int | None:
    if match["version"] is None:
        return None
    number = int(match["version"][:30])
    if number > MAX_VERSION:
        raise InvalidRequest(f"the version must be at most {MAX_VERSION}")
    return number


def _repository() -> ModelRepository:
    repository: ModelRepository = current_app.extensions["repository"]
    return repository


def _json(reply: dict[str, Any]) -> Response:
    return Response(current_app.json.dumps(reply), mimetype="application/json")
