"""The signature of an exported model that other runtimes can have: pixels in, numbers out.

Other runtimes have no strings, so neither encoded images nor labels are part of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from training.errors import ExportError

SIGNATURE = "serving_default"


@dataclass(frozen=True)
class PixelSignature:
    """The signature `serving_default` without its label, as a graph without variables.

    Attributes:
        function: a `tf.function` of `images`, as `spec` says, that returns the numeric outputs by name:
            `probabilities` float32 (n, classes) and `class_id` int64 (n,).
        spec: of the images, uint8 (n, height, width, channels).
        logits: the exported model's logits, float32 (n, classes), of such images.
    """

    function: Any
    spec: tf.TensorSpec
    logits: Callable[[np.ndarray], np.ndarray]

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of the images."""
        height, width, channels = self.spec.shape[1:]
        return height, width, channels


def read_pixel_signature(version: Path) -> PixelSignature:
    """Read the pixel signature of an exported model.

    Args:
        version: the folder of the SavedModel.

    Raises:
        ExportError: there is no such signature, or its probabilities are not those of a softmax.
    """
    from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

    loaded = tf.saved_model.load(str(version))
    spec = _find_spec(version, loaded.signatures)
    signature = loaded.signatures[SIGNATURE]
    frozen = convert_variables_to_constants_v2(signature, lower_control_flow=False)
    outputs = tf.nest.pack_sequence_as(signature.structured_outputs, frozen.outputs)
    logits = _find_logits(version, outputs["probabilities"])
    image_name = frozen.inputs[0].name
    graph = frozen.graph.as_graph_def()
    numeric = {name: output.name for name, output in outputs.items() if output.dtype != tf.string}
    compute_logits = _prune(graph, image_name, logits.name)
    use_common_operations(graph)
    compute_outputs = _prune(graph, image_name, numeric)

    @tf.function(input_signature=[spec])
    def function(images: tf.Tensor) -> dict[str, tf.Tensor]:
        outputs: dict[str, tf.Tensor] = compute_outputs(images)
        return outputs

    return PixelSignature(function, spec, lambda images: compute_logits(tf.constant(images)).numpy())


def use_common_operations(graph: tf.compat.v1.GraphDef) -> None:
    """Replace, in place, operations that only TensorFlow has by equivalent common ones.

    `MaxPoolV2` reads the size of its window from tensors, `MaxPool` from attributes.
    """
    constants = {node.name: node.attr["value"].tensor for node in graph.node if node.op == "Const"}
    for node in graph.node:
        if node.op == "MaxPoolV2" and all(name in constants for name in node.input[1:3]):
            for attribute, name in zip(("ksize", "strides"), node.input[1:3], strict=True):
                node.attr[attribute].list.i.extend(tf.make_ndarray(constants[name]).tolist())
            del node.input[1:3]
            node.op = "MaxPool"


def _find_spec(version: Path, signatures: Any) -> tf.TensorSpec:
    found = "none" if not signatures else f"only {', '.join(sorted(signatures))}"
    if SIGNATURE in signatures:
        inputs = signatures[SIGNATURE].structured_input_signature[1]
        outputs = signatures[SIGNATURE].structured_outputs
        first, *others = inputs.values()
        if not others and first.dtype == tf.uint8 and first.shape.rank == 4 and "probabilities" in outputs:
            return tf.TensorSpec(first.shape, first.dtype, *inputs)
        described = ", ".join(f"{name} {spec.dtype.name} {spec.shape}" for name, spec in inputs.items())
        found = f"{SIGNATURE} from {described} to {', '.join(sorted(outputs))}"
    raise ExportError(
        f"{version} cannot be converted: expected a signature {SIGNATURE} from uint8 (n, height, width, 3) to "
        f"probabilities; found {found}. Convert a version that this program has exported"
    )


def _find_logits(version: Path, probabilities: tf.Tensor) -> tf.Tensor:
    operation = probabilities.op
    while operation.type == "Identity":
        operation = operation.inputs[0].op
    if operation.type != "Softmax":
        raise ExportError(
            f"{version} cannot be converted: its probabilities are computed by {operation.type}, not by Softmax, so "
            "there are no logits to compare with"
        )
    return operation.inputs[0]


def _prune(graph: tf.compat.v1.GraphDef, image_name: str, outputs: str | dict[str, str]) -> Any:
    """Return the function of images that computes these tensors of a graph."""
    imported = tf.compat.v1.wrap_function(lambda: tf.graph_util.import_graph_def(graph, name=""), [])
    return imported.prune(image_name, outputs)
