"""Verifies an exported model: loads it as servers do, and compares its outputs with the trained model's logits.

`tf.saved_model.load` alone is not enough: it binds variables by object, a C++ server binds them by name, and some
exports work in Python only.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import tensorflow as tf

from training.errors import ExportError
from training.exporter.comparison import compare_logits, compare_outputs
from training.exporter.saved_model import example_images, example_inputs
from training.models.guard import MIN_TYPICALITY, Guard
from training.models.inference_graph import InferenceGraph

BATCH_SIZES = (1, 3, 64)
_TYPICALITY_TOLERANCE = 0.01  # one quantile of the scores

ExpectedLogits = Callable[[np.ndarray], np.ndarray]  # uint8 (n, height, width, 3) -> float (n, classes)
_Outputs = dict[str, np.ndarray] | Exception
_Case = tuple[str, str, np.ndarray]  # signature, input name, batch


def verify_graph(graph: InferenceGraph, expected: ExpectedLogits, *, input_shape: tuple[int, int, int]) -> None:
    """Compare the logits of the graph that is exported with those of the trained model.

    Logits, not probabilities: probabilities of 0 and 1 would hide errors of the folding.

    Raises:
        ExportError: they differ.
    """
    compute = tf.function(graph.logits, reduce_retracing=True)
    for batch_size in BATCH_SIZES:
        images = example_images(batch_size, input_shape)
        where = f"the exported graph, at batch size {batch_size},"
        compare_logits(compute(tf.constant(images)).numpy(), expected(images), where=where)


def verify_saved_model(
    folder: Path,
    expected: ExpectedLogits,
    *,
    class_names: tuple[str, ...],
    input_shape: tuple[int, int, int],
    guard: Guard | None = None,
) -> None:
    """Call every signature of a SavedModel, loaded with `tf.saved_model.load` and in a session.

    Args:
        folder: of the SavedModel.
        expected: the logits of the trained model.
        class_names: a label for each class.
        input_shape: (height, width, 3).
        guard: of the guarded signatures, which are called with its examples too.

    Raises:
        ExportError: a signature fails, or its outputs differ from the trained model's.
    """
    cases: list[_Case] = []
    rows: list[tuple[np.ndarray, np.ndarray | None]] = []  # expected logits and typicality
    batches = [(example_images(batch_size, input_shape), None) for batch_size in BATCH_SIZES]
    for images, typicality in batches if guard is None else [*batches, (guard.examples, guard.example_typicality)]:
        inputs = example_inputs(images, guarded=guard is not None)
        cases += inputs
        rows += [(expected(images), typicality)] * len(inputs)
    cases.append(("labels", "class_id", np.arange(len(class_names))))
    for loader, call in (("tf.saved_model.load", _call_loaded), ("a session", _call_session)):
        results = []
        for (signature, _, batch), outputs in zip(cases, call(folder, cases), strict=True):
            where = f"the exported signature {signature}, loaded by {loader}, at batch size {len(batch)}"
            if isinstance(outputs, Exception):
                raise ExportError(f"{where} fails: {str(outputs).splitlines()[0]}") from outputs
            results.append((outputs, where))
        *predictions, (labels, where) = results
        for (outputs, where_called), (logits, typicality) in zip(predictions, rows, strict=True):
            compare_outputs(outputs, logits, class_names, where=where_called)
            if guard and "typicality" in outputs:
                _verify_guarded(outputs, guard, typicality, where=where_called)
        if [label.decode() for label in labels["label"].tolist()] != list(class_names):
            raise ExportError(f"{where} returns {labels['label']}, not {class_names}")


def _verify_guarded(outputs: dict[str, np.ndarray], guard: Guard, expected: np.ndarray | None, *, where: str) -> None:
    """Check the outputs of a guarded signature with each other and with the expected typicality, if it is known."""
    typicality, probabilities = outputs["typicality"], outputs["probabilities"]
    if not ((typicality >= 0) & (typicality <= 1)).all():  # so that NaN fails
        raise ExportError(f"{where} returns a typicality that is not from 0 to 1: {typicality}")
    consistent = np.array_equal(outputs["is_typical"], typicality >= np.float32(MIN_TYPICALITY))
    if not (consistent and np.array_equal(outputs["label_set"], probabilities >= np.float32(guard.set_threshold))):
        raise ExportError(f"{where} returns is_typical or label_set that do not match its other outputs")
    if expected is not None:
        difference = float(np.abs(typicality - expected).max())
        if not difference <= _TYPICALITY_TOLERANCE:
            raise ExportError(f"{where} differs from the fitted guard: its typicality by {difference:.2g}")


def _call_loaded(folder: Path, cases: list[_Case]) -> Iterator[_Outputs]:
    signatures = tf.saved_model.load(str(folder)).signatures
    for signature, input_name, batch in cases:
        try:
            outputs = signatures[signature](**{input_name: tf.constant(batch)})
            yield {name: output.numpy() for name, output in outputs.items()}
        except tf.errors.OpError as error:
            yield error


def _call_session(folder: Path, cases: list[_Case]) -> Iterator[_Outputs]:
    _start_sessions()
    graph = tf.Graph()
    with tf.compat.v1.Session(graph=graph) as session:
        with graph.as_default():
            meta_graph = tf.compat.v1.saved_model.load(session, ["serve"], str(folder))
        for signature, input_name, batch in cases:
            definition = meta_graph.signature_def[signature]
            fetches = {name: output.name for name, output in definition.outputs.items()}
            try:
                yield session.run(fetches, {definition.inputs[input_name].name: batch})
            except tf.errors.OpError as error:
                yield error


@functools.cache
def _start_sessions() -> None:
    """Create the first session of the process with stderr redirected.

    TensorFlow then prints, at every log level, that an optimization is off.
    """
    sys.stderr.flush()
    stderr = os.dup(2)
    try:
        with Path(os.devnull).open("wb") as devnull:
            os.dup2(devnull.fileno(), 2)
        with tf.Graph().as_default(), tf.compat.v1.Session() as session:
            session.run(tf.constant(0))
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
