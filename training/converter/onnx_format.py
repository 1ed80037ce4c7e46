"""ONNX: conversion by tf2onnx, execution by ONNX Runtime."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from training.converter.pixel_signature import PixelSignature
from training.errors import ExportError


def convert(signature: PixelSignature, model_info: str) -> bytes:
    """Return an ONNX model with the signature's names; its metadata has `model_info` as `model.json`.

    Raises:
        ExportError: an operation has no equivalent; the message names it.
    """
    import onnx
    import tf2onnx

    # It logs its progress, and an unsupported operation with the whole graph.
    logging.getLogger("tf2onnx").setLevel(logging.CRITICAL)
    model, _ = tf2onnx.convert.from_function(signature.function, input_signature=[signature.spec])
    unknown = {node.op_type for node in _nodes(model.graph) if not onnx.defs.has(node.op_type, node.domain)}
    if unknown:
        raise ExportError(f"tf2onnx has no equivalent of {', '.join(sorted(unknown))}")
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "n"
    onnx.helper.set_model_props(model, {"model.json": model_info})
    onnx.checker.check_model(model)
    content: bytes = model.SerializeToString()
    return content


def load(content: bytes) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """Return the function of images that a model computes in ONNX Runtime."""
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    (image_input,) = session.get_inputs()
    return lambda images: dict(zip(names, session.run(names, {image_input.name: images}), strict=True))


def _nodes(graph: Any) -> Iterator[Any]:
    """Yield the nodes of a graph and of the graphs inside them, such as the branches of an If."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _nodes(inner)
