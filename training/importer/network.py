"""A model as one TensorFlow graph: frozen, searched, and cut into features and head."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.python.eager.wrap_function import function_from_graph_def
from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

from training.errors import ModelError
from training.importer.loading import Source
from training.models.inference_graph import TensorFunction
from training.native_output import discard_stderr

# Operations that return their first input unchanged, but for its dtype.
_TRANSPARENT = ("Identity", "StopGradient", "PreventGradient", "EnsureShape", "Cast")
_CONVOLUTIONS = ("Conv2D", "DepthwiseConv2dNative", "_FusedConv2D")
_REDUCTIONS = ("Mean", "Max", "Sum")
_WEIGHTED = (*_CONVOLUTIONS, "Conv3D", "MatMul", "BatchMatMulV2", "Einsum")


@dataclass(frozen=True)
class Network:
    """A model's graph, from its own input to one output.

    Attributes:
        concrete: the traced function, with the model's variables.
        source: for messages.
        index: of the output among those of `concrete`.
        output_name: the model's name of the output; "" if it has only one.
    """

    concrete: Any
    source: Source
    index: int
    output_name: str

    @cached_property
    def frozen(self) -> Any:
        """The function with constants instead of variables.

        Raises:
            ModelError: it has state that is no constant.
        """
        try:
            with discard_stderr():
                frozen = convert_variables_to_constants_v2(self.concrete, lower_control_flow=False)
            return _simplify(frozen)
        except Exception as error:
            raise ModelError(
                f"{self.source.description} cannot be frozen: {type(error).__name__}: {summarize(error)}. A layer "
                "keeps state that changes with each batch, or a table; make it constant"
            ) from error

    @property
    def input(self) -> tf.Tensor:
        """The input tensor of the frozen graph."""
        return self.frozen.inputs[0]

    @property
    def output(self) -> tf.Tensor:
        """The output tensor of the frozen graph."""
        return self.frozen.outputs[self.index]

    @property
    def weights(self) -> int:
        """The number of the model's weights."""
        return sum(int(np.prod(variable.shape)) for variable in self.concrete.graph.variables)

    def original(self, inputs: np.ndarray) -> np.ndarray:
        """Compute the output with the model's own variables, float32, of a batch as the model takes it."""
        with discard_stderr():  # where an optimization fails, TensorFlow leaves it out and prints an error
            output: np.ndarray = flatten(self.concrete(tf.constant(inputs)))[self.index].numpy()
        return output.astype(np.float32)

    def compute(self, fetch: tf.Tensor, feed: tf.Tensor | None = None) -> TensorFunction:
        """Return the function from `feed`, by default the input, to another tensor of the frozen graph."""
        feed = self.input if feed is None else feed
        if fetch is feed:
            return lambda tensor: tf.identity(tensor)
        pruned = self.frozen.prune([feed], fetch)
        return lambda tensor: pruned(tensor)

    def strip(self, tensor: tf.Tensor) -> tf.Tensor:
        """Return the tensor below operations that do not change it."""
        while tensor.op.type in _TRANSPARENT:
            tensor = tensor.op.inputs[0]
        return tensor

    def before_weights(self) -> tf.Tensor | None:
        """Return the tensor that the first convolution or matrix product takes; `None` if there is none."""
        dependent = self._from_input
        for operation in self._path(self.output):
            if operation.type in _WEIGHTED:
                inputs = [tensor for tensor in operation.inputs if tensor.op in dependent]
                return inputs[0] if len(inputs) == 1 else None
        return None

    def last_feature_map(self, logits: tf.Tensor) -> tf.Tensor | None:
        """Return the last float (n, rows, columns, channels) that everything from the input to `logits` goes through.

        What a global pooling leaves is no map, even with its axes kept. `None` if there is no map after a convolution.
        """
        path = self._path(logits)
        position = {operation: number for number, operation in enumerate(path)}
        convolutions = [number for number, operation in enumerate(path) if operation.type in _CONVOLUTIONS]
        if not convolutions:
            return None
        single: tf.Tensor | None = None
        # From the logits backwards: where only one operation is open, all paths go through it.
        open_operations = {logits.op}
        while open_operations:
            operation = max(open_operations, key=position.__getitem__)
            if position[operation] < convolutions[0]:
                break
            if len(open_operations) == 1 and len(operation.outputs) == 1:
                (tensor,) = operation.outputs
                if _is_feature_map(tensor):
                    if tensor.shape[1] * tensor.shape[2] > 1:
                        return tensor if single is None else single
                    if operation.type in _REDUCTIONS:
                        single = None
                    elif single is None:
                        single = tensor
            open_operations.remove(operation)
            open_operations.update(each.op for each in operation.inputs if each.op in position)
        return single

    @property
    def _from_input(self) -> set[Any]:
        """The operations that depend on the input."""
        found = {self.input.op}
        waiting = [self.input.op]
        while waiting:
            for output in waiting.pop().outputs:
                new = set(output.consumers()) - found
                found |= new
                waiting += new
        return found

    def _path(self, end: tf.Tensor) -> list[Any]:
        """Return the operations between the input and a tensor, each after those that it depends on."""
        dependent = self._from_input
        order: dict[Any, None] = {}
        waiting = [(end.op, False)]
        while waiting:
            operation, are_inputs_done = waiting.pop()
            if operation in order or operation not in dependent:
                continue
            if are_inputs_done:
                order[operation] = None
            else:
                waiting.append((operation, True))
                waiting += [(tensor.op, False) for tensor in operation.inputs]
        return list(order)


def _simplify(frozen: Any) -> Any:
    """Return a function without control dependencies and custom gradients.

    Nothing in a frozen graph has side effects that another operation could wait for. Both would tie every part of a
    graph to its input, so that it could not be cut, or could not be saved.
    """
    graph = frozen.graph.as_graph_def()
    passed: dict[str, str] = {}  # outputs of IdentityN, which carries the custom gradients
    for node in graph.node:
        inputs = [name for name in node.input if not name.startswith("^")]
        del node.input[:]
        node.input.extend(inputs)
        if node.op == "IdentityN":
            passed |= {f"{node.name}:{number}" if number else node.name: name for number, name in enumerate(inputs)}
    for node in graph.node:
        for number, name in enumerate(node.input):
            while name in passed:
                name = passed[name]
            node.input[number] = name
        node.attr.pop("_gradient_op_type", None)
    for function in graph.library.function:
        for node in function.node_def:
            node.attr.pop("_gradient_op_type", None)
    inputs, outputs = ([tensor.name for tensor in tensors] for tensors in (frozen.inputs, frozen.outputs))
    return function_from_graph_def(graph, inputs, outputs)


def _is_feature_map(tensor: tf.Tensor) -> bool:
    shape = tensor.shape
    return bool(tensor.dtype == tf.float32 and shape.rank == 4 and None not in shape[1:].as_list())


def flatten(outputs: Any) -> list[Any]:
    """Return the output tensors of a function in the order in which it returns them."""
    return [each for each in tf.nest.flatten(outputs) if each is not None]


def summarize(error: Exception) -> str:
    """Return what an error of a model says, without the code and the arguments that AutoGraph and Keras print."""
    text = re.sub(r"\x1b\[\d*m", "", str(error)).partition("Arguments received")[0]
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [type(error).__name__]
    return lines[-1] if lines[0].startswith("in user code") else " ".join(lines[:2])
