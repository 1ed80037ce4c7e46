"""`make bench-runtimes`: exported models in TensorFlow, ONNX Runtime and LiteRT, with 1 and 64 images a call.

Each has one thread, as in the service. Weights are drawn at random: speed does not depend on them. The calls alternate.
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
import numpy as np
import onnxruntime
import tensorflow as tf
from ai_edge_litert.interpreter import Interpreter

from benchmarks.exported import SHAPE, draw_network, publish
from serving.inference.saved_model import SavedModelPredictor
from training.converter.convert import convert_model

BATCHES = (1, 64)
SECONDS = 0.5  # of one measurement
Call = Callable[[np.ndarray], object]


def load(variant: str, folder: Path) -> dict[str, Call]:
    """Export and convert a network; return how to call it in each runtime."""
    version = publish(draw_network(variant), variant, folder, name=variant)
    predictor = SavedModelPredictor(version)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(convert_model(version, to="onnx")), options)
    runner = Interpreter(str(convert_model(version, to="litert")), num_threads=1).get_signature_runner()
    return {
        "SavedModel, TensorFlow": lambda images: predictor.predict("serving_default", {"images": images}),
        "ONNX Runtime": lambda images: session.run(["probabilities", "class_id"], {"images": images}),
        "LiteRT": lambda images: runner(images=images),
    }


def measure(call: Call, images: np.ndarray) -> float:
    """Return images/s."""
    count, started_s = 0, time.perf_counter()
    while (passed_s := time.perf_counter() - started_s) < SECONDS:
        call(images)
        count += len(images)
    return count / passed_s


@click.command(context_settings={"show_default": True})
@click.option("--rounds", type=click.IntRange(1), default=15, help="Alternating; the median counts.")
@click.option("--output", type=click.Path(path_type=Path), default=Path("benchmarks/results/runtimes.json"))
def main(rounds: int, output: Path) -> None:
    """Print images/s, and the ratio to the SavedModel in the same round."""
    tf.config.threading.set_intra_op_parallelism_threads(1)
    results: dict[str, dict[str, dict[str, float]]] = {}
    print("| network | runtime | " + " | ".join(f"{batch} a call, images/s | ratio" for batch in BATCHES) + " |")
    print("|---|---|" + "---:|" * 2 * len(BATCHES))
    with tempfile.TemporaryDirectory() as name:
        for variant in ("sequential", "airbench"):
            calls = load(variant, Path(name))
            cells: dict[str, list[str]] = {runtime: [] for runtime in calls}
            for batch in BATCHES:
                images = np.random.default_rng(0).integers(0, 256, (batch, *SHAPE), np.uint8)
                for call in calls.values():
                    call(images)
                rates = [[measure(call, images) for call in calls.values()] for _ in range(rounds)]
                for number, runtime in enumerate(calls):
                    rate = statistics.median(of[number] for of in rates)
                    ratio = statistics.median(of[number] / of[0] for of in rates)
                    cells[runtime].append(f"{rate:,.0f} | {ratio:.2f}")
                    results.setdefault(variant, {}).setdefault(runtime, {})[f"batch {batch}"] = rate
            for runtime, of in cells.items():
                print(f"| {variant} | {runtime} | {' | '.join(of)} |")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({"images_per_s": results}, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
