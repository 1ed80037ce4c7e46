"""`make bench-typicality RUN=runs/...`: how well a run's export tells outliers, and what its guarded signature costs.

The outliers are drawn, a thousand of each kind, and crops of the sample photograph that comes with matplotlib. Nothing
is fitted on them. The signatures are called alternately, in one process, as a server calls them.
"""

from __future__ import annotations

import json
import logging
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")

import click
import numpy as np
from matplotlib import get_data_path
from PIL import Image

from serving.inference.saved_model import SavedModelPredictor
from training.data import Split, load_dataset
from training.data.outliers import draw_outliers
from training.evaluation.conformal import evaluate_sets
from training.evaluation.roc import area_under_roc
from training.evaluation.typicality import compute_typicality, measure_images
from training.exporter.publish import export_run
from training.models.guard import Guard
from training.models.inference_graph import InferenceGraph
from training.run_dir import RunDir
from training.trainer import load_best_model

OUTLIERS = 1000  # of each kind
BATCHES = (1, 64)
PHOTOGRAPH = Path(get_data_path(), "sample_data", "grace_hopper.jpg")


def crop_photograph(count: int, *, height: int, width: int) -> np.ndarray:
    """Return random parts of the photograph, at different scales."""
    rng = np.random.default_rng(0)
    with Image.open(PHOTOGRAPH) as file:
        photograph = file.convert("RGB")
    crops = []
    for _ in range(count):
        tall = rng.uniform(0.2, 1) * min(photograph.height, photograph.width * height / width)
        wide = tall * width / height
        left, top = rng.uniform(0, photograph.width - wide), rng.uniform(0, photograph.height - tall)
        box = (left, top, left + wide, top + tall)
        crops.append(np.asarray(photograph.resize((width, height), Image.Resampling.BILINEAR, box)))
    return np.stack(crops)


def measure_scores(graph: InferenceGraph, guard: Guard, images: np.ndarray) -> dict[str, np.ndarray]:
    measured = measure_images(graph, images)
    return {
        "max. softmax": measured["probabilities"].max(axis=1),
        "energy": measured["energy"],
        "variation": measured["variation"],
        "typicality": compute_typicality(graph, guard, images),
    }


def measure_areas(graph: InferenceGraph, guard: Guard, test: Split) -> dict[str, dict[str, float]]:
    """Return the AUROC of each score, by set of outliers."""
    height, width = test.images.shape[1:3]
    sets = draw_outliers(OUTLIERS, height=height, width=width)
    drawn = len(sets)
    sets["parts of a photograph"] = crop_photograph(OUTLIERS, height=height, width=width)
    of_test = measure_scores(graph, guard, test.images)
    areas = {}
    for name, images in sets.items():
        scores = measure_scores(graph, guard, images)
        areas[name] = {score: area_under_roc(of_test[score], values) for score, values in scores.items()}
    of_drawn = list(areas.values())[:drawn]
    areas["mean of the drawn"] = {score: statistics.mean(of[score] for of in of_drawn) for score in of_test}
    return areas


def measure_cost(run: RunDir, images: np.ndarray, *, rounds: int) -> dict[int, dict[str, float]]:
    """Return the milliseconds of a call of both signatures, medians, by batch size."""
    costs = {}
    with tempfile.TemporaryDirectory() as folder:
        predictor = SavedModelPredictor(export_run(run, models_dir=Path(folder)))
        for batch in BATCHES:
            times: dict[str, list[float]] = {"serving_default": [], "guarded": []}
            for turn in range(rounds + 1):
                for signature, values in times.items():
                    started_s = time.perf_counter()
                    repeats = max(1, 200 // batch)
                    for _ in range(repeats):
                        predictor.predict(signature, {"images": images[:batch]})
                    if turn:  # the first warms up
                        values.append((time.perf_counter() - started_s) / repeats * 1e3)
            ratios = [b / a for a, b in zip(*times.values(), strict=True)]
            costs[batch] = {
                **{name: statistics.median(values) for name, values in times.items()},
                "ratio": statistics.median(ratios),
            }
    return costs


@click.command(context_settings={"show_default": True})
@click.argument("run_path", metavar="RUN", type=click.Path(path_type=Path, file_okay=False))
@click.option("--rounds", type=click.IntRange(1), default=25, help="Alternating; the median counts.")
@click.option("--output", type=click.Path(path_type=Path), default=Path("benchmarks/results/typicality.json"))
def main(run_path: Path, *, rounds: int, output: Path) -> None:
    """Print AUROC, coverage and cost of an evaluated RUN."""
    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    run = RunDir.open(run_path)
    config = run.read_config()
    dataset = load_dataset(config)
    best = load_best_model(run, config)
    graph = config.recipe.fold(best.model, config, temperature=run.read_evaluation()["test"]["temperature"])
    guard = Guard.load(run.guard_path(mirror=False))
    areas = measure_areas(graph, guard, dataset.test)
    probabilities = measure_images(graph, dataset.test.images)["probabilities"]
    sets = evaluate_sets(probabilities, dataset.test.labels, threshold=guard.set_threshold)
    costs = measure_cost(run, dataset.test.images, rounds=rounds)
    names = list(next(iter(areas.values())))
    print(f"| AUROC | {' | '.join(names)} |\n|---|{'---:|' * len(names)}")
    for name, of in areas.items():
        print(f"| {name} | {' | '.join(f'{of[score]:.3f}' for score in names)} |")
    sizes = ", ".join(f"{share:.1%} of {size}" for size, share in enumerate(sets.sizes))
    print(f"\nPrediction sets: coverage {sets.coverage:.2%}, {sets.mean_size:.2f} labels on average ({sizes})")
    for batch, cost in costs.items():
        print(f"{batch} image(s): {', '.join(f'{name} {value:.3f}' for name, value in cost.items())}")
    output.parent.mkdir(parents=True, exist_ok=True)
    values = {"run": str(run_path), "auroc": areas, "prediction_sets": sets.to_json(), "milliseconds": costs}
    output.write_text(json.dumps(values, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
