"""Requests of TensorFlow Serving's REST API: predict, and classify and regress, which are only validated.

Classify and regress are for signatures that take `tf.Example` messages, as the retired Estimators exported them.
TensorFlow Serving refuses any other signature with the messages here (`servables/tensorflow/classifier.cc` and
`regressor.cc`).
"""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import numpy as np
import simdjson

from serving.api.tensorflow_serving.json_document import document_error, parse_document, replace_surrogates, type_name
from serving.api.tensorflow_serving.json_tensor import decode_inputs
from serving.errors import InvalidRequest, ModelFailed, ServingError
from serving.inference.service import InferenceRequest
from serving.inference.signatures import DEFAULT_SIGNATURE, Signature, TensorSpec, check_rows

_HEAD = re.compile(rb'[ \t\r\n]*\{[ \t\r\n]*"(instances|inputs)"[ \t\r\n]*:[ \t\r\n]*(?=\[)')
_TAIL = re.compile(rb"[ \t\r\n]*\}[ \t\r\n]*")
_DIGITS_AND_SPACE = b"0123456789 \t\r\n"
_MAX_ROWS = 64  # `_nesting` caches the text for each number of rows


class _Local(threading.local):
    """One parser per thread; a parser reuses its buffers."""

    def __init__(self) -> None:
        self.parser = simdjson.Parser()


_local = _Local()


@dataclass(eq=False)
class PredictRequest(InferenceRequest):
    """A predict request. `as_rows`: it has `instances`, so the response has `predictions`."""

    as_rows: bool


def parse_pixels(body: bytes, signatures: Mapping[str, Signature]) -> PredictRequest | None:
    """Parse a request that holds only pixels for an image model (fast path); None for any other request.

    Strip digits and whitespace. If the remaining brackets and commas are those of a tensor of the expected shape, parse
    the numbers with simdjson. Any other request (ragged lists, signs, fractions, other keys) is for `parse_predict`,
    which has the error messages.
    """
    spec = find_pixel_input(signatures.get(DEFAULT_SIGNATURE))
    if spec is None or (pixels := read_pixels(body, spec)) is None:
        return None
    return PredictRequest(DEFAULT_SIGNATURE, {spec.name: pixels[0]}, as_rows=pixels[1])


def find_pixel_input(signature: Signature | None) -> TensorSpec | None:
    """Return the only input of the default signature if it is a batch of uint8 tensors of known shape, else None."""
    if signature is None or signature.name != DEFAULT_SIGNATURE or len(signature.inputs) != 1:
        return None
    (spec,) = signature.inputs.values()
    known = spec.is_batched and spec.shape is not None and None not in spec.shape[1:] and 0 not in spec.shape
    return spec if known and spec.dtype == "DT_UINT8" else None


def read_pixels(body: bytes, spec: TensorSpec) -> tuple[np.ndarray, bool] | None:
    """Parse a request that holds only pixels of the expected shape, for an input from `find_pixel_input`.

    Returns:
        The uint8 array, and whether its key was `instances`; None for any other request, valid or not.
    """
    head = _HEAD.match(body)
    end = body.rfind(b"]") + 1
    if not head or not _TAIL.fullmatch(body, end):
        return None
    tensor = body[head.end() : end]
    assert spec.shape is not None
    shape = tuple(size or 0 for size in spec.shape[1:])
    nesting = tensor.translate(None, _DIGITS_AND_SPACE)
    rows, rest = divmod(len(nesting) - 1, len(_nesting(shape)) + 1)
    if rest or not 0 < rows <= _MAX_ROWS or nesting != _nesting((rows, *shape)):
        return None
    try:
        array = cast(simdjson.Array, _local.parser.parse(tensor))
        numbers = np.frombuffer(array.as_buffer(of_type="u"), np.uint64)
    except ValueError:  # "1 2", "007", 2**64
        return None
    if len(numbers) != rows * math.prod(shape) or np.maximum.reduce(numbers) > 255:
        return None
    return numbers.astype(np.uint8).reshape(rows, *shape), head[1] == b"instances"


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
        raise document_error(document, "When method is classify, key 'examples' is expected and was not found")
    examples = document["examples"]
    if not isinstance(examples, list):
        raise document_error(document, "Expecting 'examples' value to be an list/array")
    if not examples:
        raise document_error(document, "'examples' value is an empty array")
    for example in examples:
        _check_example(example)
    name: str = document.get("signature_name", "")
    return name


def refusal(name: str, signatures: Mapping[str, Signature], *, method: str) -> ServingError:
    """Return the error that explains why the named or default signature cannot "classify" or "regress"."""
    signature = signatures.get(name or DEFAULT_SIGNATURE)
    if signature is None:
        return InvalidRequest(f"No signature was found with the name: {replace_surrogates(name) or DEFAULT_SIGNATURE}")
    kind = {"classify": "classification", "regress": "regression"}[method]
    inputs = "\n".join(f"  {name}: {spec}" for name, spec in signature.inputs.items())
    described = f"inputs {{\n{inputs}\n}}"
    outputs = signature.outputs.keys()
    if len(signature.inputs) != 1:
        return InvalidRequest("Expected one input Tensor.")
    if method == "classify" and len(outputs) not in (1, 2):
        return InvalidRequest(f"Expected one or two output Tensors, found {len(outputs)}")
    if method == "regress" and len(outputs) != 1:
        return InvalidRequest("Expected one output Tensor.")
    if "inputs" not in signature.inputs:
        return InvalidRequest(f"No {kind} inputs found in SignatureDef: {described}")
    if method == "classify" and not outputs & {"classes", "scores"}:
        return InvalidRequest(
            'Expected classification signature outputs to contain at least one of "classes" or "scores". '
            f"Signature was: {described}"
        )
    if method == "regress" and "outputs" not in outputs:
        return InvalidRequest(f"No {kind} outputs found in SignatureDef: {described}")
    return ModelFailed(f"{method} is not implemented; request this signature with :predict", code="UNIMPLEMENTED")


@lru_cache(maxsize=256)
def _nesting(shape: tuple[int, ...]) -> bytes:
    """Return the brackets and commas of a tensor in JSON: `[[,],[,]]` for (2, 2)."""
    inner = _nesting(shape[1:]) if len(shape) > 1 else b""
    return b"[%b]" % b",".join([inner] * shape[0])


def _parse_object(body: bytes) -> dict[str, Any]:
    document = parse_document(body)
    if not isinstance(document, dict):
        raise document_error(document, "Is not object")
    if not isinstance(document.get("signature_name", ""), str):
        raise document_error(document, "not formatted correctly. 'signature_name' key must be a string value.")
    return document


def _find_signature(document: Mapping[str, Any], signatures: Mapping[str, Signature]) -> Signature:
    name = document.get("signature_name") or DEFAULT_SIGNATURE
    signature = signatures.get(name)
    if signature is None:
        raise InvalidRequest(f'Serving signature name: "{replace_surrogates(name)}" not found in signature def')
    if not signature.inputs:
        raise InvalidRequest(f"Failed to get input map for signature: {document.get('signature_name') or 'DEFAULT'}")
    if "instances" in document and "inputs" in document:
        why = "Not formatted correctly expecting only one of 'inputs' or 'instances' keys to exist "
        raise document_error(document, why)
    if "instances" not in document and "inputs" not in document:
        raise InvalidRequest("Missing 'inputs' or 'instances' key")
    return signature


def _check_example(example: Any) -> None:
    if not isinstance(example, dict):
        raise InvalidRequest(f"Example must be JSON object but got JSON {type_name(example)}")
