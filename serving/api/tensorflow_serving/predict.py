"""Predict requests of TensorFlow Serving's REST API: parses the JSON to an InferenceRequest, renders the outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from serving.api.tensorflow_serving.json_document import parse_document
from serving.api.tensorflow_serving.json_pixels import find_pixel_input, read_pixels
from serving.api.tensorflow_serving.json_quoting import quote_document, replace_surrogates
from serving.api.tensorflow_serving.json_response import encode_outputs
from serving.api.tensorflow_serving.json_tensor import decode_inputs
from serving.errors import InvalidRequest
from serving.inference.service import InferenceRequest, InferenceResult
from serving.inference.signatures import DEFAULT_SIGNATURE, Signature, check_rows


@dataclass(eq=False)
class PredictRequest(InferenceRequest):
    """A predict request. `as_rows`: it has `instances`, so the response has `predictions`."""

    as_rows: bool


def parse_pixels(body: bytes, signatures: Mapping[str, Signature]) -> PredictRequest | None:
    """Parse a request that holds only pixels for an image model (fast path); None for any other request."""
    spec = find_pixel_input(signatures.get(DEFAULT_SIGNATURE))
    pixels = None if spec is None else read_pixels(body, spec)
    if spec is None or pixels is None:
        return None
    images, as_rows = pixels
    return PredictRequest(DEFAULT_SIGNATURE, {spec.name: images}, as_rows)


def parse(body: bytes, signatures: Mapping[str, Signature] | None, max_rows: int) -> PredictRequest | None:
    """Parse a predict request.

    Args:
        body: the JSON document.
        signatures: the model's signatures; None if the model is not available, to validate only the document.
        max_rows: limit on the rows of a request.

    Raises:
        InvalidRequest: the body is not JSON, or does not fit the signature.
        TooLarge: the request has more than `max_rows` rows.
    """
    document = parse_object(body)
    if signatures is None:
        return None
    signature = _find_signature(document, signatures)
    if isinstance(document.get("instances"), list):
        check_rows(len(document["instances"]), max_rows)
    return PredictRequest(signature.name, decode_inputs(document, signature), as_rows="instances" in document)


def render(result: InferenceResult, *, as_rows: bool) -> bytes:
    """Encode the response.

    Raises:
        InvalidRequest: an output cannot be encoded as JSON.
    """
    return encode_outputs(result.outputs, result.signature, as_rows=as_rows)


def parse_object(body: bytes) -> dict[str, Any]:
    """Parse a request to a JSON object, and check that `signature_name` is a string.

    Raises:
        InvalidRequest: the body is not JSON or not an object, or the name is not a string.
    """
    document = parse_document(body)
    if not isinstance(document, dict):
        raise InvalidRequest(f"JSON Value: {quote_document(document)} Is not object")
    if not isinstance(document.get("signature_name", ""), str):
        raise InvalidRequest(
            f"JSON Value: {quote_document(document)} not formatted correctly. "
            "'signature_name' key must be a string value."
        )
    return document


def _find_signature(document: Mapping[str, Any], signatures: Mapping[str, Signature]) -> Signature:
    name = document.get("signature_name") or DEFAULT_SIGNATURE
    signature = signatures.get(name)
    if signature is None:
        raise InvalidRequest(f'Serving signature name: "{replace_surrogates(name)}" not found in signature def')
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
