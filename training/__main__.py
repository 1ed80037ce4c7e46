"""The command line of training: `python -m training train | evaluate | export`."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from training.config import CONV_ACTIVATIONS, DATASETS, DTYPES, LOOPS, PRESETS, VARIANTS, TrainingConfig
from training.errors import TrainingError

if TYPE_CHECKING:
    from training.datasets import Dataset
    from training.evaluation import Evaluation
    from training.run import RunFolder

# TensorFlow takes seconds to import: the commands import what needs it once their arguments are known to be good.

_DEFAULTS = TrainingConfig()
_INTERRUPTED = 130
_Command = TypeVar("_Command", bound=Callable[..., Any])


class _ImageSize(click.ParamType[Any]):
    name = "HEIGHTxWIDTH"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        height, times, width = str(value).partition("x")
        if not (times and height.isdecimal() and width.isdecimal() and int(height) and int(width)):
            self.fail(f"expected HEIGHTxWIDTH in pixels, such as 32x32; got {value!r}", param, ctx)
        return int(height), int(width)


def _default(name: str) -> str:
    presets = ", ".join(f"{_by_dtype(getattr(preset, name))} for {key}" for key, preset in PRESETS.items())
    return f"[default: {getattr(_DEFAULTS, name)}; {presets}]"


def _by_dtype(value: Any) -> str:
    return " or ".join(f"{own} in {dtype}" for dtype, own in value.items()) if isinstance(value, dict) else str(value)


def _models_options(command: _Command) -> _Command:
    for option in (
        click.option("--name", help="The exported model's name.  [default: the dataset's]"),
        click.option(
            "--models-dir",
            type=click.Path(path_type=Path, file_okay=False),
            default=Path("models"),
            show_default=True,
            help="Where the exported model becomes MODELS_DIR/NAME/VERSION.",
        ),
    ):
        command = option(command)
    return command


@click.group(context_settings={"max_content_width": 110})
def main() -> None:
    """Train image classifiers, judge them, and export them for serving.

    Exit codes: 0 done; 1 something was wrong with the data, the run or the export; 2 wrong usage; 3 the loss
    diverged; 4 no space left; 130 interrupted.
    """


@main.command()
@click.option(
    "--dataset",
    type=click.Choice(DATASETS),
    default=_DEFAULTS.dataset,
    show_default=True,
    help="cifar10; shapes (drawn by this program, needs no data); or a folder of images by class.",
)
@click.option("--data", type=click.Path(path_type=Path), help="Where the data lies: an archive or a folder.")
@click.option("--image-size", type=_ImageSize(), help="Resize all images.  [default: their own size]")
@click.option(
    "--variant",
    type=click.Choice(VARIANTS),
    default=_DEFAULTS.variant,
    show_default=True,
    help="The article's network in two writings; or airbench, made to learn in little time, from images that it also "
    "sees mirrored and shifted.",
)
@click.option(
    "--preset",
    type=click.Choice(list(PRESETS)),
    help="How large an airbench is and how long it is trained.  [default: quick]",
)
@click.option(
    "--loop",
    type=click.Choice(LOOPS),
    default=_DEFAULTS.loop,
    show_default=True,
    help="Keras's fit, or a loop of our own around a GradientTape.",
)
@click.option(
    "--conv-activation",
    type=click.Choice(CONV_ACTIVATIONS),
    default=_DEFAULTS.conv_activation,
    show_default=True,
    help="Of the article's network, after each convolution; linear is its Sequential listing.",
)
@click.option("--epochs", type=click.IntRange(1), help=_default("epochs"))
@click.option("--batch-size", type=click.IntRange(1), help=_default("batch_size"))
@click.option("--learning-rate", type=float, help=_default("learning_rate"))
@click.option(
    "--plateau-factor",
    type=float,
    default=_DEFAULTS.plateau_factor,
    show_default=True,
    help="The learning rate is multiplied by this when the validation loss stalls...",
)
@click.option(
    "--plateau-patience",
    type=click.IntRange(1),
    default=_DEFAULTS.plateau_patience,
    show_default=True,
    help="...for this many epochs.",
)
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    help="Of airbench's convolutions while it is trained.  [default: mixed_bfloat16 where the processor has "
    "instructions for it]",
)
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=_DEFAULTS.seed, show_default=True)
@click.option("--deterministic", is_flag=True, help="Bit-identical results from the same seed; slower.")
@click.option("--tensorboard", is_flag=True, help="Write TensorBoard logs into the run folder.")
@click.option(
    "--run",
    "run_path",
    type=click.Path(path_type=Path, file_okay=False),
    help="The run's folder.  [default: runs/TIME-DATASET-VARIANT-LOOP]",
)
@click.option(
    "--resume",
    type=click.Path(path_type=Path, file_okay=False),
    help="Go on with the run in this folder, exactly as it was begun.",
)
@click.option("--export/--no-export", default=True, show_default=True, help="Export the best checkpoint.")
@_models_options
@click.pass_context
def train(
    ctx: click.Context,
    /,
    *,
    run_path: Path | None,
    resume: Path | None,
    export: bool,
    models_dir: Path,
    name: str | None,
    **config_values: Any,
) -> None:
    """Train a model, judge its best checkpoint on the test set, write a report, export it."""
    from training.run import RunFolder

    if resume is not None:
        given = [
            f"--{parameter.replace('_', '-')}"
            for parameter in (*config_values, "run_path")
            if ctx.get_parameter_source(parameter) is ParameterSource.COMMANDLINE
        ]
        if given:
            raise click.UsageError(f"--resume goes on with what the run was begun with: leave out {', '.join(given)}")
        run = RunFolder.open(resume)
        dataset = _load_dataset(run.read_config())
    else:
        try:
            config = TrainingConfig.fill_in(**config_values)
        except ValueError as error:
            raise click.UsageError(str(error)) from error
        dataset = _load_dataset(config)
        stamp = f"{datetime.now():%Y%m%d-%H%M%S}"
        default = Path("runs") / f"{stamp}-{dataset.name}-{config.variant}-{config.loop}"
        run = RunFolder.create(run_path or default, config)
    try:
        from training.train import train_and_evaluate

        _show_evaluation(run, train_and_evaluate(run, dataset))
        if export:
            _export(run, models_dir=models_dir, name=name)
    except (TrainingError, KeyboardInterrupt):
        _show_what_is_kept(run)
        raise


@main.command()
@click.argument("run_path", metavar="RUN", type=click.Path(path_type=Path, file_okay=False))
@click.option("--mirror", is_flag=True, help="Judge the mean of each image and its mirror image too.")
def evaluate(run_path: Path, *, mirror: bool) -> None:
    """Judge the best checkpoint of a past RUN on its test set again, and write its report."""
    from training.run import RunFolder

    run = RunFolder.open(run_path)
    dataset = _load_dataset(run.read_config())
    from training.train import evaluate_run

    views = evaluate_run(run, dataset, mirror=mirror)
    _show_evaluation(run, views["test"])
    if mirror:
        click.echo(f"mirror         {views['mirror'].accuracy:.2%}, averaged with the mirror images")


@main.command()
@click.argument("run_path", metavar="RUN", type=click.Path(path_type=Path, file_okay=False))
@_models_options
@click.option(
    "--mirror", is_flag=True, help="Answer with the mean of an image and its mirror image, at twice the work."
)
def export(run_path: Path, *, models_dir: Path, name: str | None, mirror: bool) -> None:
    """Export the best checkpoint of a past RUN as the next version of a model."""
    from training.run import RunFolder

    _export(RunFolder.open(run_path), models_dir=models_dir, name=name, mirror=mirror)


@main.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--dataset", type=click.Choice(DATASETS), default=_DEFAULTS.dataset, show_default=True)
@click.option("--data", type=click.Path(path_type=Path), help="Where the data lies: an archive or a folder.")
@click.option("--image-size", type=_ImageSize(), help="Resize all images.  [default: their own size]")
@click.option("--per-class", type=click.IntRange(1), default=1, show_default=True, help="Pictures of each class.")
def samples(folder: Path, *, per_class: int, **config_values: Any) -> None:
    """Write some test images of a dataset into FOLDER, as PNG files named by their class."""
    from training.datasets.samples import write_samples

    paths = write_samples(_load_dataset(TrainingConfig(**config_values)), folder, per_class=per_class)
    click.echo(f"wrote {len(paths)} pictures into {folder}")


def _load_dataset(config: TrainingConfig) -> Dataset:
    # Before TensorFlow is imported and before a run folder is made: missing data is told at once and costs nothing.
    from training.datasets import load_dataset

    return load_dataset(config.dataset, data=config.data, image_size=config.image_size, seed=config.seed)


def _show_evaluation(run: RunFolder, result: Evaluation) -> None:
    click.echo(f"test accuracy  {result.accuracy:.2%} of {result.count:,} images, loss {result.loss:.4f}")
    click.echo(f"report         {run.path / 'report.md'}")


def _show_what_is_kept(run: RunFolder) -> None:
    from training.checkpoints import read_best_state

    best = read_best_state(run.checkpoints)
    if best is None:
        click.echo(f"{run.path} has no checkpoint yet: no epoch was completed", err=True)
        return
    click.echo(
        f"{run.path} keeps its best checkpoint, of epoch {best['epoch']} (val loss {best['val_loss']:.4f}).\n"
        f"Go on with it:  python -m training train --resume {run.path}",
        err=True,
    )


def _export(run: RunFolder, *, models_dir: Path, name: str | None, mirror: bool = False) -> None:
    from training.export import export_run

    click.echo(f"exported       {export_run(run, models_dir=models_dir, name=name, mirror=mirror)}")


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def prepare_tensorflow() -> None:
    """Settle what TensorFlow reads from the environment when it is imported, or first used."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # Convolutions through oneDNN, which it uses by itself only where there is AVX-512 VNNI: twice as fast elsewhere.
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")


def run_command_line() -> int:
    """Run the command line; return the exit code."""
    prepare_tensorflow()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for quiet in ("absl", "httpx", "tensorflow"):
        logging.getLogger(quiet).setLevel(logging.ERROR)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        main(standalone_mode=False)
    except TrainingError as error:
        click.echo(f"error: {error}", err=True)
        return error.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        return _INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(run_command_line())
