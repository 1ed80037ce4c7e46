"""TensorFlow Serving's REST API: `/v1/models/...`.

Follows `model_servers/http_rest_api_handler.cc` and its documentation, "RESTful API". docs/tensorflow-serving.md lists
the intended differences.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from types import ModuleType
from typing import Any
from urllib.parse import quote, unquote

from flask import Blueprint, Response, request
from flask.blueprints import BlueprintSetupState
from werkzeug.exceptions import NotImplemented as MethodNotImplemented
from werkzeug.routing import BaseConverter, Rule

from serving.api.compression import inflate
from serving.api.flask_app import current_app, encoded_response, error_response, json_response
from serving.api.json_process import LARGE_JSON_BYTES
from serving.api.tensorflow_serving.json_response import encode_outputs
from serving.api.tensorflow_serving.messages import parse_examples, parse_pixels, parse_predict, refusal
from serving.api.tensorflow_serving.operations import CALLS, METADATA, describe_operations
from serving.errors import InvalidRequest, ServingError
from serving.greenlets import offload, run_sized
from serving.inference.model_config import read_version_number
from serving.inference.repository import ModelVersion
from serving.request_context import current_request

JSON_ELEMENT_BYTES = 16  # in a response: a float32 and a comma

__all__ = ["blueprint", "describe_operations"]

blueprint = Blueprint("tensorflow_serving", __name__)

_METHODS = ("GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS")
# The raw request target is matched, with its query and percent-encoding; model names and labels are decoded afterwards.
# Paths are case-insensitive, but the method after the colon and "/metadata" are case-sensitive.
_MODEL = "[^/:]+"
_VERSION = r"(?:/versions/(?P<version>[0-9]+)|/labels/(?P<label>[^/:]+))?"
_CALL = re.compile(rf"(?i:/v1/models/(?P<model>{_MODEL}){_VERSION}):(?P<method>{'|'.join(CALLS)})")
_BAD_ESCAPE = re.compile("%(?![0-9A-Fa-f]{2})")
_STATUS = re.compile(rf"(?i:/v1/models(?:/(?P<model>{_MODEL}))?{_VERSION}(?P<metadata>{METADATA})?)")


class _RestOfPath(BaseConverter):
    """Matches the rest of the path, empty segments and slashes included."""

    regex = ".*"
    part_isolating = False


@blueprint.record_once
def add_routes(state: BlueprintSetupState) -> None:
    """Route every path and method under /v1/. This takes werkzeug's rules: Flask's have to list their methods."""
    state.app.url_map.converters["rest"] = _RestOfPath
    for prefix in ("/v1/", "/V1/"):
        state.app.url_map.add(Rule(prefix + "<rest:_>", endpoint="tensorflow_serving.respond"))
    state.app.view_functions["tensorflow_serving.respond"] = respond


def respond(_: str) -> Response:
    """Dispatch any request under /v1/."""
    context = current_request.get()
    context.route = "/v1/<path>"
    method = request.method
    if method not in _METHODS:
        raise MethodNotImplemented(f"{method} is not a method of this API")
    path = _request_target()
    if method == "OPTIONS":
        return Response(status=200 if re.search("https?://", request.headers.get("Origin", "")) else 400)
    if method == "POST" and (call := _CALL.fullmatch(path)):
        context.route = f"/v1/models/<model>:{call['method']}"
        return _predict(call) if call["method"] == "predict" else _classify_or_regress(call)
    if method == "GET" and (status := _STATUS.fullmatch(path)):
        context.route = f"/v1/models/<model>{status['metadata'] or ''}"
        return _metadata(status) if status["metadata"] == METADATA else _status(status)
    raise InvalidRequest(f"Malformed request: {method} {path}")


def _request_target() -> str:
    """Return the request target as sent: path and query."""
    environ = request.environ
    sent = environ.get("REQUEST_URI") or environ.get("RAW_URI")  # depends on the WSGI server; may be neither
    if sent is None:
        query = environ["QUERY_STRING"]
        sent = quote(environ["PATH_INFO"], encoding="latin-1") + (f"?{query}" if query else "")
    target: str = sent.removeprefix(environ["SCRIPT_NAME"]).encode("latin-1").decode("utf-8", "replace")
    if _BAD_ESCAPE.search(target):
        raise InvalidRequest(f"Malformed request: {request.method} {target} holds a % without two hexadecimal digits")
    return target


@blueprint.errorhandler(ServingError)
def _error_response(error: ServingError) -> Response:
    return error_response(error.tensorflow_serving or error)


def _predict(call: re.Match[str]) -> Response:
    current_app.inference.name_model(_model_name(call))  # an error in the body counts as one of its requests
    number = _version(call)
    body = _read_body()
    version, problem, parsed = None, None, None
    try:
        version = _resolve(call, number)
    except ServingError as error:
        problem = error  # raised later: an error in the body takes precedence
    signatures = version.predictor.signatures if version else None
    if signatures is not None and len(body) <= LARGE_JSON_BYTES:
        parsed = run_sized(len(body), parse_pixels, body, signatures)
    if parsed is None:
        parsed = current_app.json_process.parse(parse_predict, body, signatures, current_app.inference.max_rows)
    if problem:
        raise problem
    assert version is not None
    assert parsed is not None
    result = current_app.inference.predict(version, parsed)
    size = sum(array.size for array in result.outputs.values()) * JSON_ELEMENT_BYTES
    return encoded_response(run_sized(size, encode_outputs, result.outputs, result.signature, as_rows=parsed.as_rows))


def _classify_or_regress(call: re.Match[str]) -> Response:
    number = _version(call)
    name = current_app.json_process.parse(parse_examples, _read_body())
    raise refusal(name, _resolve(call, number).predictor.signatures, method=call["method"])


def _resolve(match: re.Match[str], number: int | None) -> ModelVersion:
    label = None if match["label"] is None else unquote(match["label"])
    return current_app.inference.resolve(_model_name(match), version=number, label=label)


def _status(match: re.Match[str]) -> Response:
    number = _version(match)
    versions = current_app.inference.status(_model_name(match), number)
    return json_response(_to_json(lambda messages: messages.make_status(versions)))


def _metadata(match: re.Match[str]) -> Response:
    version = _resolve(match, _version(match))
    document = {
        "model_spec": {"name": version.name, "signature_name": "", "version": str(version.version)},
        "metadata": {"signature_def": _to_json(lambda messages: messages.make_signature_defs(version))},
    }
    return json_response(document)


def _to_json(make: Callable[[ModuleType], Any]) -> dict[str, Any]:
    """Return the message that a function makes with `serving.tfs_messages`, as JSON."""

    def convert() -> dict[str, Any]:
        from google.protobuf.json_format import MessageToDict

        from serving import tfs_messages

        message = make(tfs_messages)
        return dict(MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True))

    return offload(convert)  # the import of TensorFlow may take seconds


def _read_body() -> bytes:
    """Return the body, decompressed if it is gzip. Invalid gzip counts as empty, like in TensorFlow Serving."""
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
    return None if match["version"] is None else read_version_number(match["version"])
