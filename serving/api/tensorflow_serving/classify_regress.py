"""Classify and regress: not implemented, but requests are validated like in TensorFlow Serving.

Both methods are for signatures that take `tf.Example` messages, as the retired Estimators exported them. TensorFlow
Serving refuses any other signature with these messages (`servables/tensorflow/classifier.cc` and `regressor.cc`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from serving.api.tensorflow_serving.json_quoting import quote_document, replace_surrogates, type_name
from serving.api.tensorflow_serving.predict import parse_object
from serving.errors import InvalidRequest, ModelFailed, ServingError
from serving.inference.signatures import DEFAULT_SIGNATURE, Signature

_INPUT = "inputs"
_CLASSIFY_OUTPUTS = ("classes", "scores")
_REGRESS_OUTPUT = "outputs"


def parse(body: bytes) -> str:
    """Validate a classify or regress request; returns its signature's name, or "".

    Raises:
        InvalidRequest: the body is not JSON, or its `examples` are invalid.
    """
    document = parse_object(body)
    check_examples(document)
    name: str = document.get("signature_name", "")
    return name


def check_examples(document: Mapping[str, Any]) -> None:
    """Validate the document of a classify or regress request.

    Raises:
        InvalidRequest: `examples` is not a list of objects.
    """
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


def _check_example(example: Any) -> None:
    if not isinstance(example, dict):
        raise InvalidRequest(f"Example must be JSON object but got JSON {type_name(example)}")


def _describe(signature: Signature) -> str:
    return "\n".join(f"  {name}: {spec}" for name, spec in signature.inputs.items())
