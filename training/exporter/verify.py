"""Verifies an exported model: loads it as servers do, and compares its outputs with the trained model's logits.

`tf.saved_model.load` alone is not enough: it binds variables by object, a C++ server binds them by name, and some
exports work in Python only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

import numpy as np
import tensorflow as tf

from training.errors import ExportError
from training.exporter.comparison import compare_heat_maps, compare_logits, compare_outputs
from training.exporter.grad_cam import explain
from training.exporter.saved_model import example_images, example_inputs
from training.models.guard import MIN_TYPICALITY, Guard
from training.models.inference_graph import InferenceGraph
from training.native_output import discard_stderr

BATCH_SIZES = (1, 3, 64)
_TYPICALITY_TOLERANCE = 0.01  # one quantile of the scores

ExpectedLogits = Callable[[np.ndarray], np.ndarray]  # uint8 (n, height, width, 3) -> float (n, classes)
_Outputs = dict[str, np.ndarray] | Exception
_Case = tuple[str, str, np.ndarray]  # signature, input name, batch
_Check = Callable[..., None]  # of the outputs of a case


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
    graph: InferenceGraph,
    class_names: tuple[str, ...],
    input_shape: tuple[int, int, int],
    outputs: Mapping[str, Collection[str]],
    guard: Guard | None = None,
) -> None:
    """Call every signature of a SavedModel, loaded with `tf.saved_model.load` and in a session.

    Args:
        folder: of the SavedModel.
        expected: the logits of the trained model.
        graph: what was exported; for its heat maps.
        class_names: a label for each class.
        input_shape: (height, width, 3).
        outputs: the names of the outputs of each signature that classifies images.
        guard: of the guarded signatures, which are called with its examples too.

    Raises:
        ExportError: a signature fails, or its outputs differ from the trained model's.
    """
    heat_maps = tf.function(lambda images: explain(graph, images), reduce_retracing=True)
    cases: list[_Case] = []
    checks: list[_Check] = []
    batches = [example_images(batch_size, input_shape) for batch_size in BATCH_SIZES]
    for images in [*batches, guard.examples] if guard else batches:
        logits = expected(images)
        for case in example_inputs(images, outputs):
            cases.append(case)
            if case[0] == "explain":
                maps = {name: output.numpy() for name, output in heat_maps(tf.constant(images)).items()}
                checks.append(functools.partial(compare_heat_maps, expected=maps, logits=logits))
            elif guard and "typicality" in outputs[case[0]]:
                typicality = guard.example_typicality if images is guard.examples else None
                checks.append(
                    functools.partial(
                        _compare_guarded, logits=logits, class_names=class_names, guard=guard, typicality=typicality
                    )
                )
            else:
                checks.append(functools.partial(compare_outputs, expected=logits, class_names=class_names))
    cases.append(("labels", "class_id", np.arange(len(class_names))))
    checks.append(functools.partial(_compare_labels, class_names=class_names))
    for loader, call in (("tf.saved_model.load", _call_loaded), ("a session", _call_session)):
        for (signature, _, batch), check, returned in zip(cases, checks, call(folder, cases), strict=True):
            where = f"the exported signature {signature}, loaded by {loader}, at batch size {len(batch)}"
            if isinstance(returned, Exception):
                raise ExportError(f"{where} fails: {str(returned).splitlines()[0]}") from returned
            names = outputs.get(signature, ("label",))
            if returned.keys() != set(names):
                raise ExportError(f"{where} returns {', '.join(sorted(returned))}, not {', '.join(sorted(names))}")
            check(returned, where=where)


def _compare_labels(outputs: dict[str, np.ndarray], *, class_names: tuple[str, ...], where: str) -> None:
    if [label.decode() for label in outputs["label"].tolist()] != list(class_names):
        raise ExportError(f"{where} returns {outputs['label']}, not {class_names}")


def _compare_guarded(
    outputs: dict[str, np.ndarray],
    *,
    logits: np.ndarray,
    class_names: tuple[str, ...],
    guard: Guard,
    typicality: np.ndarray | None,
    where: str,
) -> None:
    """Compare the outputs of a guarded signature with each other and with the expected typicality, if it is known."""
    compare_outputs(outputs, logits, class_names, where=where)
    found, probabilities = outputs["typicality"], outputs["probabilities"]
    if not ((found >= 0) & (found <= 1)).all():  # so that NaN fails
        raise ExportError(f"{where} returns a typicality that is not from 0 to 1: {found}")
    consistent = np.array_equal(outputs["is_typical"], found >= np.float32(MIN_TYPICALITY))
    if not (consistent and np.array_equal(outputs["label_set"], probabilities >= np.float32(guard.set_threshold))):
        raise ExportError(f"{where} returns is_typical or label_set that do not match its other outputs")
    if typicality is not None:
        difference = float(np.abs(found - typicality).max())
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
    with discard_stderr(), tf.Graph().as_default(), tf.compat.v1.Session() as session:
        session.run(tf.constant(0))
