"""Requests and responses of the Open Inference Protocol: JSON, followed by the data of binary tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import orjson

from serving.api.compression import DEFLATE, GZIP, inflate
from serving.api.json_arrays import insert_arrays, set_aside
from serving.api.open_inference.json_tensors import decode_json, encode_json
from serving.errors import InvalidRequest, UnsupportedMedia
from serving.inference.service import InferenceResult
from serving.inference.signatures import Signature, TensorSpec
from serving.open_inference.requests import InferRequest, read_request
from serving.open_inference.results import prepare_outputs
from serving.open_inference.tensors import decode_binary, encode_binary
from serving.quoting import quote

HEADER_LENGTH = "Inference-Header-Content-Length"
_WBITS = {"gzip": GZIP, "deflate": DEFLATE}
_MAX_DIGITS = 19  # no length has more, and `int` of millions of digits is slow


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
    document = parse_object(view[:json_bytes], expected="a JSON object with inputs")
    binary = view[json_bytes:]

    def read_data(
        tensor: Mapping[str, Any], parameters: Mapping[str, Any], spec: TensorSpec, shape: tuple[int, ...]
    ) -> np.ndarray:
        nonlocal binary
        size = parameters.get("binary_data_size")
        if (size is None) == ("data" not in tensor):
            raise InvalidRequest(f"input {spec.name} needs either data or the parameter binary_data_size, but not both")
        if size is None:
            return decode_json(tensor["data"], spec, shape)
        if type(size) is not int or not 0 <= size <= len(binary):
            raise InvalidRequest(
                f"input {spec.name}: binary_data_size is {quote(size)}, but {len(binary)} bytes are left after the "
                f"JSON, whose length is {HEADER_LENGTH}"
            )
        own, binary = binary[:size], binary[size:]
        return decode_binary(own, spec, shape)

    request = read_request(document, model, signatures, read_data, binary_by_default=False, numbers="JSON")
    if binary:
        raise InvalidRequest(f"{len(binary)} bytes after the JSON belong to no input")
    return request


def parse_object(text: bytes | memoryview, *, expected: str) -> dict[str, Any]:
    """Parse a JSON object; raises InvalidRequest. `expected` is for error messages."""
    try:
        document = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"the first {len(text)} bytes of the body are not valid JSON: {error}") from error
    if not isinstance(document, dict):
        raise InvalidRequest(f"expected {expected}, got {quote(document)}")
    return document


def render(request: InferRequest, result: InferenceResult) -> tuple[bytes, int | None]:
    """Encode the response; returns it, and the length of the JSON at its beginning, or None if all of it is JSON."""
    outputs, chunks = [], []
    large: list[np.ndarray] = []
    for output in prepare_outputs(request, result):
        described: dict[str, Any] = {
            "name": output.name,
            "datatype": output.datatype.name,
            "shape": output.array.shape,
        }
        if output.is_binary:
            chunk, size = encode_binary(output.array, output.datatype)
            chunks.append(chunk)
            described["parameters"] = {"binary_data_size": size}
        else:
            described["data"] = set_aside(encode_json(output.array, output.name), large)
        outputs.append(described)
    response: dict[str, Any] = {"model_name": result.version.name, "model_version": str(result.version.version)}
    if request.identifier is not None:
        response["id"] = request.identifier
    text = insert_arrays(orjson.dumps({**response, "outputs": outputs}, option=orjson.OPT_SERIALIZE_NUMPY), large)
    return (b"".join((text, *chunks)), len(text)) if chunks else (text, None)
