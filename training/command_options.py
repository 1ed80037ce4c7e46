"""Options of several commands. Imports no TensorFlow."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from training.exporter.signatures import DEFAULT_OUTPUTS

FOLDER = click.Path(path_type=Path, file_okay=False)
_Command = TypeVar("_Command", bound=Callable[..., Any])


class ImageSize(click.ParamType[Any]):
    """A size in pixels, such as 32x32; its value is (height, width)."""

    name = "HEIGHTxWIDTH"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """Parse the size."""
        height, times, width = str(value).partition("x")
        if not (times and height.isdecimal() and width.isdecimal() and int(height) and int(width)):
            self.fail(f"expected HEIGHTxWIDTH in pixels, such as 32x32; got {value!r}", param, ctx)
        return int(height), int(width)


def models_options(default_name: str) -> Callable[[_Command], _Command]:
    """Return a decorator that adds `--models-dir` and `--name`, whose default is described by `default_name`."""

    def decorate(command: _Command) -> _Command:
        text = "The model is exported as MODELS_DIR/NAME/VERSION."
        command = click.option("--models-dir", type=FOLDER, default=Path("models"), help=text)(command)
        return click.option("--name", help=f"Name of the exported model.  [default: {default_name}]")(command)

    return decorate


def signature_options(command: _Command) -> _Command:
    """Add `--default-outputs` and `--explain`."""
    text = "What serving_default returns; clients that take the argmax of a row need probabilities alone."
    outputs = click.option("--default-outputs", type=click.Choice(DEFAULT_OUTPUTS), default="all", help=text)
    text = "Add the signature explain: heat maps of the predicted class (Grad-CAM)."
    return outputs(click.option("--explain", is_flag=True, help=text)(command))
