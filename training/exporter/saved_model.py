"""Writes a SavedModel with its signatures, metadata and warm-up requests.

saved_model.pb  variables/  fingerprint.pb
assets.extra/model.json                    metadata of the model
assets.extra/tf_serving_warmup_requests    replayed by a server when it loads the model
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow_serving.apis import predict_pb2, prediction_log_pb2

from training.exporter.grad_cam import explain as compute_heat_maps
from training.exporter.image_decoding import decode_images
from training.exporter.signatures import output_names
from training.models.guard import Guard
from training.models.inference_graph import InferenceGraph

# TensorFlow optimizes a graph at its first call; other batch sizes warm up what most clients use.
_WARMUP_BATCH_SIZES = dict.fromkeys(("serving_default", "image_bytes", "guarded", "guarded_bytes"), (1, 8, 64)) | {
    "probabilities": (1,),
    "explain": (1,),
}

_Signature = Callable[[tf.Tensor], dict[str, tf.Tensor]]


def write_saved_model(
    graph: InferenceGraph,
    folder: Path,
    *,
    class_names: tuple[str, ...],
    input_shape: tuple[int, int, int],
    default_outputs: str = "all",
    explain: bool = False,
    guard: Guard | None = None,
) -> None:
    """Write a SavedModel with the signatures `serving_default`, `image_bytes`, `probabilities` and `labels`.

    With a guard, `guarded` and `guarded_bytes` have the same inputs and outputs as the first two, and the guard's.

    Args:
        graph: the classifier.
        folder: of the SavedModel.
        class_names: a label for each class.
        input_shape: (height, width, 3).
        default_outputs: what `serving_default` returns; see `DEFAULT_OUTPUTS`.
        explain: write the signature `explain` too.
        guard: of the classifier, fitted on its data.
    """
    height, width, _ = input_shape
    outputs = output_names(default_outputs=default_outputs, explain=explain, guarded=guard is not None)
    images_spec = tf.TensorSpec((None, *input_shape), tf.uint8, "images")
    # Traced once and called by all signatures, so the file has the weights once. A session inlines the calls.
    shared = InferenceGraph(tf.function(graph.features, input_signature=[images_spec]), tf.function(graph.head))

    def classify(images: tf.Tensor, names: tuple[str, ...]) -> dict[str, tf.Tensor]:
        features = shared.features(images)
        logits = shared.head(features)
        probabilities = tf.nn.softmax(logits)
        class_id = tf.argmax(probabilities, axis=1, output_type=tf.int64)
        label = tf.gather(tf.constant(class_names), class_id)
        computed = {"probabilities": probabilities, "class_id": class_id, "label": label}
        if guard and "typicality" in names:
            computed |= guard.outputs(features, logits, probabilities)
        return {name: tf.identity(computed[name], name) for name in names}

    # Shapes are checked in the graph: a server does not check them, and a wrong rank makes TensorFlow's convolution
    # kernels abort the process.
    def check(images: tf.Tensor) -> tf.Tensor:
        return _reject_empty(tf.ensure_shape(images, (None, *input_shape)), "images")

    def of_pixels(name: str) -> _Signature:
        return lambda images: classify(check(images), outputs[name])

    def of_files(name: str) -> _Signature:
        def signature(image_bytes: tf.Tensor) -> dict[str, tf.Tensor]:
            image_bytes = _reject_empty(tf.ensure_shape(image_bytes, (None,)), "image_bytes")
            return classify(decode_images(image_bytes, height=height, width=width), outputs[name])

        return signature

    def explain_signature(images: tf.Tensor) -> dict[str, tf.Tensor]:
        return compute_heat_maps(shared, check(images))

    # TensorFlow Serving's API has no other way to tell a client the class names.
    def look_up_labels(class_id: tf.Tensor) -> dict[str, tf.Tensor]:
        class_id = _reject_empty(tf.ensure_shape(class_id, (None,)), "class_id")
        return {"label": tf.gather(tf.constant(class_names), class_id, name="label")}

    files_spec = tf.TensorSpec((None,), tf.string, "image_bytes")
    # A single output: the rows of TensorFlow Serving's REST API are then plain lists, which many clients expect.
    signatures = {
        "serving_default": (of_pixels("serving_default"), images_spec),
        "image_bytes": (of_files("image_bytes"), files_spec),
        "probabilities": (of_pixels("probabilities"), images_spec),
        "labels": (look_up_labels, tf.TensorSpec((None,), tf.int64, "class_id")),
    }
    if explain:
        signatures["explain"] = (explain_signature, images_spec)
    if guard:
        signatures |= {
            "guarded": (of_pixels("guarded"), images_spec),
            "guarded_bytes": (of_files("guarded_bytes"), files_spec),
        }
    tf.saved_model.save(
        tf.Module(),
        str(folder),
        {name: tf.function(function).get_concrete_function(spec) for name, (function, spec) in signatures.items()},
    )


def write_extra_assets(
    folder: Path,
    *,
    name: str,
    input_shape: tuple[int, int, int],
    metadata: dict[str, Any],
    signatures: Collection[str],
) -> None:
    """Write `model.json` and the warm-up requests of these signatures into a SavedModel's folder."""
    assets = folder / "assets.extra"
    assets.mkdir()
    (assets / "model.json").write_text(json.dumps(metadata, indent=2) + "\n")
    with tf.io.TFRecordWriter(str(assets / "tf_serving_warmup_requests")) as writer:
        for batch_size in _WARMUP_BATCH_SIZES["serving_default"]:
            warmed = [signature for signature in signatures if batch_size in _WARMUP_BATCH_SIZES[signature]]
            for signature, input_name, batch in example_inputs(example_images(batch_size, input_shape), warmed):
                request = predict_pb2.PredictRequest()
                request.model_spec.name = name
                request.model_spec.signature_name = signature
                request.inputs[input_name].CopyFrom(tf.make_tensor_proto(batch))
                log = prediction_log_pb2.PredictionLog(predict_log=prediction_log_pb2.PredictLog(request=request))
                writer.write(log.SerializeToString())


def example_images(batch_size: int, input_shape: tuple[int, int, int]) -> np.ndarray:
    """Return images of noise, uint8 (batch_size, height, width, 3); the same for each batch size."""
    return np.random.default_rng(batch_size).integers(0, 256, (batch_size, *input_shape), dtype=np.uint8)


def example_inputs(images: np.ndarray, signatures: Collection[str]) -> list[tuple[str, str, np.ndarray]]:
    """Return the same images as (signature, input name, batch) for each of these signatures."""
    encoded = np.array([tf.io.encode_png(image).numpy() for image in images], object)
    takes_files = {"image_bytes", "guarded_bytes"}
    return [
        (signature, "image_bytes", encoded) if signature in takes_files else (signature, "images", images)
        for signature in signatures
    ]


def _reject_empty(batch: tf.Tensor, name: str) -> tf.Tensor:
    not_empty = tf.debugging.Assert(tf.size(batch) > 0, [f"{name} must hold at least one row; got a batch of 0"])
    with tf.control_dependencies([not_empty]):
        return tf.identity(batch)
