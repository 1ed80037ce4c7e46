"""`make bench-exported`: exported models beside the same networks saved as they are, with 1, 8 and 64 images a call.

Weights are drawn at random: speed does not depend on them. The calls alternate, in one process, as a server makes them.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")

import click
import keras
import numpy as np
import tensorflow as tf

from serving.inference.saved_model import SavedModelPredictor
from training.config import TrainingConfig
from training.exporter.publish import publish_model
from training.models import RECIPES, build_model
from training.models.folding import compute_logits

SHAPE, CLASSES = (32, 32, 3), tuple("abcdefghij")
BATCHES = (1, 8, 64)
Call = Callable[[np.ndarray], object]


def draw_network(variant: str) -> keras.Model:
    """Build a network with random weights."""
    model = build_model(variant, SHAPE, classes=len(CLASSES))
    rng = np.random.default_rng(0)
    for weight in model.trainable_weights:
        if len(weight.shape) == 1:
            weight.assign(rng.normal(0, 0.1, weight.shape))  # biases of zeros would be optimized away
    if hasattr(model, "adapt"):
        images = rng.integers(0, 256, (64, *SHAPE), np.uint8)
        model.adapt(images)
        for _ in range(10):
            model(images, training=True)  # gives the batch norms means and variances
    return model


def publish(model: keras.Model, variant: str, folder: Path, *, name: str) -> Path:
    """Export a network without training it."""
    return publish_model(
        RECIPES[variant].fold(model, TrainingConfig.fill_in(variant=variant), temperature=1.0),
        lambda images: compute_logits(model, tf.constant(images)).numpy(),
        models_dir=folder,
        name=name,
        class_names=CLASSES,
        input_shape=SHAPE,
        metadata={},
    )


def export(variant: str, folder: Path) -> dict[str, Call]:
    """Save a network in both ways; return how to call each."""
    model = draw_network(variant)
    exported = publish(model, variant, folder, name=variant)
    plain = folder / f"{variant}-plain"
    model.export(plain, verbose=False, input_signature=[tf.TensorSpec((None, *SHAPE), tf.uint8, "images")])
    calls = {}
    for name, path in (("exported", exported), ("plain", plain)):
        predictor = SavedModelPredictor(path)
        (input_name,) = predictor.signatures["serving_default"].inputs
        calls[f"{variant}, {name}"] = _bind(predictor, input_name)
    return calls


def _bind(predictor: SavedModelPredictor, input_name: str) -> Call:
    return lambda images: predictor.predict("serving_default", {input_name: images})


@click.command(context_settings={"show_default": True})
@click.option("--rounds", type=click.IntRange(1), default=15, help="Alternating; the median counts.")
@click.option("--output", type=click.Path(path_type=Path), default=Path("benchmarks/results/exported.json"))
def main(rounds: int, output: Path) -> None:
    """Print milliseconds a call, and the ratio to the article's network saved as it is."""
    times: dict[str, dict[int, list[float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        calls = {**export("sequential", Path(name)), **export("airbench", Path(name))}
        for batch in BATCHES:
            images = np.random.default_rng(0).integers(0, 256, (batch, *SHAPE), np.uint8)
            for call in calls.values():
                call(images)
            for _ in range(rounds):
                for what, call in calls.items():
                    started_s = time.perf_counter()
                    repeats = max(1, 200 // batch)
                    for _ in range(repeats):
                        call(images)
                    milliseconds = (time.perf_counter() - started_s) / repeats * 1e3
                    times.setdefault(what, {}).setdefault(batch, []).append(milliseconds)
    medians = {what: {batch: statistics.median(values) for batch, values in of.items()} for what, of in times.items()}
    print("| model | " + " | ".join(f"{batch} image{'s' * (batch > 1)}, ms | ratio" for batch in BATCHES) + " |")
    print("|---|" + "---:|" * 2 * len(BATCHES))
    for what, of in medians.items():
        cells = [f"{of[batch]:.2f} | {of[batch] / medians['sequential, plain'][batch]:.2f}" for batch in BATCHES]
        print(f"| {what} | {' | '.join(cells)} |")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({"milliseconds": medians}, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
