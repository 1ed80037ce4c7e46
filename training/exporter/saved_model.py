"""Writes a SavedModel with its signatures, metadata and warm-up requests.

saved_model.pb  variables/  fingerprint.pb
assets.extra/model.json                    metadata of the model
assets.extra/tf_serving_warmup_requests    replayed by a server when it loads the model
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow_serving.apis import predict_pb2, prediction_log_pb2

from training.exporter.image_decoding import decode_images
from training.models.guard import Guard
from training.models.inference_graph import InferenceGraph

_WARMUP_BATCH_SIZES = (1, 8, 64)


def write_saved_model(
    graph: InferenceGraph,
    folder: Path,
    *,
    class_names: tuple[str, ...],
    input_shape: tuple[int, int, int],
    guard: Guard | None = None,
) -> None:
    """Write a SavedModel with the signatures `serving_default`, `image_bytes` and `labels`.

    With a guard, `guarded` and `guarded_bytes` have the same inputs and outputs as the first two, and the guard's.

    Args:
        graph: the classifier.
        folder: of the SavedModel.
        class_names: a label for each class.
        input_shape: (height, width, 3).
        guard: of the classifier, fitted on its data.
    """
    height, width, channels = input_shape

    def classify(images: tf.Tensor, guard: Guard | None = None) -> dict[str, tf.Tensor]:
        features = graph.features(images)
        logits = graph.head(features)
        outputs = tf.nn.softmax(logits)
        class_id = tf.argmax(outputs, axis=1, output_type=tf.int64)
        return {
            "probabilities": tf.identity(outputs, "probabilities"),
            "class_id": tf.identity(class_id, "class_id"),
            "label": tf.gather(tf.constant(class_names), class_id, name="label"),
            **(guard.outputs(features, logits, outputs) if guard else {}),
        }

    # Shapes are checked in the graph: a server does not check them, and a wrong rank makes TensorFlow's convolution
    # kernels abort the process.
    def of_pixels(guard: Guard | None) -> Callable[[tf.Tensor], dict[str, tf.Tensor]]:
        return lambda images: classify(_reject_empty(tf.ensure_shape(images, (None, *input_shape)), "images"), guard)

    def of_files(guard: Guard | None) -> Callable[[tf.Tensor], dict[str, tf.Tensor]]:
        def signature(image_bytes: tf.Tensor) -> dict[str, tf.Tensor]:
            image_bytes = _reject_empty(tf.ensure_shape(image_bytes, (None,)), "image_bytes")
            return classify(decode_images(image_bytes, height=height, width=width), guard)

        return signature

    # TensorFlow Serving's API has no other way to tell a client the class names.
    def look_up_labels(class_id: tf.Tensor) -> dict[str, tf.Tensor]:
        class_id = _reject_empty(tf.ensure_shape(class_id, (None,)), "class_id")
        return {"label": tf.gather(tf.constant(class_names), class_id, name="label")}

    pixels = tf.TensorSpec((None, height, width, channels), tf.uint8, "images")
    files = tf.TensorSpec((None,), tf.string, "image_bytes")
    signatures = {
        "serving_default": (of_pixels(None), pixels),
        "image_bytes": (of_files(None), files),
        "labels": (look_up_labels, tf.TensorSpec((None,), tf.int64, "class_id")),
    }
    if guard:
        signatures |= {"guarded": (of_pixels(guard), pixels), "guarded_bytes": (of_files(guard), files)}
    tf.saved_model.save(
        tf.Module(),
        str(folder),
        {name: tf.function(function).get_concrete_function(spec) for name, (function, spec) in signatures.items()},
    )


def write_extra_assets(
    folder: Path, *, name: str, input_shape: tuple[int, int, int], metadata: dict[str, Any], guarded: bool = False
) -> None:
    """Write `model.json` and the warm-up requests into a SavedModel's folder; `guarded` if it has those signatures."""
    assets = folder / "assets.extra"
    assets.mkdir()
    (assets / "model.json").write_text(json.dumps(metadata, indent=2) + "\n")
    with tf.io.TFRecordWriter(str(assets / "tf_serving_warmup_requests")) as writer:
        for batch_size in _WARMUP_BATCH_SIZES:
            for signature, input_name, batch in example_inputs(
                example_images(batch_size, input_shape), guarded=guarded
            ):
                request = predict_pb2.PredictRequest()
                request.model_spec.name = name
                request.model_spec.signature_name = signature
                request.inputs[input_name].CopyFrom(tf.make_tensor_proto(batch))
                log = prediction_log_pb2.PredictionLog(predict_log=prediction_log_pb2.PredictLog(request=request))
                writer.write(log.SerializeToString())


def example_images(batch_size: int, input_shape: tuple[int, int, int]) -> np.ndarray:
    """Return images of noise, uint8 (batch_size, height, width, 3); the same for each batch size."""
    return np.random.default_rng(batch_size).integers(0, 256, (batch_size, *input_shape), dtype=np.uint8)


def example_inputs(images: np.ndarray, *, guarded: bool = False) -> list[tuple[str, str, np.ndarray]]:
    """Return the same images as (signature, input name, batch) for all image signatures; the guarded ones last."""
    encoded = np.array([tf.io.encode_png(image).numpy() for image in images], object)
    plain = [("serving_default", "images", images), ("image_bytes", "image_bytes", encoded)]
    return plain + ([("guarded", *plain[0][1:]), ("guarded_bytes", *plain[1][1:])] if guarded else [])


def _reject_empty(batch: tf.Tensor, name: str) -> tf.Tensor:
    not_empty = tf.debugging.Assert(tf.size(batch) > 0, [f"{name} must hold at least one row; got a batch of 0"])
    with tf.control_dependencies([not_empty]):
        return tf.identity(batch)
