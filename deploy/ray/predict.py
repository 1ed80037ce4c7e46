"""Batch prediction on a Ray cluster: `.venv/bin/python -m deploy.ray.predict MODEL SOURCE --out FOLDER`.

Each actor has the predictor of `python -m training predict` and calls it with the same batches, so the rows are the
same. All nodes need this project, installed with the extras `training`, `batch` and `ray`, and see MODEL, SOURCE and
FOLDER under the same paths, as on a network file system.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import pyarrow as pa
import pyarrow.dataset
import ray
import ray.data

from training.batch_prediction.listing import Listing
from training.batch_prediction.prediction import BATCH_SIZE
from training.batch_prediction.rows import Row, make_batches
from training.batch_prediction.sources import open_source
from training.converter.convert import find_version
from training.errors import PredictionError, TrainingError, UnreadableImagesError

# A row for each batch: the number of its first image, and for each image what `Row` has. Paths need not be UTF-8.
_BATCHES = pa.schema(
    {
        "first": pa.int64(),
        "sources": pa.list_(pa.string()),
        "paths": pa.list_(pa.binary()),
        "sizes": pa.list_(pa.int64()),
        "problems": pa.list_(pa.string()),
    }
)


class BatchPredictor:
    """An actor: predicts the images of batches, read by their paths."""

    def __init__(self, version: str) -> None:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
        from training.batch_prediction.predictor import Predictor

        self._predictor = Predictor(Path(version))

    def __call__(self, batches: pa.Table) -> pa.Table:
        """Return the predictions of all images in a table of batches."""
        predicted = []
        for batch in batches.to_pylist():
            columns = zip(batch["sources"], batch["paths"], batch["sizes"], batch["problems"], strict=True)
            rows = [Row(source, os.fsdecode(path), size, problem) for source, path, size, problem in columns]
            predicted.append(self._predictor.predict(rows, batch["first"]))
        return pa.Table.from_batches(predicted, self._predictor.schema)


def list_batches(source: str, *, batch_size: int) -> pa.Table:
    """Return the batches of a source of files, a row for each.

    Raises:
        PredictionError: as for `open_source`, or the source has no files of its own.
    """
    columns: dict[str, list[Any]] = {name: [] for name in _BATCHES.names}
    with tempfile.TemporaryDirectory() as folder:
        opened = open_source(source, column=None, listing=Path(folder, "listing"))
        if not isinstance(opened, Listing):
            raise PredictionError(f"{source} has the images themselves: name a folder, a pattern or a list of files")
        first = 0
        for rows in make_batches(opened.read(0), batch_size):
            columns["first"].append(first)
            columns["sources"].append([row.source for row in rows])
            columns["paths"].append([os.fsencode(os.path.abspath(row.content)) for row in rows])  # noqa: PTH100
            columns["sizes"].append([row.size for row in rows])
            columns["problems"].append([row.problem for row in rows])
            first += len(rows)
    return pa.table(columns, schema=_BATCHES)


def predict(version: Path, batches: pa.Table, out: Path) -> None:
    """Predict batches on all CPUs of the cluster, into Parquet files in a folder.

    Args:
        version: the folder of the SavedModel.
        batches: as `list_batches` returns them.
        out: the folder. Rows are not in the order of the source; their `index` is.
    """
    actors = max(1, min(int(ray.cluster_resources()["CPU"]) - 1, len(batches)))  # one CPU is left for writing
    dataset = ray.data.from_arrow([batches.slice(start, 1) for start in range(len(batches))])
    predicted = dataset.map_batches(
        BatchPredictor,
        fn_constructor_args=(str(version),),
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_cpus=1,
    )
    predicted.write_parquet(str(out.absolute()))


@click.command()
@click.argument("model", type=click.Path(path_type=Path, file_okay=False))
@click.argument("source")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="The folder to write.")
@click.option("--batch-size", type=click.IntRange(1), default=BATCH_SIZE, show_default=True)
def main(model: Path, source: str, out: Path, batch_size: int) -> None:
    """Classify the images of SOURCE, a folder, a pattern or a list of paths, on the Ray cluster of RAY_ADDRESS.

    Without one, Ray runs on this machine only. The exit code is 5 if images could not be read.
    """
    try:
        if out.exists() and any(out.iterdir()):
            raise PredictionError(f"{out} has files already: choose another folder")
        version = find_version(model)
        batches = list_batches(source, batch_size=batch_size)
        ray.init(log_to_driver=False)
        predict(version, batches, out)
        rows = pyarrow.dataset.dataset(out)
        failed = rows.count_rows(filter=pyarrow.dataset.field("error").is_valid())
        click.echo(f"wrote {rows.count_rows():,} rows into {out}")
        if failed:
            raise UnreadableImagesError(f"{failed:,} images could not be read: the column error has the reasons")
    except TrainingError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
