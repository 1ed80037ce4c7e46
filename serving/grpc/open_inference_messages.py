"""ModelInferRequest and ModelInferResponse: parse and render of the Open Inference Protocol over gRPC."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from serving.errors import InvalidRequest
from serving.grpc.protos import open_inference_pb2 as pb2
from serving.inference.service import InferenceResult
from serving.inference.signatures import Signature, TensorSpec
from serving.open_inference.requests import InferRequest, read_request
from serving.open_inference.results import Output, prepare_outputs
from serving.open_inference.tensors import (
    check_range,
    datatype_of,
    decode_binary,
    encode_binary,
    refusal,
    reshape,
)

# The field of InferTensorContents for each datatype, and the dtype of its elements.
_CONTENTS: Mapping[str, tuple[str, type]] = {
    "BOOL": ("bool_contents", np.bool_),
    **dict.fromkeys(("INT8", "INT16", "INT32"), ("int_contents", np.int32)),
    "INT64": ("int64_contents", np.int64),
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), ("uint_contents", np.uint32)),
    "UINT64": ("uint64_contents", np.uint64),
    "FP32": ("fp32_contents", np.float32),
    "FP64": ("fp64_contents", np.float64),
    "BYTES": ("bytes_contents", np.object_),
}
_NUMBERS = "contents"  # what tensors are sent in if not in raw contents
SLICE_ELEMENTS = 64 * 1024


def parse(message: Any, model: str, signatures: Mapping[str, Signature]) -> InferRequest:
    """Read a ModelInferRequest. `model` is for error messages.

    Raises:
        InvalidRequest: the request is malformed, or does not fit the signature. Data may neither be missing nor left
            over.
    """
    raw = message.raw_input_contents
    if raw and len(raw) != len(message.inputs):
        raise InvalidRequest(f"raw_input_contents has {len(raw)} entries for {len(message.inputs)} inputs")
    inputs = [
        {
            "name": tensor.name,
            "datatype": tensor.datatype,
            "shape": list(tensor.shape),
            "parameters": _read_parameters(tensor.parameters),
            "data": (index, tensor),
        }
        for index, tensor in enumerate(message.inputs)
    ]
    document = {
        "id": message.id,
        "parameters": _read_parameters(message.parameters),
        "inputs": inputs,
        "outputs": [
            {"name": output.name, "parameters": _read_parameters(output.parameters)} for output in message.outputs
        ],
    }

    def read_data(
        described: Mapping[str, Any], _: Mapping[str, Any], spec: TensorSpec, shape: tuple[int, ...]
    ) -> np.ndarray:
        index, tensor = described["data"]
        if not raw:
            return _read_contents(tensor.contents, spec, shape)
        if tensor.contents.ListFields():
            raise refusal(spec, "it is in contents, but raw_input_contents is for all inputs; use one of them")
        return decode_binary(memoryview(raw[index]), spec, shape)

    request = read_request(document, model, signatures, read_data, binary_by_default=True, numbers=_NUMBERS)
    if len({requested.is_binary for requested in request.outputs.values()}) > 1:
        raise InvalidRequest(
            "outputs are sent in raw_output_contents all or none: binary_data must be the same for all"
        )
    return request


def render(request: InferRequest, result: InferenceResult) -> Any:
    """Return the ModelInferResponse: with raw contents, or with typed ones if the request says so."""
    response = pb2.ModelInferResponse(
        model_name=result.version.name, model_version=str(result.version.version), id=request.identifier
    )
    for output in prepare_outputs(request, result):
        tensor = response.outputs.add(name=output.name, datatype=output.datatype.name, shape=output.array.shape)
        if output.is_binary:
            chunk, _ = encode_binary(output.array, output.datatype)
            response.raw_output_contents.append(chunk if isinstance(chunk, bytes) else chunk.tobytes())
        else:
            _write_contents(tensor.contents, output)
    return response


def _read_parameters(parameters: Any) -> dict[str, Any]:
    return {
        name: getattr(value, choice)
        for name, value in parameters.items()
        if (choice := value.WhichOneof("parameter_choice")) is not None
    }


def _read_contents(contents: Any, spec: TensorSpec, shape: tuple[int, ...]) -> np.ndarray:
    """Convert typed contents to an array of the input's dtype."""
    datatype = datatype_of(spec)
    if datatype.name not in _CONTENTS:
        raise refusal(spec, f"{datatype.name} cannot be sent in {_NUMBERS}; send it in raw_input_contents")
    field, dtype = _CONTENTS[datatype.name]
    others = [other.name for other, _ in contents.ListFields() if other.name != field]
    if others:
        raise refusal(spec, f"{datatype.name} is sent in {field}, not in {others[0]}")
    values = getattr(contents, field)
    if len(values) != math.prod(shape):
        raise refusal(spec, f"the shape {list(shape)} takes {math.prod(shape)} elements; {field} has {len(values)}")
    if datatype.name == "BYTES":
        flat = np.empty(len(values), object)
        flat[:] = list(values)
    else:
        flat = np.fromiter(values, dtype, len(values))
    if flat.dtype.kind in "iu" and flat.dtype.itemsize > datatype.dtype.itemsize:
        check_range(flat, spec)
    return reshape(flat.astype(datatype.dtype, copy=False), spec, shape)


def _write_contents(contents: Any, output: Output) -> None:
    field = getattr(contents, _CONTENTS[output.datatype.name][0])
    flat = output.array.ravel()
    for start in range(0, flat.size, SLICE_ELEMENTS):  # other threads can run between two slices
        field.extend(flat[start : start + SLICE_ELEMENTS].tolist())
