"""Predicts all images of a source into one Parquet file, and continues where an earlier run was interrupted.

Threads predict one batch each: they read, decode and classify it, so that decoding and inference overlap. Reading,
decoding and TensorFlow release the interpreter's lock. A window of batches is in flight, whatever the source has.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import sys
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from training.batch_prediction.parts import MAX_ROW_GROUP, Parts
from training.batch_prediction.predictor import Predictor
from training.batch_prediction.rows import Row, Source, make_batches
from training.batch_prediction.sources import open_source
from training.errors import PredictionError
from training.exporter.checksums import SUMS_FILE, compute_checksums
from training.exporter.versions import find_version
from training.image_progress import ImageProgress
from training.memory import count_decoding_threads

if TYPE_CHECKING:
    import pyarrow

BATCH_SIZE = 64
PART_S = 5.0  # a killed process loses the work of this time
PART_VALUES = 1 << 22  # probabilities in a part, which is in memory until it is written
# While one waits for a disk or for the interpreter's lock, another computes. Of the bare model's images/s, two for each
# core made 0.93 to 0.98 and one 0.85 to 0.92 (PNG files of 32x32 pixels, two cores beside other work, 2026-11-27).
_JOBS_PER_CORE = 2
_BATCHES_PER_JOB = 2  # in flight
_FORMAT = 1  # of the parts

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PredictionSummary:
    """What a prediction wrote.

    Attributes:
        path: the Parquet file, one row for each image.
        images: the number of its rows.
        unreadable: the number of rows with an error instead of a prediction.
        first_error: source and reason of the first of these, or an empty string.
        seconds: that the images of this run took, without those of an earlier one.
        predicted: images of this run.
    """

    path: Path
    images: int
    unreadable: int
    first_error: str
    seconds: float
    predicted: int


def predict_source(
    model: Path,
    source: str,
    out: Path,
    *,
    column: str | None = None,
    batch_size: int = BATCH_SIZE,
    jobs: int | None = None,
    restart: bool = False,
) -> PredictionSummary:
    """Predict all images of a source; see `training.predict`."""
    if importlib.util.find_spec("pyarrow") is None:
        raise PredictionError(
            "batch prediction needs a package that is not installed: pyarrow. In the project's folder: "
            f"{sys.executable} -m pip install '.[batch]'"
        )
    version = find_version(model)
    out = _check_output(out)
    with Parts(out) as parts:
        with parts.explain_full():
            opened = open_source(source, column=column, listing=parts.listing)
        manifest = {
            "format": _FORMAT,
            "model": _identify(version),
            "source": opened.fingerprint,
            "batch size": batch_size,
        }
        parts.open(manifest, restart=restart)
        predictor = Predictor(version)
        if batch_size > 1:
            predictor.classifier.check_rows_independent()
        jobs = jobs or count_decoding_threads(per_core=_JOBS_PER_CORE)
        started_s, done_before = time.perf_counter(), parts.done
        try:
            _predict_rows(predictor, opened, parts, batch_size=batch_size, jobs=jobs)
        except BaseException:
            if parts.done:
                logger.warning(
                    "%s of %s images are done and kept; the same command continues with the next",
                    f"{parts.done:,}",
                    f"{opened.count:,}",
                )
            raise
        parts.merge(predictor.schema, classes=len(predictor.classifier.class_names))
        seconds = time.perf_counter() - started_s
    unreadable, first_error = _count_errors(out)
    return PredictionSummary(out, opened.count, unreadable, first_error, seconds, opened.count - done_before)


def _predict_rows(predictor: Predictor, source: Source, parts: Parts, *, batch_size: int, jobs: int) -> None:
    part_rows = max(batch_size, min(MAX_ROW_GROUP, PART_VALUES // len(predictor.classifier.class_names)))
    part: list[pyarrow.RecordBatch] = []
    written_s = time.monotonic()
    # Another thread writes: meanwhile the threads that predict would run out of batches.
    with ImageProgress(total=source.count, done=parts.done) as progress, ThreadPoolExecutor(1) as writer:
        writing: Future[None] | None = None
        for batch in _map_batches(predictor, source, parts.done, batch_size=batch_size, jobs=jobs):
            part.append(batch)
            progress.update(len(batch))
            if sum(map(len, part)) >= part_rows or time.monotonic() - written_s >= PART_S:
                if writing:
                    writing.result()  # one part waits at most
                writing = writer.submit(parts.write, part)
                part, written_s = [], time.monotonic()
        if writing:
            writing.result()
        if part:
            parts.write(part)
    if parts.done != source.count:
        raise PredictionError(
            f"the source changed while it was read, from {source.count:,} images to {parts.done:,}: the same command "
            "with --restart begins again"
        )


def _map_batches(
    predictor: Predictor, source: Source, start: int, *, batch_size: int, jobs: int
) -> Iterator[pyarrow.RecordBatch]:
    """Yield the predictions of all batches from row `start` on, in order."""
    waiting: deque[Future[pyarrow.RecordBatch]] = deque()
    pool = ThreadPoolExecutor(jobs, thread_name_prefix="predict")
    try:
        first = start
        for rows in make_batches(source.read(start), batch_size):
            waiting.append(pool.submit(_predict_batch, predictor, rows, first))
            first += len(rows)
            if len(waiting) >= _BATCHES_PER_JOB * jobs:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _predict_batch(predictor: Predictor, rows: list[Row], first: int) -> pyarrow.RecordBatch:
    return predictor.predict(rows, first)


def _check_output(out: Path) -> Path:
    if out.suffix.lower() != ".parquet":
        raise PredictionError(f"{out} would be a Parquet file: choose a name that ends in .parquet")
    if out.is_dir():
        raise PredictionError(f"{out} is a folder: choose the name of a file")
    return out


def _identify(version: Path) -> str:
    """Return the name, the version and a checksum of a model, after verifying the checksums of its export."""
    lines = compute_checksums(version)
    sums = version / SUMS_FILE
    if sums.is_file() and (missing := set(sums.read_text().splitlines(keepends=True)) - set(lines)):
        names = ", ".join(sorted(line.split(maxsplit=1)[1].strip() for line in missing))
        raise PredictionError(
            f"{version} differs from its export: {names}. Copy or export the version again; if the change is intended, "
            f"delete {SUMS_FILE}"
        )
    digest = hashlib.sha256("".join(lines).encode()).hexdigest()
    return f"{version.parent.name} version {version.name} ({digest[:16]})"


def _count_errors(out: Path) -> tuple[int, str]:
    """Return how many rows of a result have an error, and the first one."""
    from pyarrow import parquet

    count, first = 0, ""
    file = parquet.ParquetFile(out)
    for batch in file.iter_batches(columns=["source", "error"]):
        errors = batch.column("error")
        count += len(errors) - errors.null_count
        if not first and errors.null_count < len(errors):
            index = errors.is_valid().index(True).as_py()
            first = f"{batch.column('source')[index]}: {errors[index]}"
    return count, first
