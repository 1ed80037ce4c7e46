"""`make bench-batch`: batch prediction beside the bare model for small PNG files, and beside the decoder for photos.

The bare model has the files in memory and is called with batches of 64, from one thread for each core. The decoder has
the files in memory, too, and makes the pixels of the model's size. Prediction reads the files and writes its result.
Rounds alternate; each ratio is of one round, and the median of the ratios is printed.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")

import click
import numpy as np
from PIL import Image

from benchmarks.serve import encode_png, export_article_model, make_images
from image_formats.decoding import read_rgb
from training.batch_prediction.prediction import BATCH_SIZE, predict_source
from training.batch_prediction.predictor import Predictor

PHOTO_SIZE = (4000, 3000)
SIZE = (32, 32)
DIFFERENT = 8  # photos that are encoded; the others are copies
CORES = len(os.sched_getaffinity(0))


def write_small(folder: Path, count: int) -> None:
    folder.mkdir()
    for index, image in enumerate(make_images(count)):
        (folder / f"{index:06}.png").write_bytes(encode_png(image))


def write_photos(folder: Path, count: int) -> None:
    """Write JPEG files of 12 megapixels with the detail of photos: about 3 MB each."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(count):
        path = folder / f"{index:04}.jpg"
        if index >= DIFFERENT:
            shutil.copy(folder / f"{index % DIFFERENT:04}.jpg", path)
            continue
        coarse = Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize(PHOTO_SIZE, Image.Resampling.BICUBIC)).astype(np.int16)
        noise = rng.integers(-8, 9, smooth.shape, dtype=np.int16)
        Image.fromarray(np.clip(smooth + noise, 0, 255).astype(np.uint8)).save(path, quality=90)


def decode(data: bytes) -> np.ndarray:
    return np.asarray(read_rgb(data).resize(SIZE, Image.Resampling.BILINEAR))


def measure(run: Callable[[Any], object], items: Sequence[Any], *, images: int, pool: Executor) -> float:
    """Return the images a second with which a pool runs a function of all items."""
    started_s = time.perf_counter()
    for _ in pool.map(run, items):
        pass
    return images / (time.perf_counter() - started_s)


def measure_prediction(version: Path, folder: Path, out: Path) -> float:
    summary = predict_source(version, str(folder), out)
    assert not summary.unreadable
    out.unlink()
    return summary.predicted / summary.seconds


@click.command(context_settings={"show_default": True})
@click.option("--small", type=click.IntRange(1), default=50_000, help="PNG files of 32x32 pixels.")
@click.option("--photos", type=click.IntRange(1), default=80, help="JPEG files of 12 megapixels.")
@click.option("--rounds", type=click.IntRange(1), default=7)
@click.option("--output", type=click.Path(path_type=Path), default=Path("benchmarks/results/batch.json"))
def main(small: int, photos: int, rounds: int, output: Path) -> None:
    """Print images a second of each way, and the ratios of batch prediction to the others."""
    rates: dict[str, list[float]] = {}

    def record(what: str, rate: float) -> None:
        click.echo(f"{what}: {rate:,.1f} images/s", err=True)
        rates.setdefault(what, []).append(rate)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        click.echo("writing images ...", err=True)
        write_small(folder / "small", small)
        write_photos(folder / "photos", photos)
        version = export_article_model(folder / "models")
        classifier = Predictor(version).classifier
        files = [path.read_bytes() for path in sorted((folder / "small").iterdir())]
        batches = [files[start : start + BATCH_SIZE] for start in range(0, small, BATCH_SIZE)]
        pixels = [np.stack([decode(data) for data in batch]) for batch in batches]
        encoded = [path.read_bytes() for path in sorted((folder / "photos").iterdir())]
        threads = ThreadPoolExecutor(CORES)
        processes = ProcessPoolExecutor(CORES, mp_context=get_context("forkserver"))
        with threads, processes:
            list(threads.map(classifier.classify_files, batches[: 4 * CORES]))  # warms up
            list(processes.map(decode, files[: 4 * CORES]))
            for _ in range(rounds):
                rate = measure(classifier.classify_files, batches, images=small, pool=threads)
                record("small: bare model, PNG files", rate)
                record("small: prediction", measure_prediction(version, folder / "small", folder / "out.parquet"))
                rate = measure(classifier.classify, pixels, images=small, pool=threads)
                record("small: bare model, pixels", rate)
            for _ in range(rounds):
                rate = measure(decode, encoded, images=photos, pool=threads)
                record("photos: decoder, threads", rate)
                record("photos: prediction", measure_prediction(version, folder / "photos", folder / "out.parquet"))
                rate = measure(decode, encoded, images=photos, pool=processes)
                record("photos: decoder, processes", rate)
    click.echo(
        f"\n| images, {CORES} cores | beside | images/s | prediction, images/s | ratio |\n|---|---|---:|---:|---:|"
    )
    for what, values in rates.items():
        kind, _, way = what.partition(": ")
        if way != "prediction":
            ours = rates[f"{kind}: prediction"]
            ratio = statistics.median(our / other for our, other in zip(ours, values, strict=True))
            medians = f"{statistics.median(values):,.1f} | {statistics.median(ours):,.1f}"
            click.echo(f"| {kind} | {way} | {medians} | {ratio:.2f} |")
    result = {
        "small": small,
        "photos": photos,
        "cores": CORES,
        "images_per_s": rates,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
