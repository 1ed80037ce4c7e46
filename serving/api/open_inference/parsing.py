"""Parses inference requests of the Open Inference Protocol: JSON, followed by the data of binary tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson

from serving.api.compression import DEFLATE, GZIP, inflate
from serving.api.open_inference.tensors import MAX_DIMENSIONS, datatype_of, decode_binary, decode_json
from serving.errors import InvalidRequest, UnsupportedMedia
from serving.inference.service import InferenceRequest
from serving.inference.signatures import DEFAULT_SIGNATURE, Signature, TensorSpec
from serving.quoting import quote

HEADER_LENGTH = "Inference-Header-Content-Length"
_WBITS = {"gzip": GZIP, "deflate": DEFLATE}
_MAX_DIGITS = 19  # no length has more, and `int` of millions of digits is slow


@dataclass(eq=False)
class InferRequest(InferenceRequest):
    """An inference request of this protocol.

    Args:
        identifier: the request's `id`, repeated in the response.
        outputs: the names of the requested outputs, in this order, and whether each is sent as binary data.
    """

    identifier: str | None
    outputs: Mapping[str, bool]


def parse(body: bytes, header_length: str | None, model: str, signatures: Mapping[str, Signature]) -> InferRequest:
    """Parse an inference request.

    Args:
        body: the decompressed body.
        header_length: the value of Inference-Header-Content-Length, or None.
        model: the model's name, for error messages.
        signatures: the model's signatures.

    Raises:
        InvalidRequest: the request is malformed, or does not fit the signature.
    """
    document, binary = split_body(body, header_length)
    signature = find_signature(model, signatures, read_signature_name(document, signatures))
    identifier = read_id(document)
    outputs = read_outputs(document, signature)
    return InferRequest(signature.name, read_inputs(document, binary, signature), identifier, outputs)


def find_signature(model: str, signatures: Mapping[str, Signature], name: str) -> Signature:
    """Return the signature with a name.

    Raises:
        InvalidRequest: the model has no such signature.
    """
    signature = signatures.get(name)
    if signature is None:
        names = ", ".join(name for name, other in signatures.items() if other.inputs)
        raise InvalidRequest(f"model {model} has no signature {quote(name)}; it has {names}")
    return signature


def inflate_body(body: bytes, encoding: str, header_length: str | None) -> bytes:
    """Decompress a body.

    Args:
        body: the body as received.
        encoding: the value of Content-Encoding.
        header_length: the value of Inference-Header-Content-Length, the length of the JSON, or None.

    Raises:
        UnsupportedMedia: the encoding is neither gzip nor deflate.
        InvalidRequest: the body does not have this encoding.
        TooLarge: the decompressed body exceeds the limit.
    """
    encoding = encoding.strip().lower()
    if encoding in ("", "identity"):
        return body
    if encoding not in _WBITS:
        raise UnsupportedMedia(f"the Content-Encoding {quote(encoding)} is not supported; send gzip, deflate or none")
    try:
        return inflate(body, wbits=_WBITS[encoding], json_bytes=_read_length(header_length))
    except ValueError as error:
        raise InvalidRequest(f"the body cannot be decompressed as {encoding}: {error}") from error


def split_body(body: bytes, header_length: str | None) -> tuple[dict[str, Any], memoryview]:
    """Return the JSON of a request, and a view of the binary data after it.

    Args:
        body: the decompressed body.
        header_length: the value of Inference-Header-Content-Length; None if the whole body is JSON.

    Raises:
        InvalidRequest: the header is not a length within the body, or the JSON is not an object.
    """
    length = json_length(body, header_length)
    view = memoryview(body)
    try:
        document = orjson.loads(view[:length])
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"the first {length} bytes of the body are not valid JSON: {error}") from error
    if not isinstance(document, dict):
        raise InvalidRequest(f"expected a JSON object with inputs, got {quote(document)}")
    return document, view[length:]


def _read_length(header_length: str | None) -> int | None:
    is_number = header_length is not None and header_length.isascii() and header_length.isdigit()
    return int(header_length) if header_length and is_number and len(header_length) <= _MAX_DIGITS else None


def json_length(body: bytes, header_length: str | None) -> int:
    """Return the length of the JSON at the beginning of a body.

    Raises:
        InvalidRequest: the header is not a length within the body.
    """
    length = len(body)
    if header_length is not None:
        if not (header_length.isascii() and header_length.isdigit() and len(header_length) <= _MAX_DIGITS):
            raise InvalidRequest(f"{HEADER_LENGTH} must be a number of bytes, not {quote(header_length)}")
        length = int(header_length)
        if length > len(body):
            raise InvalidRequest(f"{HEADER_LENGTH} is {length}, but the body has {len(body)} bytes")
    return length


def read_id(document: Mapping[str, Any]) -> str | None:
    """Return the request's `id`, which the response repeats.

    Raises:
        InvalidRequest: the `id` is not a string.
    """
    identifier = document.get("id")
    if identifier is not None and not isinstance(identifier, str):
        raise InvalidRequest(f"id must be a string, not {quote(identifier)}")
    return identifier


def read_signature_name(document: Mapping[str, Any], signatures: Mapping[str, Signature]) -> str:
    """Return the name of the requested signature: the parameter `signature_name`.

    Without the parameter, which most clients cannot send, it is the signature that has exactly the request's inputs. If
    there is none, or `serving_default` is one of several, it is `serving_default`; of several others, the one that is
    named as its input, such as `image_bytes`.

    Raises:
        InvalidRequest: the parameters are malformed, or several signatures have these inputs.
    """
    name = _parameters(document, of="the request").get("signature_name")
    if name is None:
        return _match_inputs(document.get("inputs"), signatures)
    if not isinstance(name, str):
        raise InvalidRequest(f"the parameter signature_name must be a string, not {quote(name)}")
    return name


def _match_inputs(inputs: Any, signatures: Mapping[str, Signature]) -> str:
    tensors = inputs if isinstance(inputs, list) else ()
    names = sorted(str(tensor.get("name")) for tensor in tensors if isinstance(tensor, dict))
    found = [name for name, signature in signatures.items() if names and sorted(signature.inputs) == names]
    if not found or DEFAULT_SIGNATURE in found:
        return DEFAULT_SIGNATURE
    if len(names) == 1 and names[0] in found:
        return names[0]
    if len(found) > 1:
        raise InvalidRequest(
            f"several signatures have the input {', '.join(names)}: {', '.join(found)}; choose one with the parameter "
            "signature_name"
        )
    return found[0]


def read_inputs(document: Mapping[str, Any], binary: memoryview, signature: Signature) -> dict[str, np.ndarray]:
    """Return the arrays of a request; those of binary tensors are views of the body.

    Returns:
        An array for each input sent, with the signature's dtype and the request's shape.

    Raises:
        InvalidRequest: an input is malformed, unknown, repeated, of the wrong datatype, or its data does not fit its
            shape; or there is binary data that belongs to no input.
    """
    arrays: dict[str, np.ndarray] = {}
    start = 0
    for tensor in _objects(document.get("inputs"), what="inputs"):
        name = tensor.get("name")
        if not isinstance(name, str) or name not in signature.inputs:
            raise InvalidRequest(
                f'signature "{signature.name}" has no input {quote(name)}; it takes {", ".join(signature.inputs)}'
            )
        if name in arrays:
            raise InvalidRequest(f"input {name} is repeated")
        spec = signature.inputs[name]
        _check_datatype(tensor, spec)
        shape = _shape(tensor, spec)
        size = _parameters(tensor, of=f"input {name}").get("binary_data_size")
        if (size is None) == ("data" not in tensor):
            raise InvalidRequest(f"input {name} needs either data or the parameter binary_data_size, but not both")
        if size is None:
            arrays[name] = decode_json(tensor["data"], spec, shape)
            continue
        if type(size) is not int or not 0 <= size <= len(binary) - start:
            raise InvalidRequest(
                f"input {name}: binary_data_size is {quote(size)}, but {len(binary) - start} bytes are left after "
                f"the JSON, whose length is {HEADER_LENGTH}"
            )
        arrays[name] = decode_binary(binary[start : start + size], spec, shape)
        start += size
    if start != len(binary):
        raise InvalidRequest(f"{len(binary) - start} bytes after the JSON belong to no input")
    return arrays


def read_outputs(document: Mapping[str, Any], signature: Signature) -> dict[str, bool]:
    """Return the names of the requested outputs, in their order, and whether each is sent as binary data.

    Raises:
        InvalidRequest: an output is malformed, unknown, repeated, or requested in an unsupported format.
    """
    binary_by_default = _flag(_parameters(document, of="the request"), "binary_data_output", default=False)
    requested = _objects(document.get("outputs") or [], what="outputs")
    outputs: dict[str, bool] = {}
    for output in requested:
        name = output.get("name")
        if not isinstance(name, str) or name not in signature.outputs:
            raise InvalidRequest(
                f'signature "{signature.name}" has no output {quote(name)}; it has {", ".join(signature.outputs)}'
            )
        if name in outputs:
            raise InvalidRequest(f"output {name} is repeated")
        parameters = _parameters(output, of=f"output {name}")
        if parameters.get("classification"):
            raise InvalidRequest(f"output {name}: the parameter classification is not supported")
        outputs[name] = _flag(parameters, "binary_data", default=binary_by_default)
    if not requested:
        outputs = dict.fromkeys(signature.outputs, binary_by_default)
    for name, is_binary in outputs.items():
        datatype = datatype_of(signature.outputs[name])
        if not is_binary and not datatype.json_types:
            raise InvalidRequest(f"output {name}: {datatype.name} cannot be sent as JSON; request it as binary data")
    return outputs


def _objects(value: Any, *, what: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise InvalidRequest(f"{what} must be a list of objects, not {quote(value)}")
    return value


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


def _check_datatype(tensor: Mapping[str, Any], spec: TensorSpec) -> None:
    expected = datatype_of(spec).name
    if tensor.get("datatype") != expected:
        raise InvalidRequest(f"input {spec.name}: the datatype is {expected}, not {quote(tensor.get('datatype'))}")


def _shape(tensor: Mapping[str, Any], spec: TensorSpec) -> tuple[int, ...]:
    shape = tensor.get("shape")
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS:
        raise InvalidRequest(
            f"input {spec.name}: the shape must be a list of at most {MAX_DIMENSIONS} sizes, not {quote(shape)}"
        )
    for size in shape:
        if type(size) is not int or size < 0:
            raise InvalidRequest(f"input {spec.name}: a size in the shape must be a whole number, not {quote(size)}")
    return tuple(shape)
