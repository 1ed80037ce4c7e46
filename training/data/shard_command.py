"""The command `shard`. Imports no TensorFlow, so that usage errors are reported at once."""

from __future__ import annotations

from pathlib import Path

import click

from training.command_options import ImageSize
from training.data.shard_writer import write_shards
from training.memory import format_bytes


@click.command("shard")
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The folder to write; it must not exist.")
@click.option(
    "--image-size",
    type=ImageSize(),
    help="Resize all images.  [default: their own size; 96x96 if sizes differ or are large]",
)
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=0, help="Of the test split, if SOURCE has none.")
def shard_command(source: Path, *, out: Path, image_size: tuple[int, int] | None, seed: int) -> None:
    """Write the images of SOURCE, a folder of images by class, as TFRecord shards to train on.

    Each image is decoded and resized once. Train with --dataset folder --data OUT, and with --stream if the images do
    not fit into memory. An interrupted command leaves nothing: run it again.
    """
    written = write_shards(source, out, image_size=image_size, seed=seed)
    size = format_bytes(written.bytes)
    click.echo(f"wrote          {written.images:,} images in {written.shards:,} shards, {size}, into {out}")
