"""Grad-CAM: which regions of an image raise the logit of the predicted class.

Selvaraju et al. 2017, "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization". The gradient
is part of the exported graph, so every server of SavedModels computes heat maps.
"""

from __future__ import annotations

import tensorflow as tf

from training.errors import ExportError
from training.models.inference_graph import InferenceGraph

# Where channels for and against the class cancel out to less than this fraction of them, the rest is rounding.
SMALLEST_EVIDENCE = 1e-3


def explain(graph: InferenceGraph, images: tf.Tensor) -> dict[str, tf.Tensor]:
    """Return heat maps of the predicted classes. Call it within a `tf.function`.

    Each channel of the last feature map is weighted by the mean gradient of the logit over its pixels. The positive
    part of the weighted sum is resized to the image and divided by its maximum.

    Args:
        graph: a classifier whose features are a map.
        images: uint8 (n, height, width, 3).

    Returns:
        `heat_map` float32 (n, height, width), from 0 to 1; 0 everywhere if no region raises the logit. `class_id` int64
        (n,), the predicted classes.

    Raises:
        ExportError: the features are not a map of several pixels, or the head cannot be differentiated.
    """
    features = graph.features(images)
    _check_map(features)
    # Not `tf.gradients`, which leaves a gradient of the features in the graph that TensorFlow cannot optimize.
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(features)
        logits = graph.head(features)
        # Of the probabilities, like the signatures that classify: rounding may leave equal ones of different logits.
        class_id = tf.argmax(tf.nn.softmax(logits), axis=1, output_type=tf.int64)
        scores = tf.gather(logits, class_id, batch_dims=1)
    gradients = _differentiate(tape, scores, features)
    evidence = tf.reduce_mean(gradients, axis=(1, 2), keepdims=True) * features
    heat = tf.image.resize(tf.nn.relu(tf.reduce_sum(evidence, axis=3, keepdims=True)), images.shape[1:3])
    largest = tf.reduce_max(heat, axis=(1, 2, 3), keepdims=True)
    both_ways = tf.reduce_max(tf.reduce_sum(tf.abs(evidence), axis=3, keepdims=True), axis=(1, 2, 3), keepdims=True)
    heat = tf.where(largest > SMALLEST_EVIDENCE * both_ways, heat / largest, 0)
    return {"heat_map": tf.squeeze(heat, axis=3, name="heat_map"), "class_id": tf.identity(class_id, "class_id")}


def check_explainable(graph: InferenceGraph, *, input_shape: tuple[int, int, int]) -> None:
    """Check that heat maps of a classifier can be computed.

    Raises:
        ExportError: as for `explain`.
    """
    traced = tf.function(lambda images: explain(graph, images), autograph=False)  # autograph would change the error
    traced.get_concrete_function(tf.TensorSpec((None, *input_shape), tf.uint8))


def _check_map(features: tf.Tensor) -> None:
    if features.shape.rank != 4:
        raise ExportError(
            "heat maps need a feature map (n, rows, columns, channels) before the head; this model's features are "
            f"{_describe(features.shape)}. Leave out --explain"
        )
    if features.shape[1:3] == (1, 1):
        raise ExportError(
            "heat maps need a feature map of several pixels; this model's has one, so its heat maps would be uniform. "
            "Use larger images (--image-size), or leave out --explain"
        )


def _differentiate(tape: tf.GradientTape, scores: tf.Tensor, features: tf.Tensor) -> tf.Tensor:
    try:
        gradients = tape.gradient(scores, features)
    except LookupError as error:
        raise ExportError(
            f"heat maps need the gradient of the head, and one of its operations has none ({error}). "
            "Leave out --explain"
        ) from error
    if gradients is None:
        raise ExportError(
            "heat maps need the gradient of the head, but its logits do not depend on the features through "
            "differentiable operations. Leave out --explain"
        )
    return gradients


def _describe(shape: tf.TensorShape) -> str:
    if shape.rank is None:
        return "of unknown rank"
    return f"({', '.join(['n', *(str(size or '?') for size in shape[1:])])})"
