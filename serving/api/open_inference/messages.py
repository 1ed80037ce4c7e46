"""Requests and responses of the Open Inference Protocol: JSON, followed by the data of binary tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson

from serving.api.compression import DEFLATE, GZIP, inflate
from serving.api.json_arrays import insert_arrays, set_aside
from serving.api.open_inference import tensors
from serving.errors import InvalidRequest, UnsupportedMedia
from serving.inference.service import InferenceRequest, InferenceResult
from serving.inference.signatures import DEFAULT_SIGNATURE, Signature, TensorSpec
from serving.quoting import quote

HEADER_LENGTH = "Inference-Header-Content-Length"
_WBITS = {"gzip": GZIP, "deflate": DEFLATE}
_MAX_DIGITS = 19  # no length has more, and `int` of millions of digits is slow


@dataclass(eq=False)
class InferRequest(InferenceRequest):
    """An inference request of this protocol."""

    identifier: str | None  # the request's `id`, repeated in the response
    outputs: Mapping[str, bool]  # the requested outputs, in this order, and whether each is sent as binary data


def decompress(body: bytes, encoding: str, header_length: str | None) -> tuple[bytes, int]:
    """Decompress a body by the values of Content-Encoding, which may be empty, and Inference-Header-Content-Length.

    Returns:
        The decompressed body, and the length of the JSON at its beginning.

    Raises:
        UnsupportedMedia: the encoding is neither gzip nor deflate.
        InvalidRequest: the body does not have this encoding, or the header is not a length within it.
        TooLarge: the decompressed body exceeds the limit.
    """
    length = None
    if header_length is not None:
        if not (header_length.isascii() and header_length.isdigit() and len(header_length) <= _MAX_DIGITS):
            raise InvalidRequest(f"{HEADER_LENGTH} must be a number of bytes, not {quote(header_length)}")
        length = int(header_length)
    encoding = encoding.strip().lower()
    if encoding in _WBITS:
        try:
            body = inflate(body, wbits=_WBITS[encoding], json_bytes=length)
        except ValueError as error:
            raise InvalidRequest(f"the body cannot be decompressed as {encoding}: {error}") from error
    elif encoding not in ("", "identity"):
        raise UnsupportedMedia(f"the Content-Encoding {quote(encoding)} is not supported; send gzip, deflate or none")
    if length is not None and length > len(body):
        raise InvalidRequest(f"{HEADER_LENGTH} is {length}, but the body has {len(body)} bytes")
    return body, len(body) if length is None else length


def parse(body: bytes, json_bytes: int, model: str, signatures: Mapping[str, Signature]) -> InferRequest:
    """Parse an inference request: `json_bytes` of JSON, then binary data. `model` is for error messages.

    Raises:
        InvalidRequest: the request is malformed, or does not fit the signature. Data may neither be missing nor left
            over.
    """
    view = memoryview(body)
    try:
        document = orjson.loads(view[:json_bytes])
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"the first {json_bytes} bytes of the body are not valid JSON: {error}") from error
    if not isinstance(document, dict):
        raise InvalidRequest(f"expected a JSON object with inputs, got {quote(document)}")
    signature = find_signature(model, signatures, _signature_name(document, signatures))
    identifier = document.get("id")
    if identifier is not None and not isinstance(identifier, str):
        raise InvalidRequest(f"id must be a string, not {quote(identifier)}")
    outputs = _read_outputs(document, signature)
    return InferRequest(signature.name, _read_inputs(document, view[json_bytes:], signature), identifier, outputs)


def find_signature(model: str, signatures: Mapping[str, Signature], name: str) -> Signature:
    """Return the signature with a name; raises InvalidRequest if the model has none."""
    signature = signatures.get(name)
    if signature is None:
        names = ", ".join(name for name, other in signatures.items() if other.inputs)
        raise InvalidRequest(f"model {model} has no signature {quote(name)}; it has {names}")
    return signature


def render(request: InferRequest, result: InferenceResult) -> tuple[bytes, int | None]:
    """Encode the response; returns it, and the length of the JSON at its beginning, or None if all of it is JSON."""
    outputs, chunks = [], []
    large: list[np.ndarray] = []
    for name, is_binary in request.outputs.items():
        array, spec = result.outputs[name], result.signature.outputs[name]
        output: dict[str, Any] = {"name": name, "datatype": tensors.datatype_of(spec).name, "shape": array.shape}
        if is_binary:
            chunk, size = tensors.encode_binary(array, spec)
            chunks.append(chunk)
            output["parameters"] = {"binary_data_size": size}
        else:
            output["data"] = set_aside(tensors.encode_json(array, spec), large)
        outputs.append(output)
    response: dict[str, Any] = {"model_name": result.version.name, "model_version": str(result.version.version)}
    if request.identifier is not None:
        response["id"] = request.identifier
    text = insert_arrays(orjson.dumps({**response, "outputs": outputs}, option=orjson.OPT_SERIALIZE_NUMPY), large)
    return (b"".join((text, *chunks)), len(text)) if chunks else (text, None)


def _signature_name(document: Mapping[str, Any], signatures: Mapping[str, Signature]) -> str:
    """Return the parameter `signature_name`.

    Without the parameter, which most clients cannot send, it is the signature that has exactly the request's inputs. Of
    several it is `serving_default`, or the one with the name of the input (`image_bytes`); of none, `serving_default`.
    """
    name = _parameters(document, of="the request").get("signature_name")
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


def _read_inputs(document: Mapping[str, Any], binary: memoryview, signature: Signature) -> dict[str, np.ndarray]:
    """Return an array for each input sent; those of binary tensors are views of the body."""
    arrays: dict[str, np.ndarray] = {}
    for name, tensor in _by_name(document.get("inputs"), signature, kind="input").items():
        spec = signature.inputs[name]
        datatype, sent = tensors.datatype_of(spec).name, tensor.get("datatype")
        if sent != datatype:
            raise InvalidRequest(f"input {name}: the datatype is {datatype}, not {quote(sent)}")
        shape = _shape(tensor, spec)
        size = _parameters(tensor, of=f"input {name}").get("binary_data_size")
        if (size is None) == ("data" not in tensor):
            raise InvalidRequest(f"input {name} needs either data or the parameter binary_data_size, but not both")
        if size is None:
            arrays[name] = tensors.decode_json(tensor["data"], spec, shape)
            continue
        if type(size) is not int or not 0 <= size <= len(binary):
            raise InvalidRequest(
                f"input {name}: binary_data_size is {quote(size)}, but {len(binary)} bytes are left after the JSON, "
                f"whose length is {HEADER_LENGTH}"
            )
        arrays[name] = tensors.decode_binary(binary[:size], spec, shape)
        binary = binary[size:]
    if binary:
        raise InvalidRequest(f"{len(binary)} bytes after the JSON belong to no input")
    return arrays


def _read_outputs(document: Mapping[str, Any], signature: Signature) -> dict[str, bool]:
    """Return the names of the requested outputs, in their order, and whether each is sent as binary data."""
    binary_by_default = _flag(_parameters(document, of="the request"), "binary_data_output", default=False)
    outputs: dict[str, bool] = {}
    for name, output in _by_name(document.get("outputs") or [], signature, kind="output").items():
        parameters = _parameters(output, of=f"output {name}")
        if parameters.get("classification"):
            raise InvalidRequest(f"output {name}: the parameter classification is not supported")
        outputs[name] = _flag(parameters, "binary_data", default=binary_by_default)
    outputs = outputs or dict.fromkeys(signature.outputs, binary_by_default)
    for name, is_binary in outputs.items():
        datatype = tensors.datatype_of(signature.outputs[name])
        if not is_binary and not datatype.json_types:
            raise InvalidRequest(f"output {name}: {datatype.name} cannot be sent as JSON; request it as binary data")
    return outputs


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


def _parameters(owner: Mapping[str, Any], *, of: str) -> dict[str, Any]:
    parameters = owner.get("parameters")
    if parameters is None:
        return {}
    if not isinstance(parameters, dict):
        raise InvalidRequest(f"the parameters of {of} must be an object, not {quote(parameters)}")
    if "shared_memory_region" in parameters:
        raise InvalidRequest(f"{of}: shared memory is not supported; send and request the data itself")
    return parameters


def _flag(parameters: Mapping[str, Any], name: str, *, default: bool) -> bool:
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise InvalidRequest(f"the parameter {name} must be true or false, not {quote(value)}")
    return value


def _shape(tensor: Mapping[str, Any], spec: TensorSpec) -> tuple[int, ...]:
    shape = tensor.get("shape")
    if not isinstance(shape, list) or len(shape) > tensors.MAX_DIMENSIONS:
        raise InvalidRequest(
            f"input {spec.name}: the shape must be a list of at most {tensors.MAX_DIMENSIONS} sizes, not {quote(shape)}"
        )
    for size in shape:
        if type(size) is not int or size < 0:
            raise InvalidRequest(f"input {spec.name}: a size in the shape must be a whole number, not {quote(size)}")
    return tuple(shape)
