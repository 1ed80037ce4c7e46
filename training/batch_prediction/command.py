"""The command `predict`. Imports no TensorFlow, so that usage errors are reported at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from training.command_options import FOLDER
from training.errors import UnreadableImagesError
from training.image_progress import format_rate, format_seconds


@click.command("predict")
@click.argument("model", type=FOLDER)
@click.argument("source")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The Parquet file to write.")
@click.option("--column", help="Of a Parquet SOURCE: encoded images or paths.  [default: the only one that can be]")
@click.option("--batch-size", type=click.IntRange(1), default=64, help="Images in a call of the model.")
@click.option("--jobs", type=click.IntRange(1), help="Threads.  [default: two per core, as memory allows]")
@click.option("--restart", is_flag=True, help="Discard what an interrupted run of another prediction has finished.")
def predict_command(model: Path, source: str, **options: Any) -> None:
    """Classify all images of SOURCE with an exported MODEL, models/NAME or models/NAME/VERSION.

    SOURCE is a folder, a pattern such as 'photos/*.jpg', a list of paths (.txt), a tar archive, or a Parquet file with
    encoded images or paths. An interrupted run continues with the same command. Images that cannot be read have the
    reason in the column error, and the exit code is 5.
    """
    from training.batch_prediction.prediction import predict_source

    summary = predict_source(model, source, **options)
    rate = format_rate(summary.predicted / max(summary.seconds, 1e-6))
    before = summary.images - summary.predicted
    click.echo(
        f"predicted      {summary.predicted:,} images in {format_seconds(summary.seconds)}, {rate}"
        + (f", and {before:,} in an earlier run" if before else "")
    )
    click.echo(f"wrote          {summary.path}")
    if summary.unreadable:
        share = f"{summary.unreadable:,} of {summary.images:,} images could not"
        if summary.unreadable == summary.images:
            share = f"none of {summary.images:,} images could"
        raise UnreadableImagesError(
            f"{share} be read: the column error has the reasons. The first is {summary.first_error}"
        )
