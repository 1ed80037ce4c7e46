"""Write a trained model as a SavedModel that answers by itself, prove it, and publish it as a new version.

    models/<name>/<version>/
        saved_model.pb  variables/  fingerprint.pb
        assets.extra/model.json                    what the model is
        assets.extra/tf_serving_warmup_requests    replayed by a server when it loads the model
        assets.extra/SHA256SUMS                    the sums of all other files, verified by the service

A version is written to a hidden folder beside its final place and renamed when it is whole and has answered
as the trained model does, so whoever watches `models/` never sees half of one.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib.metadata import version as library_version
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from tensorflow_serving.apis import predict_pb2, prediction_log_pb2

from training.errors import ExportError, RunError
from training.exporter.checksums import write_checksums
from training.exporter.comparison import compare_answers, compare_logits, to_logits
from training.exporter.image_decoding import decode_images
from training.models import compute_logits, fold_model, freeze
from training.preflight import check_model_name
from training.run_dir import RunDir
from training.shell_command import format_command
from training.storage import explain_full_storage
from training.trainer import load_best_model

MAX_VERSION = 2**63 - 1  # an int64 in TensorFlow Serving's protocol
_PROOF_BATCH_SIZES = (1, 3, 64)
_WARMUP_BATCH_SIZES = (1, 8, 64)

_Logits = Callable[[np.ndarray], np.ndarray]  # uint8 (n, height, width, 3) -> float (n, classes)

logger = logging.getLogger(__name__)


def export_run(run: RunDir, *, models_dir: Path, name: str | None = None, mirror: bool = False) -> Path:
    """Export the best checkpoint of a run as the next version of a model.

    Args:
        run: the run.
        models_dir: the folder of all models.
        name: of the model; by default that of the run's dataset.
        mirror: answer with the mean of an image and its mirror image: more accurate, at twice the work.

    Returns:
        The folder of the new version.

    Raises:
        RunError: the run has no checkpoint, or was not evaluated.
        ExportError: the exported model does not answer as the trained one; nothing was published.
    """
    judged = run.read_evaluation()
    view = "mirror" if mirror else "test"
    if view not in judged:
        raise RunError(
            f"{run.path} was not judged with mirror averaging, which fits a temperature of its own: "
            f"{format_command('evaluate', run.path, '--mirror')}"
        )
    model, best = load_best_model(run)
    try:
        evaluated_epoch = judged["best"]["epoch"]
        figures = {
            "test": {"loss": judged[view]["loss"], "accuracy": judged[view]["accuracy"]},
            "temperature": float(judged[view]["temperature"]),
            "calibration": judged[view]["calibration"],
            "uncalibrated_error": judged[view]["uncalibrated"]["expected_calibration_error"],
        }
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(
            f"{run.path / 'evaluation.json'} is not what a run writes ({error!r}). Evaluate the run again: "
            f"{format_command('evaluate', run.path)}"
        ) from error
    if evaluated_epoch != best["epoch"]:
        figures = {"temperature": 1.0}
        logger.warning(
            "evaluation.json is of epoch %s, and the checkpoint of epoch %d: the export has no test figures, and its "
            "confidences are not calibrated. For both: %s, then export again",
            evaluated_epoch,
            best["epoch"],
            format_command("evaluate", run.path),
        )
    summary = run.read_dataset()
    config = run.read_config()
    card = {
        "variant": config.variant,
        "loop": config.loop,
        "preset": config.preset,
        "dtype": config.dtype,
        "conv_activation": config.conv_activation,
        "parameters": model.count_params(),
        "dataset": {
            "name": summary.name,
            "source": summary.source,
            "train_images": summary.train_images,
            "test_images": summary.test_images,
            "content_hash": summary.content_hash,
        },
        "seed": config.seed,
        "epochs": config.epochs,
        "best_epoch": best["epoch"],
        "validation": {"loss": best["val_loss"], "accuracy": best["val_accuracy"]},
        "mirror": mirror,
        **figures,
        "libraries": {library: library_version(library) for library in ("tensorflow", "keras", "numpy")},
    }
    temperature = figures["temperature"]
    logits = _make_logits(model, temperature=temperature, mirror=mirror)
    folded = _average_mirrored(fold_model(model, config, temperature=temperature), mirror=mirror)
    # Probabilities of 0 and 1 would hide a fault of the folding.
    compute = tf.function(folded, reduce_retracing=True)
    for batch_size in _PROOF_BATCH_SIZES:
        images = _example_images(batch_size, summary.input_shape)
        where = f"the folded network, at batch size {batch_size},"
        compare_logits(compute(tf.constant(images)).numpy(), logits(images), where=where)
    return publish_model(
        model,
        folded=with_softmax(folded),
        logits=logits,
        models_dir=models_dir,
        name=name or summary.name,
        class_names=summary.class_names,
        input_shape=summary.input_shape,
        card=card,
    )


def _make_logits(model: keras.Model, *, temperature: float, mirror: bool) -> _Logits:
    """Return the function from images to the logits of a trained model, calibrated."""
    logits = _average_mirrored(lambda images: compute_logits(model, images), mirror=mirror)
    compute = tf.function(logits, reduce_retracing=True)
    return lambda images: compute(tf.constant(images)).numpy().astype(np.float64) / temperature


def _average_mirrored(logits: Callable[[tf.Tensor], tf.Tensor], *, mirror: bool) -> Callable[[tf.Tensor], tf.Tensor]:
    """With `mirror`, return the function from images to the mean of an image's logits and its mirror image's."""
    if not mirror:
        return logits

    def average(images: tf.Tensor) -> tf.Tensor:
        seen, mirrored = tf.split(logits(tf.concat([images, tf.reverse(images, [2])], axis=0)), 2)
        return (seen + mirrored) / 2

    return average


def with_softmax(logits: Callable[[tf.Tensor], tf.Tensor]) -> Callable[[tf.Tensor], tf.Tensor]:
    """Return the function from images to probabilities."""
    return lambda images: tf.nn.softmax(logits(images))


def publish_model(
    model: Callable[[tf.Tensor], tf.Tensor],
    *,
    folded: Callable[[tf.Tensor], tf.Tensor] | None = None,
    logits: _Logits | None = None,
    models_dir: Path,
    name: str,
    class_names: tuple[str, ...],
    input_shape: tuple[int, int, int],
    card: dict[str, Any],
) -> Path:
    """Export any image classifier as the next version of `models_dir/name`.

    Args:
        model: any Keras model, or function: uint8 (n, height, width, 3), raw pixels 0-255, in; probabilities
            float32 (n, classes) out.
        folded: the same without variables, which is what is written; by default `model` with its variables made
            constants.
        logits: what the answers are compared with; by default the logarithms of `model`'s probabilities, which do not
            tell those that are rounded to 0 from each other.
        models_dir: the folder of all models.
        name: of the model: letters, digits, `.`, `_` and `-`.
        class_names: a label for each column of the probabilities.
        input_shape: (height, width, 3).
        card: what else model.json is to say, beside name, version, time, class names and input shape.

    Returns:
        The folder of the new version.

    Raises:
        ExportError: the name cannot be used, or the exported model does not answer as `model` does.
    """
    check_model_name(name)
    full = explain_full_storage(models_dir, "Nothing was published: free some space, then export again")
    with full, _next_version(models_dir / name) as (version, partial):
        answer = folded or freeze(model, input_shape)
        _write_saved_model(answer, partial, class_names=class_names, input_shape=input_shape)
        own = {
            "name": name,
            "version": version,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "class_names": class_names,
            "input_shape": input_shape,
        }
        _write_extras(partial, name=name, input_shape=input_shape, card={**own, **card, **own})
        expected = logits or (lambda images: to_logits(np.asarray(model(tf.constant(images)))))
        _prove(expected, partial, class_names=class_names, input_shape=input_shape)
        write_checksums(partial)
    return models_dir / name / str(version)


def _version_numbers(*names: str) -> list[int]:
    """Return 0 and the version numbers among `names`. A number over MAX_VERSION is not one: the servers ignore it."""
    digits = (name for name in names if name.isascii() and name.isdigit())
    return [0, *(number for number in map(int, digits) if number <= MAX_VERSION)]


@contextlib.contextmanager
def _next_version(folder: Path) -> Iterator[tuple[int, Path]]:
    """Give the next version's number and a hidden folder to write it to; publish it if nothing was raised."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".last_version").open("a+") as counter:
        # One export at a time, so what is hidden here now was left behind by a killed one.
        fcntl.flock(counter, fcntl.LOCK_EX)
        for abandoned in folder.glob(".*.partial"):
            shutil.rmtree(abandoned)
        # The file remembers versions that have been deleted since: numbers are never used again.
        counter.seek(0)
        version = max(_version_numbers(counter.read().strip(), *(path.name for path in folder.iterdir()))) + 1
        if version > MAX_VERSION:
            raise ExportError(
                f"{folder} has version {MAX_VERSION}, the largest possible, so no newer one can be exported: rename "
                "it, or export with another --name"
            )
        partial = folder / f".{version}.partial"
        try:
            yield version, partial
            _sync(partial)
            counter.truncate(0)
            counter.write(f"{version}\n")
            counter.flush()
            os.fsync(counter.fileno())
            partial.rename(folder / str(version))
            _sync_file(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _sync(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        _sync_file(path)


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_saved_model(
    answer: Callable[[tf.Tensor], tf.Tensor],
    folder: Path,
    *,
    class_names: tuple[str, ...],
    input_shape: tuple[int, int, int],
) -> None:
    height, width, channels = input_shape

    def classify(images: tf.Tensor) -> dict[str, tf.Tensor]:
        probabilities = answer(images)
        class_id = tf.argmax(probabilities, axis=1, output_type=tf.int64)
        return {
            "probabilities": tf.identity(probabilities, "probabilities"),
            "class_id": tf.identity(class_id, "class_id"),
            "label": tf.gather(tf.constant(class_names), class_id, name="label"),
        }

    # The shape is checked in the graph before any kernel sees the tensor: TensorFlow's convolutions end the whole
    # process on a wrong rank, and a server does not check what it is sent.
    def serving_default(images: tf.Tensor) -> dict[str, tf.Tensor]:
        return classify(_refuse_empty(tf.ensure_shape(images, (None, *input_shape)), "images"))

    def image_bytes_signature(image_bytes: tf.Tensor) -> dict[str, tf.Tensor]:
        image_bytes = _refuse_empty(tf.ensure_shape(image_bytes, (None,)), "image_bytes")
        return classify(decode_images(image_bytes, height=height, width=width))

    # TensorFlow Serving's API has no other way to tell a client what the columns of the probabilities are.
    def look_up_labels(class_id: tf.Tensor) -> dict[str, tf.Tensor]:
        class_id = _refuse_empty(tf.ensure_shape(class_id, (None,)), "class_id")
        return {"label": tf.gather(tf.constant(class_names), class_id, name="label")}

    signatures = {
        "serving_default": (serving_default, tf.TensorSpec((None, height, width, channels), tf.uint8, "images")),
        "image_bytes": (image_bytes_signature, tf.TensorSpec((None,), tf.string, "image_bytes")),
        "labels": (look_up_labels, tf.TensorSpec((None,), tf.int64, "class_id")),
    }
    tf.saved_model.save(
        tf.Module(),
        str(folder),
        {name: tf.function(function).get_concrete_function(spec) for name, (function, spec) in signatures.items()},
    )


def _refuse_empty(batch: tf.Tensor, name: str) -> tf.Tensor:
    not_empty = tf.debugging.Assert(tf.size(batch) > 0, [f"{name} must hold at least one row; got a batch of 0"])
    with tf.control_dependencies([not_empty]):
        return tf.identity(batch)


def _write_extras(folder: Path, *, name: str, input_shape: tuple[int, int, int], card: dict[str, Any]) -> None:
    extras = folder / "assets.extra"
    extras.mkdir()
    (extras / "model.json").write_text(json.dumps(card, indent=2) + "\n")
    with tf.io.TFRecordWriter(str(extras / "tf_serving_warmup_requests")) as writer:
        for batch_size in _WARMUP_BATCH_SIZES:
            for signature, input_name, batch in _example_inputs(_example_images(batch_size, input_shape)):
                request = predict_pb2.PredictRequest()
                request.model_spec.name = name
                request.model_spec.signature_name = signature
                request.inputs[input_name].CopyFrom(tf.make_tensor_proto(batch))
                log = prediction_log_pb2.PredictionLog(predict_log=prediction_log_pb2.PredictLog(request=request))
                writer.write(log.SerializeToString())


def _example_images(batch_size: int, input_shape: tuple[int, int, int]) -> np.ndarray:
    return np.random.default_rng(batch_size).integers(0, 256, (batch_size, *input_shape), dtype=np.uint8)


def _example_inputs(images: np.ndarray) -> list[tuple[str, str, np.ndarray]]:
    """Return the same images as (signature, input name, batch) for both signatures."""
    encoded = np.array([tf.io.encode_png(image).numpy() for image in images], object)
    return [("serving_default", "images", images), ("image_bytes", "image_bytes", encoded)]


def _prove(
    logits: _Logits,
    folder: Path,
    *,
    class_names: tuple[str, ...],
    input_shape: tuple[int, int, int],
) -> None:
    """Load the export in both ways that servers do, and compare its answers with the trained model's logits.

    `tf.saved_model.load` alone does not tell: it binds an export's variables by objects, a server in C++ by names,
    and an export was seen that answered in Python only.
    """
    cases = [
        (batch_size, signature, input_name, batch, expected)
        for batch_size in _PROOF_BATCH_SIZES
        for images in [_example_images(batch_size, input_shape)]
        for expected in [logits(images)]
        for signature, input_name, batch in _example_inputs(images)
    ]
    for way, answers in (
        ("tf.saved_model.load", _ask_loaded(folder, cases)),
        ("a Session", _ask_session(folder, cases)),
    ):
        for (batch_size, signature, _, _, expected), answer in zip(cases, answers, strict=True):
            where = f"the exported signature {signature}, loaded by {way}, at batch size {batch_size}"
            if isinstance(answer, Exception):
                raise ExportError(f"{where} fails: {str(answer).splitlines()[0]}") from answer
            compare_answers(answer, expected, class_names, where=where)
    _prove_labels(folder, class_names)


_Case = tuple[int, str, str, np.ndarray, np.ndarray]  # batch size, signature, input name, batch, expected


def _ask_loaded(folder: Path, cases: list[_Case]) -> Iterator[dict[str, np.ndarray] | Exception]:
    signatures = tf.saved_model.load(str(folder)).signatures
    for _, signature, input_name, batch, _ in cases:
        try:
            outputs = signatures[signature](**{input_name: tf.constant(batch)})
            yield {name: output.numpy() for name, output in outputs.items()}
        except tf.errors.OpError as error:
            yield error


def _ask_session(folder: Path, cases: list[_Case]) -> Iterator[dict[str, np.ndarray] | Exception]:
    _start_sessions()
    graph = tf.Graph()
    with tf.compat.v1.Session(graph=graph) as session:
        with graph.as_default():
            meta_graph = tf.compat.v1.saved_model.load(session, ["serve"], str(folder))
        for _, signature, input_name, batch, _ in cases:
            definition = meta_graph.signature_def[signature]
            fetches = {name: output.name for name, output in definition.outputs.items()}
            try:
                yield session.run(fetches, {definition.inputs[input_name].name: batch})
            except tf.errors.OpError as error:
                yield error


@functools.cache
def _start_sessions() -> None:
    """Make the process's first session where nobody hears it.

    It writes to the process's error output that an optimization is off, whatever the log level.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        with tf.Graph().as_default(), tf.compat.v1.Session() as session:
            session.run(tf.constant(0))
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _prove_labels(folder: Path, class_names: tuple[str, ...]) -> None:
    """Check that the signature `labels` names every class, loaded by tf.saved_model.load and in a Session."""
    ids = np.arange(len(class_names))
    case = (len(ids), "labels", "class_id", ids, ids)
    for answers in (_ask_loaded(folder, [case]), _ask_session(folder, [case])):
        for answer in answers:
            if isinstance(answer, Exception):
                raise ExportError(f"the exported signature labels fails: {answer}") from answer
            if [label.decode() for label in answer["label"].tolist()] != list(class_names):
                raise ExportError(f"the exported signature labels gives {answer['label']}, not {class_names}")
