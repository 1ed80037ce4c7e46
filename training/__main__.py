"""Command line: `python -m training train | evaluate | export | import | convert | predict | shard | ...`."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from training.batch_prediction.command import predict_command
from training.command_options import FOLDER, ImageSize, models_options, signature_options
from training.config import CONV_ACTIVATIONS, DATASETS, DTYPES, LOOPS, STRATEGIES, VARIANTS, TrainingConfig
from training.converter.convert import FORMATS, convert_model
from training.data import load_dataset
from training.data.shard_command import shard_command
from training.distribution import Cluster
from training.errors import RunError, StorageFullError, TrainingError
from training.importer.command import import_command
from training.models.backbones import BACKBONES, DEFAULT_BACKBONE
from training.models.presets import PRESETS
from training.models.recipes import RECIPES
from training.shell_command import format_command
from training.storage import is_full

if TYPE_CHECKING:
    from training.run_dir import RunDir
    from training.trainer import TrainingResult

# TensorFlow takes seconds to import, so the commands import what needs it after checking their arguments.

_DEFAULTS = TrainingConfig()
_INTERRUPTED = 130
_Command = TypeVar("_Command", bound=Callable[..., Any])


def _default(name: str) -> str:
    others = [f"{_by_dtype(getattr(preset, name))} for {key}" for key, preset in PRESETS.items()]
    for variant, recipe in RECIPES.items():
        if not recipe.presets and name in (own := recipe.defaults(preset=None, dtype=None)):
            others.append(f"{own[name]} for {variant}")
    return f"[default: {getattr(_DEFAULTS, name)}; {', '.join(others)}]"


def _by_dtype(value: Any) -> str:
    return " or ".join(f"{own} in {dtype}" for dtype, own in value.items()) if isinstance(value, dict) else str(value)


def _choice(name: str, choices: Sequence[str], text: str) -> Callable[[_Command], _Command]:
    default = getattr(_DEFAULTS, name.removeprefix("--").replace("-", "_"))
    return click.option(name, type=click.Choice(choices), default=default, help=text)


def _data_options(command: _Command) -> _Command:
    size = "Resize all images.  [default: their own size; 96x96, transfer 160x160, if sizes differ or are large]"
    command = click.option("--image-size", type=ImageSize(), help=size)(command)
    command = click.option("--data", type=click.Path(path_type=Path), help="Path of the archive or folder.")(command)
    text = "cifar10; shapes (drawn by this program, needs no data); or a folder of images by class, or of shards."
    return _choice("--dataset", DATASETS, text)(command)


@click.group(context_settings={"max_content_width": 110, "show_default": True})
def main() -> None:
    """Train image classifiers, evaluate them, and export them for serving.

    Exit codes: 0 success; 1 error in the data, the run or the export; 2 usage error; 3 the loss diverged; 4 disk full;
    5 some images could not be read; 130 interrupted.
    """


@main.command()
@_data_options
@_choice(
    "--variant",
    VARIANTS,
    "The article's network, as Sequential or as a subclass of Model; airbench, which trains fast and augments its "
    "images by flips and shifts; or transfer, a head on a frozen pretrained backbone.",
)
@click.option(
    "--preset", type=click.Choice(list(PRESETS)), help="Size and training time of airbench.  [default: quick]"
)
@click.option("--backbone", type=click.Choice(list(BACKBONES)), help=f"Of transfer.  [default: {DEFAULT_BACKBONE}]")
@click.option(
    "--weights",
    type=click.Path(path_type=Path),
    help="File with the backbone's weights, written by Keras.  [default: the official file in ~/.keras/models]",
)
@click.option("--weights-sha256", help="Expected checksum of that file.")
@_choice("--loop", LOOPS, "Keras's fit, or a custom loop with GradientTape.")
@_choice(
    "--strategy",
    STRATEGIES,
    "Replicas of the model, for the custom loop: on all GPUs of this machine (mirrored), or in the worker processes of "
    "TF_CONFIG, all started with the same command; the first is the chief, which writes the run.",
)
@_choice("--conv-activation", CONV_ACTIVATIONS, "Of the article's network; linear is its Sequential listing.")
@click.option("--epochs", type=click.IntRange(1), help=_default("epochs"))
@click.option("--batch-size", type=click.IntRange(1), help=_default("batch_size"))
@click.option("--learning-rate", type=float, help=_default("learning_rate"))
@click.option(
    "--plateau-factor",
    type=float,
    default=_DEFAULTS.plateau_factor,
    help="Multiply the learning rate by this when the validation loss has not improved...",
)
@click.option(
    "--plateau-patience", type=click.IntRange(1), default=_DEFAULTS.plateau_patience, help="...for this many epochs."
)
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    help="Of airbench's convolutions in training.  [default: mixed_bfloat16 if the CPU has instructions for it]",
)
@click.option(
    "--stream/--no-stream",
    default=_DEFAULTS.stream,
    help="Read the images of a folder or of shards batch by batch: for more than fits into memory.",
)
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=_DEFAULTS.seed)
@click.option("--deterministic", is_flag=True, help="Bit-identical results from the same seed; slower.")
@click.option("--tensorboard", is_flag=True, help="Write TensorBoard logs into the run directory.")
@click.option("--run", "run_path", type=FOLDER, help="The run directory.  [default: runs/TIME-DATASET-VARIANT-LOOP]")
@click.option(
    "--resume",
    type=FOLDER,
    help="Continue the run in this directory with its own settings. --epochs sets a new total, --data and "
    "--weights a new path of the same files, --strategy other replicas, --stream how images are read.",
)
@click.option("--export/--no-export", default=True, help="Export the best checkpoint.")
@models_options("the dataset's")
@signature_options
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
    default_outputs: str,
    explain: bool,
    **config_values: Any,
) -> None:
    """Train a model, evaluate its best checkpoint on the test images, write a report, export it."""
    from training.preflight import check_free_space, check_memory, check_model_name, check_models_folder
    from training.run_dir import RunDir

    if export and name is not None:
        check_model_name(name)
    if resume is not None:
        given = {
            parameter: value
            for parameter, value in {**config_values, "run": run_path}.items()
            if ctx.get_parameter_source("run_path" if parameter == "run" else parameter) is ParameterSource.COMMANDLINE
        }
        changeable = ("data", "epochs", "strategy", "stream", "weights")
        if fixed := [f"--{parameter.replace('_', '-')}" for parameter in given if parameter not in changeable]:
            raise click.UsageError(f"--resume continues a run with its own settings: leave out {', '.join(fixed)}")
        run = RunDir.open(resume)
        try:
            config = dataclasses.replace(run.read_config(), **given)
        except ValueError as error:
            raise click.UsageError(str(error)) from error
    else:
        run = None
        try:
            config = TrainingConfig.fill_in(**config_values)
        except ValueError as error:
            raise click.UsageError(str(error)) from error
        config = config.recipe.complete(config)
    is_follower = config.strategy == "multiworker" and not Cluster.from_environment().is_chief
    dataset = load_dataset(config)
    if is_follower:
        from training.trainer import train_as_follower

        check_memory(config, dataset)
        train_as_follower(config, dataset)
        return
    if export:
        exported_name = name or (run.read_dataset().name if run and run.has_dataset() else dataset.name)
        check_model_name(exported_name)
        advice = "Choose another with --models-dir, or train with --no-export"
        check_models_folder(models_dir, exported_name, advice=advice)
    check_memory(config, dataset)
    run_folder = run.path if run else run_path or Path("runs")
    check_free_space(config, dataset, run_folder=run_folder, models_dir=models_dir if export else None)
    run = run or (RunDir.create(run_path, config) if run_path else RunDir.create_default(config, dataset.name))
    try:
        from training.trainer import train_and_evaluate

        result = train_and_evaluate(run, dataset, config=config)
    except BaseException:
        _show_checkpoint(run)
        raise
    _show_evaluation(result)
    if not export:
        return
    try:
        _export(
            run, models_dir=models_dir, name=name, best=result.best, default_outputs=default_outputs, explain=explain
        )
    except BaseException:
        options: list[str | Path] = ["--models-dir", models_dir, *(["--name", name] if name else [])]
        options += ["--default-outputs", default_outputs] if default_outputs != "all" else []
        again = format_command("export", run.path, *options, *(["--explain"] if explain else []))
        click.echo(f"{run.path} is trained and evaluated, but not exported. Export it:  {again}", err=True)
        raise


@main.command()
@click.argument("run_path", metavar="RUN", type=FOLDER)
@click.option("--data", type=click.Path(path_type=Path), help="New path of the same data.")
@click.option("--mirror", is_flag=True, help="Evaluate with horizontal-flip test-time augmentation too.")
def evaluate(run_path: Path, *, data: Path | None, mirror: bool) -> None:
    """Evaluate the best checkpoint of a past RUN on the test images again, and write its report."""
    from training.run_dir import RunDir

    run = RunDir.open(run_path)
    config = run.read_config()
    dataset = load_dataset(dataclasses.replace(config, data=data or config.data))
    from training.trainer import evaluate_run

    result = evaluate_run(run, dataset, config=config, mirror=mirror)
    _show_evaluation(result)
    if result.mirrored:
        click.echo(f"mirror         {result.mirrored.accuracy:.2%}, with horizontal-flip test-time augmentation")


@main.command()
@click.argument("run_path", metavar="RUN", type=FOLDER)
@models_options("the dataset's")
@signature_options
@click.option(
    "--mirror", is_flag=True, help="Export with horizontal-flip test-time augmentation, at twice the computation."
)
def export(run_path: Path, **options: Any) -> None:
    """Export the best checkpoint of a past RUN as the next version of a model."""
    from training.run_dir import RunDir

    _export(RunDir.open(run_path), **options)


@main.command()
@click.argument("model", type=FOLDER)
@click.option("--to", type=click.Choice(list(FORMATS)), required=True, help="The format: ONNX, or LiteRT's .tflite.")
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The file to write.  [default: models/NAME/NAME-VERSION with the format's suffix]",
)
def convert(model: Path, *, to: str, output: Path | None) -> None:
    """Convert an exported MODEL, models/NAME or models/NAME/VERSION, for another runtime, and verify the result."""
    click.echo(f"converted      {convert_model(model, to=to, output=output)}")


main.add_command(import_command)
main.add_command(predict_command)
main.add_command(shard_command)


@main.command()
@click.argument("version", type=FOLDER)
@click.option(
    "--key",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    required=True,
    help="Private key of an elliptic curve (PEM).",
)
def sign(version: Path, *, key: Path) -> None:
    """Sign all files of VERSION, models/NAME/VERSION, so that `serving --verify-key` accepts it (OpenSSF format)."""
    from training.exporter.signing import sign_version

    click.echo(f"signed         {sign_version(version, key)}")


@main.command()
@click.argument("folder", type=FOLDER)
@_data_options
@click.option("--per-class", type=click.IntRange(1), default=1, help="Images of each class.")
def samples(folder: Path, *, per_class: int, **config_values: Any) -> None:
    """Write some test images of a dataset into FOLDER, as PNG files named by their class."""
    from training.data.dataset import write_samples

    paths = write_samples(load_dataset(TrainingConfig(**config_values)), folder, per_class=per_class)
    click.echo(f"wrote {len(paths)} images into {folder}")


def _show_evaluation(result: TrainingResult) -> None:
    test = result.evaluation
    click.echo(f"test accuracy  {test.accuracy:.2%} of {test.count:,} images, loss {test.loss:.4f}")
    click.echo(f"report         {result.run.path / 'report.md'}")


def _show_checkpoint(run: RunDir) -> None:
    from training.checkpoints import read_best_state

    try:
        state = read_best_state(run.checkpoints)
    except RunError:
        return  # the error that ends the command explains it
    if state is None:
        click.echo(f"{run.path} has no checkpoint yet: no epoch was completed", err=True)
        return
    best = state.history[-1]
    click.echo(
        f"{run.path} keeps its best checkpoint, of epoch {best.epoch} (val loss {best.val_loss:.4f}).\n"
        f"Resume it:  {format_command('train', '--resume', run.path)}",
        err=True,
    )


def _export(run: RunDir, **options: Any) -> None:
    from training.exporter.publish import export_run

    click.echo(f"exported       {export_run(run, **options)}")


def run_command_line() -> int:
    """Run the command line; return the exit code."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # oneDNN convolutions are the default only with AVX-512 VNNI, but twice as fast on other CPUs too.
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for quiet in ("absl", "httpx", "matplotlib", "tensorflow"):
        logging.getLogger(quiet).setLevel(logging.ERROR)
    interrupts: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        interrupts.append(number)
        signal.default_int_handler(number, frame)

    signal.signal(signal.SIGTERM, interrupt)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where the shell ignores it: `command &`
        signal.signal(signal.SIGINT, interrupt)
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
    except BrokenPipeError:
        # The reader of stdout is gone. Python must not flush stdout when it exits.
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115
        return TrainingError.exit_code
    except Exception as error:
        return _explain(error, was_interrupted=bool(interrupts))
    return 0


def _explain(error: Exception, *, was_interrupted: bool) -> int:
    """Print an error that is not a `TrainingError`; return the exit code."""
    if is_full(error):
        click.echo(f"error: disk full: {error}", err=True)
        return StorageFullError.exit_code
    if isinstance(error, OSError) and error.strerror:
        where = "" if error.filename is None else f"{error.filename}: "
        click.echo(f"error: {where}{error.strerror}", err=True)
        return TrainingError.exit_code
    text = (str(error).splitlines() or [""])[0]
    if isinstance(error, MemoryError) or "OOM when allocating" in text:
        click.echo(f"error: not enough memory ({text}): choose a smaller --image-size or --batch-size", err=True)
        return TrainingError.exit_code
    if was_interrupted:
        # TensorFlow's imports catch a KeyboardInterrupt, and fail later.
        click.echo(f"interrupted ({type(error).__name__}: {text})", err=True)
        return _INTERRUPTED
    click.echo(f"error: unexpected {type(error).__name__}: {text}", err=True)
    with contextlib.suppress(OSError):
        with tempfile.NamedTemporaryFile("w", prefix="training-error-", suffix=".txt", delete=False) as file:
            traceback.print_exception(error, file=file)
        click.echo(f"This is a bug. The traceback is in {file.name}", err=True)
    return TrainingError.exit_code


if __name__ == "__main__":
    sys.exit(run_command_line())
