"""Requests of TensorFlow Serving's REST API: predict, and classify and regress, which are only validated.

Classify and regress are for signatures that take `tf.Example` messages, as the retired Estimators exported them.
TensorFlow Serving refuses any other signature with the messages here (`servables/tensorflow/classifier.cc` and
`regressor.cc`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from serving.api.tensorflow_serving.json_document import parse_document
from serving.api.tensorflow_serving.json_pixels import find_pixel_input, read_pixels
from serving.api.tensorflow_serving.json_quoting import quote_document, replace_surrogates, type_name
from serving.api.tensorflow_serving.json_tensor import decode_inputs
from serving.errors import InvalidRequest, ModelFailed, ServingError
from serving.inference.service import InferenceRequest
from serving.inference.signatures import DEFAULT_SIGNATURE, Signature, check_rows

_INPUT = "inputs"
_CLASSIFY_OUTPUTS = ("classes", "scores")
_REGRESS_OUTPUT = "outputs"


@dataclass(eq=False)
class PredictRequest(InferenceRequest):
    """A predict request. `as_rows`: it has `instances`, so the response has `predictions`."""

    as_rows: bool


def parse_pixels(body: bytes, signatures: Mapping[str, Signature]) -> PredictRequest | None:
    """Parse a request that holds only pixels for an image model (fast path); None for any other request."""
    spec = find_pixel_input(signatures.get(DEFAULT_SIGNATURE))
    if spec is None or (pixels := read_pixels(body, spec)) is None:
        return None
    return PredictRequest(DEFAULT_SIGNATURE, {spec.name: pixels[0]}, as_rows=pixels[1])


def parse_predict(body: bytes, signatures: Mapping[str, Signature] | None, max_rows: int) -> PredictRequest | None:
    """Parse a predict request; without signatures, if the model is not available, validate only the document.

    Raises:
        InvalidRequest: the body is not JSON, or does not fit the signature.
        TooLarge: the request has more than `max_rows` rows.
    """
    document = _parse_object(body)
    if signatures is None:
        return None
    signature = _find_signature(document, signatures)
    if isinstance(document.get("instances"), list):
        check_rows(len(document["instances"]), max_rows)
    return PredictRequest(signature.name, decode_inputs(document, signature), as_rows="instances" in document)


def parse_examples(body: bytes) -> str:
    """Validate a classify or regress request; returns its signature's name, or "".

    Raises:
        InvalidRequest: the body is not JSON, or its `examples` are not a list of objects.
    """
    document = _parse_object(body)
    if "context" in document:
        _check_example(document["context"])
    if "examples" not in document:
        raise InvalidRequest(
            f"JSON Value: {quote_document(document)} When method is classify, key 'examples' is expected and was not "
            "found"
        )
    examples = document["examples"]
    if not isinstance(examples, list):
        raise InvalidRequest(f"JSON Value: {quote_document(document)} Expecting 'examples' value to be an list/array")
    if not examples:
        raise InvalidRequest(f"JSON Value: {quote_document(document)} 'examples' value is an empty array")
    for example in examples:
        _check_example(example)
    name: str = document.get("signature_name", "")
    return name


def refusal(name: str, signatures: Mapping[str, Signature], *, method: str) -> ServingError:
    """Return the error that explains why a signature cannot run this method.

    Args:
        name: the signature's name; empty for the default signature.
        signatures: the model's signatures.
        method: "classify" or "regress".
    """
    signature = signatures.get(name or DEFAULT_SIGNATURE)
    if signature is None:
        return InvalidRequest(f"No signature was found with the name: {replace_surrogates(name) or DEFAULT_SIGNATURE}")
    kind = {"classify": "classification", "regress": "regression"}[method]
    described = f"SignatureDef: inputs {{\n{_describe(signature)}\n}}"
    outputs = signature.outputs.keys()
    if len(signature.inputs) != 1:
        return InvalidRequest("Expected one input Tensor.")
    if method == "classify" and len(outputs) not in (1, 2):
        return InvalidRequest(f"Expected one or two output Tensors, found {len(outputs)}")
    if method == "regress" and len(outputs) != 1:
        return InvalidRequest("Expected one output Tensor.")
    if _INPUT not in signature.inputs:
        return InvalidRequest(f"No {kind} inputs found in {described}")
    if method == "classify" and not outputs & set(_CLASSIFY_OUTPUTS):
        return InvalidRequest(
            'Expected classification signature outputs to contain at least one of "classes" or "scores". '
            f"Signature was: {described.removeprefix('SignatureDef: ')}"
        )
    if method == "regress" and _REGRESS_OUTPUT not in outputs:
        return InvalidRequest(f"No {kind} outputs found in {described}")
    return ModelFailed(f"{method} is not implemented; request this signature with :predict", code="UNIMPLEMENTED")


def _parse_object(body: bytes) -> dict[str, Any]:
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


def _check_example(example: Any) -> None:
    if not isinstance(example, dict):
        raise InvalidRequest(f"Example must be JSON object but got JSON {type_name(example)}")


def _describe(signature: Signature) -> str:
    return "\n".join(f"  {name}: {spec}" for name, spec in signature.inputs.items())
