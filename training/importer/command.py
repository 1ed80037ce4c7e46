"""The command `import`. Imports no TensorFlow, so that usage errors are reported at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from training.command_options import ImageSize, models_options, signature_options
from training.importer.scaling import COLORS, SCALES

_COLUMN = 15  # of what was inferred


@click.command("import")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--labels", help="In the order of the outputs: a file, a,b,c or JSON.  [default: the folders of --data]")
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="Labelled images, FOLDER/<class>/*: they show the input scale; calibrates, evaluates and writes a report.",
)
@click.option(
    "--input-scale",
    type=click.Choice(list(SCALES)),
    help="Pixel values in training.  [default: what the model's own rescaling shows, or --data]",
)
@click.option("--image-size", type=ImageSize(), help="Where the model leaves it open.")
@click.option(
    "--color", type=click.Choice(COLORS), help="Order of the channels.  [default: rgb, or as --data shows; grey for 1]"
)
@click.option("--output", metavar="NAME", help="The output with a value for each class, where there are several.")
@click.option(
    "--custom",
    type=click.Path(path_type=Path),
    metavar="MODULE.PY",
    help="The model's own layers and functions. THIS FILE IS EXECUTED.",
)
@models_options("the file's")
@signature_options
def import_command(model: Path, *, models_dir: Path, **options: Any) -> None:
    """Export a Keras MODEL for serving: a .keras or .h5 file, or a SavedModel that Keras exported.

    What can be inferred is printed, a line each; what cannot is asked for. Nothing is guessed.
    """
    from training.importer.importer import import_model

    def tell(subject: str, inferred: str) -> None:
        click.echo(f"{subject:<{_COLUMN}}{inferred}")

    tell("exported", str(import_model(model, models_dir=models_dir, tell=tell, **options)))
