"""Traces a model in float32: one TensorFlow function from a batch as the model takes it to one output."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

from training.errors import ModelError
from training.importer.inspection import ImageInput, describe_shape
from training.importer.loading import Source
from training.importer.network import Network, flatten, summarize

_HALF = ("float16", "bfloat16")
_PYTHON = ("PyFunc", "PyFuncStateless", "EagerPyFunc")


def trace(source: Source, image_input: ImageInput, *, output: str | None) -> Network:
    """Trace a model in float32.

    Args:
        source: the model.
        image_input: what it takes.
        output: name of the output, if there are several.

    Raises:
        ModelError: the model fails, has several outputs and none is named, or runs Python code.
    """
    spec = image_input.spec
    try:
        with _in_float32(source):
            concrete = tf.function(lambda images: source.call(images)).get_concrete_function(spec)
    except Exception as error:  # a model may raise anything
        raise ModelError(
            f"{source.description} fails on a batch of {image_input}: {type(error).__name__}: {summarize(error)}"
        ) from error
    name, tensor = _choose_output(source, concrete.graph.structured_outputs, output)
    if python := [operation.name for operation in concrete.graph.get_operations() if operation.type in _PYTHON]:
        raise ModelError(
            f"{source.description} runs Python code for each batch (py_function or numpy_function, {python[0]}), which "
            "no server has. Write that step with operations of Keras or TensorFlow"
        )
    index = next(number for number, each in enumerate(flatten(concrete.graph.structured_outputs)) if each is tensor)
    return Network(concrete, source, index, name)


def _choose_output(source: Source, outputs: Any, name: str | None) -> tuple[str, tf.Tensor]:
    """Return the chosen output and its name."""
    if isinstance(outputs, dict):
        named = {str(key): value for key, value in outputs.items()}
    elif isinstance(outputs, list | tuple):
        names = source.output_names if len(source.output_names) == len(outputs) else None
        named = dict(zip(names or (f"output_{number}" for number in range(len(outputs))), outputs, strict=True))
    else:
        named = {"": outputs}
    if name is None and len(named) == 1:
        ((name, tensor),) = named.items()
        return name, tensor
    listed = ", ".join(f"{key or 'an unnamed one'} {describe_shape(tuple(each.shape))}" for key, each in named.items())
    if name is None:
        raise ModelError(
            f"{source.description} has {len(named)} outputs: {listed}. Name the one with a value for each class: "
            "--output NAME"
        )
    if name not in named:
        raise ModelError(f"{source.description} has no output {name!r}; its outputs are: {listed}")
    return name, named[name]


@contextlib.contextmanager
def _in_float32(source: Source) -> Iterator[None]:
    """Compute layers of mixed precision in float32, as servers on a CPU should; restore them afterwards."""
    changed = [(layer, layer.dtype_policy) for layer in source.layers if _is_mixed(layer)]
    try:
        for layer, _ in changed:
            layer.dtype_policy = "float32"
        yield
    finally:
        for layer, policy in changed:
            layer.dtype_policy = policy


def has_mixed_precision(source: Source) -> bool:
    """Return whether a model has layers with weights in float32 that compute in half precision."""
    return any(map(_is_mixed, source.layers))


def _is_mixed(layer: Any) -> bool:
    policy = layer.dtype_policy
    return policy.compute_dtype in _HALF and policy.variable_dtype == "float32"
