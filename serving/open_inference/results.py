"""Runs requests of the Open Inference Protocol, and prepares their outputs: classification."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from serving.inference.repository import ModelVersion
from serving.inference.service import InferenceResult, InferenceService
from serving.inference.signatures import TensorSpec
from serving.open_inference.requests import InferRequest
from serving.open_inference.tensors import Datatype, datatype_of
from serving.request_context import current_request

CLASS_BYTES = 256  # memory of a class as a string, and of its copies in the response

_BYTES = datatype_of(TensorSpec("classes", "DT_STRING", None, ""))


@dataclass(slots=True)
class Output:
    """An output as it is sent."""

    name: str
    datatype: Datatype
    array: np.ndarray
    is_binary: bool


def run(inference: InferenceService, version: ModelVersion, request: InferRequest) -> InferenceResult:
    """Run a request before its own timeout; raises the errors of `InferenceService.predict`."""
    context = current_request.get()
    if request.timeout_s is not None:
        context.shorten_deadline(request.timeout_s)
    result = inference.predict(version, request)
    for name, requested in request.outputs.items():
        if requested.class_count:
            array = result.outputs[name]
            rows, classes = _count_classes(array, result.signature.outputs[name])
            context.reserve(CLASS_BYTES * rows * min(requested.class_count, classes))
    return result


def prepare_outputs(request: InferRequest, result: InferenceResult) -> list[Output]:
    """Return the requested outputs in their order."""
    outputs = []
    for name, requested in request.outputs.items():
        array, spec = result.outputs[name], result.signature.outputs[name]
        if requested.class_count:
            classes = classify(array, spec, requested.class_count, result.version.info.class_names)
            outputs.append(Output(name, _BYTES, classes, requested.is_binary))
        else:
            outputs.append(Output(name, datatype_of(spec), array, requested.is_binary))
    return outputs


def classify(array: np.ndarray, spec: TensorSpec, count: int, names: tuple[str, ...]) -> np.ndarray:
    """Describe the `count` largest numbers of each row as Triton does: `score:index:label`, the largest first.

    Args:
        array: an output; all axes behind the batch axis are one row, and without a batch axis the array is one.
        spec: of the output.
        count: of the numbers that are described; there are no more than classes.
        names: of the classes. Other numbers than there are names have no labels.

    Returns:
        UTF-8 strings, object (rows, count); (count,) without a batch axis.
    """
    rows, classes = _count_classes(array, spec)
    count = min(count, classes)
    table = array.reshape(rows, classes)
    # Stable, so equal numbers are in the order of their indices.
    ascending = np.argsort(table[:, ::-1], axis=1, kind="stable")
    largest = classes - 1 - ascending[:, ::-1][:, :count]
    scores = np.take_along_axis(table, largest, axis=1)
    labels = [f":{name}" for name in names] if len(names) == classes else [""] * classes
    decimals = ".6f" if array.dtype.kind == "f" else "d"
    strings = np.empty(rows * count, object)
    strings[:] = [
        f"{score:{decimals}}:{index}{labels[index]}".encode()
        for score, index in zip(scores.ravel().tolist(), largest.ravel().tolist(), strict=True)
    ]
    return strings.reshape((rows, count) if spec.is_batched else (count,))


def _count_classes(array: np.ndarray, spec: TensorSpec) -> tuple[int, int]:
    if not spec.is_batched:
        return 1, array.size
    return len(array), math.prod(array.shape[1:])
