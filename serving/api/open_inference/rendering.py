"""Renders the response to an inference request: JSON, followed by the data of binary tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import orjson

from serving.api.json_arrays import insert_arrays, set_aside
from serving.api.open_inference.parsing import InferRequest
from serving.api.open_inference.tensors import datatype_of, encode_binary, encode_json
from serving.inference.service import InferenceResult


def render(request: InferRequest, result: InferenceResult) -> tuple[bytes, int | None]:
    """Encode the response.

    Returns:
        The body, and the length of the JSON at its beginning; None if all of it is JSON.
    """
    outputs, chunks = [], []
    large: list[np.ndarray] = []
    for name, is_binary in request.outputs.items():
        array, spec = result.outputs[name], result.signature.outputs[name]
        output: dict[str, Any] = {"name": name, "datatype": datatype_of(spec).name, "shape": array.shape}
        if is_binary:
            chunk, size = encode_binary(array, spec)
            chunks.append(chunk)
            output["parameters"] = {"binary_data_size": size}
        else:
            output["data"] = set_aside(encode_json(array, spec), large)
        outputs.append(output)
    response: dict[str, Any] = {"model_name": result.version.name, "model_version": str(result.version.version)}
    if request.identifier is not None:
        response["id"] = request.identifier
    text = insert_arrays(orjson.dumps({**response, "outputs": outputs}, option=orjson.OPT_SERIALIZE_NUMPY), large)
    return (b"".join((text, *chunks)), len(text)) if chunks else (text, None)
