"""Fits and evaluates the guard of a classifier: see `training.models.guard`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from training.data import Split
from training.data.outliers import draw_outliers
from training.data.streamed_images import Images, read_batches
from training.evaluation.conformal import evaluate_sets, fit_set_threshold
from training.evaluation.guard_evaluation import GuardEvaluation
from training.evaluation.reference import Reference, summarize_predictions
from training.models.guard import LEVELS, MIN_TYPICALITY, Guard, measure_energy, measure_variation
from training.models.inference_graph import InferenceGraph, TensorFunction

MAX_OUTLIERS = 200  # of each kind
_EXAMPLES = 8
_BATCH_SIZE = 250
_MIN_DEVIATION = 1e-4  # of a measure; one that varies less is constant but for rounding


def fit_guard(graph: InferenceGraph, held_out: Split) -> Guard:
    """Fit the guard of a classifier.

    Args:
        graph: the classifier as it is exported, calibrated.
        held_out: labelled images that it was not trained on, at least one.
    """
    measured = measure_images(graph, held_out.images)
    means, deviations = ([float(of(measured[name])) for name in ("energy", "variation")] for of in (np.mean, np.std))
    weights = [1 / deviation if deviation > _MIN_DEVIATION else 0.0 for deviation in deviations]
    scores = weights[0] * (measured["energy"] - means[0]) + weights[1] * (measured["variation"] - means[1])
    # Evenly spread from the least to the most typical.
    ranks = np.linspace(0, len(scores) - 1, min(_EXAMPLES, len(scores))).round().astype(int)
    examples = held_out.images[np.argsort(scores, kind="stable")[ranks]]
    constants: dict[str, Any] = {
        "energy_mean": means[0],
        "energy_weight": weights[0],
        "variation_mean": means[1],
        "variation_weight": weights[1],
        "scores": np.quantile(scores, LEVELS).astype(np.float32),
        "set_threshold": fit_set_threshold(measured["probabilities"], held_out.labels),
        "examples": examples,
    }
    unverified = Guard(**constants, example_typicality=np.zeros(len(examples), np.float32))
    return Guard(
        **constants, example_typicality=_compute(_make_function(graph, unverified.outputs), examples)["typicality"]
    )


def evaluate_guard(graph: InferenceGraph, guard: Guard, test: Split, *, dataset_name: str) -> GuardEvaluation:
    """Measure coverage and size of the prediction sets on test images, and how well drawn images are told from them.

    Args:
        graph: the classifier that the guard was fitted for.
        guard: its guard.
        test: labelled images.
        dataset_name: drawn shapes are no outliers for "shapes".
    """
    height, width = test.images.shape[1:3]
    outliers = draw_outliers(min(MAX_OUTLIERS, len(test.labels)), height=height, width=width)
    outliers.pop(dataset_name, None)
    function = _make_function(graph, guard.outputs)
    outputs = _compute(function, test.images)
    return GuardEvaluation(
        typicality=outputs["typicality"],
        outliers={name: _compute(function, images)["typicality"] for name, images in outliers.items()},
        threshold=MIN_TYPICALITY,
        sets=evaluate_sets(outputs["probabilities"], test.labels, threshold=guard.set_threshold),
    )


def measure_reference(graph: InferenceGraph, guard: Guard, held_out: Split) -> Reference:
    """Summarize the predictions of a classifier on the images that its guard was fitted on."""
    outputs = _compute(_make_function(graph, guard.outputs), held_out.images)
    return summarize_predictions(outputs["probabilities"], outputs["typicality"])


def measure_images(graph: InferenceGraph, images: Images) -> dict[str, np.ndarray]:
    """Return `probabilities` float32 (n, classes), `energy` and `variation` float32 (n,) of images."""
    return _compute(_make_function(graph, _measure), images)


def compute_typicality(graph: InferenceGraph, guard: Guard, images: np.ndarray) -> np.ndarray:
    """Return the typicality, float32 (n,), of images uint8 (n, height, width, 3)."""
    return _compute(_make_function(graph, guard.outputs), images)["typicality"]


def _measure(features: tf.Tensor, logits: tf.Tensor, probabilities: tf.Tensor) -> dict[str, tf.Tensor]:
    return {"energy": measure_energy(logits, probabilities), "variation": measure_variation(features)}


def _make_function(graph: InferenceGraph, outputs: Callable[..., dict[str, tf.Tensor]]) -> TensorFunction:
    """Return a function from images to their probabilities and these outputs of one forward pass."""

    def function(images: tf.Tensor) -> dict[str, tf.Tensor]:
        features = graph.features(images)
        logits = graph.head(features)
        probabilities = tf.nn.softmax(logits)
        return {"probabilities": probabilities, **outputs(features, logits, probabilities)}

    made: TensorFunction = tf.function(function, reduce_retracing=True)
    return made


def _compute(function: TensorFunction, images: Images) -> dict[str, np.ndarray]:
    batches = [function(tf.constant(batch)) for batch in read_batches(images, _BATCH_SIZE)]
    return {name: np.concatenate([batch[name].numpy() for batch in batches]) for name in batches[0]}
