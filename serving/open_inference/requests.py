"""Reads inference requests of both forms of the Open Inference Protocol.

Each form makes the same document of a request, the protocol's JSON object: `id`, `parameters`, `inputs`, `outputs`.
Only the data of an input are read by the form itself.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from serving.errors import InvalidRequest
from serving.inference.service import InferenceRequest
from serving.inference.signatures import DEFAULT_SIGNATURE, Signature, TensorSpec
from serving.open_inference.tensors import MAX_DIMENSIONS, datatype_of, refusal
from serving.quoting import quote

# Values of MLServer's parameter `content_type`. All but base64 say how the client holds a tensor: nothing to do here.
BASE64 = "base64"
UNCHANGED_TYPES = ("np", "str")

# Triton's parameters that change what a request means, and are not supported.
UNSUPPORTED = ("priority", "sequence_id", "sequence_start", "sequence_end")

# Returns the array of an input, from its object in the document, its parameters, its spec and its shape.
ReadData = Callable[[Mapping[str, Any], Mapping[str, Any], TensorSpec, tuple[int, ...]], np.ndarray]


@dataclass(frozen=True)
class RequestedOutput:
    """How an output is sent."""

    is_binary: bool
    class_count: int = 0  # classification: instead of the numbers, this many of the largest of each row, with labels


@dataclass(eq=False)
class InferRequest(InferenceRequest):
    """An inference request of this protocol."""

    identifier: str | None  # the request's `id`, repeated in the response
    outputs: Mapping[str, RequestedOutput]  # in the order of the response
    timeout_s: float | None = None  # from the request's arrival


def read_request(
    document: Mapping[str, Any],
    model: str,
    signatures: Mapping[str, Signature],
    read_data: ReadData,
    *,
    binary_by_default: bool,
    numbers: str,
) -> InferRequest:
    """Read the document of a request.

    Args:
        document: the request.
        model: its name, for error messages.
        signatures: of the model.
        read_data: reads the data of an input.
        binary_by_default: whether outputs are sent as binary data unless a parameter says otherwise.
        numbers: what outputs are otherwise sent as, for error messages: "JSON".

    Raises:
        InvalidRequest: the request is malformed, or does not fit the signature.
    """
    parameters = read_parameters(document, of="the request")
    signature = find_signature(model, signatures, _choose_signature(document, parameters, signatures))
    identifier = document.get("id")
    if identifier is not None and not isinstance(identifier, str):
        raise InvalidRequest(f"id must be a string, not {quote(identifier)}")
    for name in UNSUPPORTED:
        if parameters.get(name):
            raise InvalidRequest(
                f"the parameter {name} is not supported, so it cannot be {quote(parameters[name])}; leave it out"
            )
    _check_content_type(parameters, of="the request")
    binary_by_default = _read_flag(parameters, "binary_data_output", default=binary_by_default)
    outputs = _read_outputs(document, signature, binary_by_default=binary_by_default, numbers=numbers)
    timeout_s = _read_timeout(parameters)
    return InferRequest(signature.name, _read_inputs(document, signature, read_data), identifier, outputs, timeout_s)


def find_signature(model: str, signatures: Mapping[str, Signature], name: str) -> Signature:
    """Return the signature with a name; raises InvalidRequest if the model has none."""
    signature = signatures.get(name)
    if signature is None:
        names = ", ".join(name for name, other in signatures.items() if other.inputs)
        raise InvalidRequest(f"model {model} has no signature {quote(name)}; it has {names}")
    return signature


def read_parameters(owner: Mapping[str, Any], *, of: str) -> dict[str, Any]:
    """Return the parameters of a request, an input or an output; raises InvalidRequest."""
    parameters = owner.get("parameters")
    if parameters is None:
        return {}
    if not isinstance(parameters, dict):
        raise InvalidRequest(f"the parameters of {of} must be an object, not {quote(parameters)}")
    if "shared_memory_region" in parameters:
        raise InvalidRequest(f"{of}: shared memory is not supported; send and request the data itself")
    return parameters


def _choose_signature(
    document: Mapping[str, Any], parameters: Mapping[str, Any], signatures: Mapping[str, Signature]
) -> str:
    """Return the parameter `signature_name`.

    Without the parameter, which most clients cannot send, it is the signature that has exactly the request's inputs. Of
    several it is `serving_default`, or the one with the name of the input (`image_bytes`); of none, `serving_default`.
    """
    name = parameters.get("signature_name")
    if name is not None:
        if not isinstance(name, str):
            raise InvalidRequest(f"the parameter signature_name must be a string, not {quote(name)}")
        return name
    inputs = document.get("inputs")
    sent = inputs if isinstance(inputs, list) else ()
    names = sorted(str(tensor.get("name")) for tensor in sent if isinstance(tensor, dict))
    found = [name for name, signature in signatures.items() if names and sorted(signature.inputs) == names]
    if not found:
        return DEFAULT_SIGNATURE
    for preferred in (DEFAULT_SIGNATURE, *names):
        if preferred in found:
            return preferred
    if len(found) > 1:
        raise InvalidRequest(
            f"several signatures have the input {', '.join(names)}: {', '.join(found)}; choose one with the parameter "
            "signature_name"
        )
    return found[0]


def _read_timeout(parameters: Mapping[str, Any]) -> float | None:
    """Return the parameter `timeout`, which is in microseconds, in seconds; None without it, and for Triton's 0."""
    timeout = parameters.get("timeout")
    if timeout is None:
        return None
    if type(timeout) is not int or timeout < 0:
        raise InvalidRequest(f"the parameter timeout must be a number of microseconds, not {quote(timeout)}")
    return timeout / 1e6 or None


def _read_inputs(document: Mapping[str, Any], signature: Signature, read_data: ReadData) -> dict[str, np.ndarray]:
    """Return an array for each input sent; those of binary tensors are views of the body."""
    arrays: dict[str, np.ndarray] = {}
    for name, tensor in _by_name(document.get("inputs"), signature, kind="input").items():
        spec = signature.inputs[name]
        datatype, sent = datatype_of(spec).name, tensor.get("datatype")
        if sent != datatype:
            raise InvalidRequest(f"input {name}: the datatype is {datatype}, not {quote(sent)}")
        shape = _read_shape(tensor, spec)
        parameters = read_parameters(tensor, of=f"input {name}")
        array = read_data(tensor, parameters, spec, shape)
        if datatype == "BYTES":
            array = _read_strings(array, parameters, spec)
        elif parameters:
            _check_content_type(parameters, of=f"input {name}")
        arrays[name] = array
    return arrays


def _read_strings(array: np.ndarray, parameters: Mapping[str, Any], spec: TensorSpec) -> np.ndarray:
    """Decode base64 if the content type says so, and turn MLServer's column of strings into the row a model takes."""
    if array.ndim == 2 and array.shape[1] == 1 and spec.shape is not None and len(spec.shape) == 1:
        array = array.reshape(-1)
    if parameters.get("content_type") != BASE64:
        _check_content_type(parameters, of=f"input {spec.name}", others=(BASE64,))
        return array
    decoded = np.empty(array.size, object)
    for index, element in enumerate(array.ravel()):
        try:
            decoded[index] = base64.b64decode(element, validate=True)
        except binascii.Error as error:
            raise refusal(spec, f"element {index} is not {BASE64}, as its content_type says: {error}") from error
    return decoded.reshape(array.shape)


def _check_content_type(parameters: Mapping[str, Any], *, of: str, others: tuple[str, ...] = ()) -> None:
    """Raise InvalidRequest for a content type that would change the data; `others` are known, and handled elsewhere."""
    content_type = parameters.get("content_type")
    if content_type is not None and content_type not in UNCHANGED_TYPES:
        known = ", ".join((*others, *UNCHANGED_TYPES))
        raise InvalidRequest(f"{of}: the content_type {quote(content_type)} is not supported; it may be {known}")


def _read_outputs(
    document: Mapping[str, Any], signature: Signature, *, binary_by_default: bool, numbers: str
) -> dict[str, RequestedOutput]:
    """Return the requested outputs, in their order."""
    outputs: dict[str, RequestedOutput] = {}
    for name, output in _by_name(document.get("outputs") or [], signature, kind="output").items():
        parameters = read_parameters(output, of=f"output {name}")
        _check_content_type(parameters, of=f"output {name}")
        is_binary = _read_flag(parameters, "binary_data", default=binary_by_default)
        outputs[name] = RequestedOutput(is_binary, _read_class_count(parameters, signature.outputs[name]))
    outputs = outputs or dict.fromkeys(signature.outputs, RequestedOutput(binary_by_default))
    for name, requested in outputs.items():
        datatype = datatype_of(signature.outputs[name])
        if not requested.is_binary and not datatype.json_types and not requested.class_count:
            raise InvalidRequest(
                f"output {name}: {datatype.name} cannot be sent as {numbers}; request it as binary data"
            )
    return outputs


def _read_class_count(parameters: Mapping[str, Any], spec: TensorSpec) -> int:
    """Return the parameter `classification`; 0 without it."""
    count = parameters.get("classification") or 0
    if type(count) is not int or count < 0:
        raise InvalidRequest(
            f"output {spec.name}: classification must be a number of classes, not {quote(parameters['classification'])}"
        )
    if count and (datatype := datatype_of(spec)).name in ("BYTES", "BOOL"):
        raise InvalidRequest(f"output {spec.name}: classification needs numbers, not {datatype.name}")
    return count


def _by_name(sent: Any, signature: Signature, *, kind: str) -> dict[str, dict[str, Any]]:
    if not isinstance(sent, list) or not all(isinstance(tensor, dict) for tensor in sent):
        raise InvalidRequest(f"{kind}s must be a list of objects, not {quote(sent)}")
    specs = signature.inputs if kind == "input" else signature.outputs
    by_name: dict[str, dict[str, Any]] = {}
    for tensor in sent:
        name = tensor.get("name")
        if not isinstance(name, str) or name not in specs:
            raise InvalidRequest(f'signature "{signature.name}" has no {kind} {quote(name)}; it has {", ".join(specs)}')
        if name in by_name:
            raise InvalidRequest(f"{kind} {name} is repeated")
        by_name[name] = tensor
    return by_name


def _read_flag(parameters: Mapping[str, Any], name: str, *, default: bool) -> bool:
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise InvalidRequest(f"the parameter {name} must be true or false, not {quote(value)}")
    return value


def _read_shape(tensor: Mapping[str, Any], spec: TensorSpec) -> tuple[int, ...]:
    shape = tensor.get("shape")
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS:
        raise InvalidRequest(
            f"input {spec.name}: the shape must be a list of at most {MAX_DIMENSIONS} sizes, not {quote(shape)}"
        )
    for size in shape:
        if type(size) is not int or size < 0:
            raise InvalidRequest(f"input {spec.name}: a size in the shape must be a whole number, not {quote(size)}")
    return tuple(shape)
