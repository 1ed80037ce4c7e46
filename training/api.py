"""The public functions of `training`: `train`, `evaluate` and `export`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from training.config import TrainingConfig
from training.data import Dataset, load_dataset
from training.errors import ModelError, RunError
from training.exporter.publish import export_run
from training.importer.importer import import_model
from training.preflight import check_free_space, check_memory
from training.run_dir import RunDir
from training.trainer import TrainingResult, evaluate_run, train_and_evaluate

logger = logging.getLogger(__name__)


def train(
    config: TrainingConfig, dataset: Dataset | None = None, *, run_dir: Path | str | None = None
) -> TrainingResult:
    """Train a model, and evaluate its best checkpoint on the test images.

    Args:
        config: settings of the run.
        dataset: images uint8 (n, height, width, 3) with labels int64 (n,), as training and test split. By default
            it is loaded as `config.dataset`, `config.data` and `config.image_size` say.
        run_dir: new directory for checkpoints, history and report; by default `runs/TIME-DATASET-VARIANT-LOOP`.

    Returns:
        The run on disk, its best model in float32, and the metrics on the test images.

    Raises:
        WeightsError: the weights of the backbone are missing, damaged or of another network.
        DatasetError: the data is missing, damaged or too small.
        RunError: `run_dir` contains a run already.
        MemoryTooSmallError: images and network do not fit into memory.
        DivergedError: the loss became NaN or infinite.
        StorageFullError: the disk is full.

    Example:
        >>> from training import Dataset, TrainingConfig, train
        >>> from training.data.shapes import CLASS_NAMES, draw_shapes
        >>> dataset = Dataset("shapes", "drawn", CLASS_NAMES, draw_shapes(200, seed=0), draw_shapes(50, seed=1))
        >>> result = train(TrainingConfig(epochs=1), dataset, run_dir="runs/shapes")
        >>> result.evaluation.count
        50
        >>> result.best.model(dataset.test.images[:2]).shape  # probabilities, float32 (n, classes)
        TensorShape([2, 10])
    """
    config = config.recipe.complete(config)
    dataset = dataset or load_dataset(config)
    check_memory(config, dataset)
    check_free_space(config, dataset, run_folder=Path(run_dir or "runs"), models_dir=None)
    run = RunDir.create(Path(run_dir), config) if run_dir else RunDir.create_default(config, dataset.name)
    return train_and_evaluate(run, dataset, config=config)


def evaluate(run_dir: Path | str, dataset: Dataset | None = None, *, mirror: bool = False) -> TrainingResult:
    """Evaluate the best checkpoint of a run on the test images again, and write its report.

    Args:
        run_dir: directory of the run.
        dataset: the data of the run; by default it is loaded as the run's config says.
        mirror: evaluate with horizontal-flip test-time augmentation too.

    Returns:
        As for `train`; metrics with test-time augmentation are in `mirrored`.

    Raises:
        RunError: there is no run, it has no checkpoint, or it was trained on other data.
        DatasetError: the data is missing or damaged.

    Example:
        >>> from training import evaluate
        >>> evaluate("runs/shapes", dataset).evaluation.accuracy == result.evaluation.accuracy
        True
    """
    run = RunDir.open(Path(run_dir))
    config = run.read_config()
    return evaluate_run(run, dataset or load_dataset(config), config=config, mirror=mirror)


def export(
    source: Path | str | Any,
    models_dir: Path | str = "models",
    *,
    name: str | None = None,
    mirror: bool = False,
    default_outputs: str = "all",
    explain: bool = False,
    labels: Sequence[str] | Path | str | None = None,
    data: Path | str | None = None,
    input_scale: str | None = None,
    image_size: tuple[int, int] | None = None,
    color: str | None = None,
    output: str | None = None,
    custom: Path | str | None = None,
) -> Path:
    """Export a run or a Keras model as the next version of a model, verified, for serving.

    The signature `serving_default` takes `images` uint8 (n, height, width, 3), raw pixels 0-255; `image_bytes` takes
    encoded JPEG or PNG images, string (n,). Both return `probabilities` float32 (n, classes), `class_id` int64 (n,)
    and `label` string (n,). `probabilities` takes `images` and returns nothing else.

    Args:
        source: directory of an evaluated run, whose best checkpoint is exported; or a model: a `.keras` or `.h5` file,
            a SavedModel that Keras exported, a Keras model, or a function from a batch of images to probabilities or
            logits (n, classes). What is inferred about a model is logged.
        models_dir: folder of all models.
        name: of the model; by default that of the run's dataset, of the file or of the Keras model.
        mirror: of a run: export with horizontal-flip test-time augmentation; it must be evaluated with it.
        default_outputs: what `serving_default` returns: "all", or the "probabilities" alone.
        explain: add the signature `explain`: `images` to `heat_map` float32 (n, height, width), from 0 to 1.
        labels: of a model, in the order of its outputs: a sequence, a file, or text as for `--labels`. By default the
            class names of `data`.
        data: of a model: a folder of labelled images that show its input scale, calibrate and evaluate it.
        input_scale: of a model: "0..255", "0..1", "-1..1", "imagenet-caffe" or "imagenet-torch", the values of pixels
            in its training. By default what its own rescaling or `data` shows.
        image_size: (height, width) of a model that leaves them open.
        color: of a model: "rgb", "bgr" or "grey".
        output: of a model with several outputs, the name of the one with a value for each class.
        custom: of a model: a Python file with its own layers and functions. The file is executed.

    Returns:
        The folder of the new version, `models_dir/name/VERSION`.

    Raises:
        RunError: there is no run, or it has no checkpoint or evaluation.
        ModelError: the model cannot be served, or what cannot be inferred was not given.
        DatasetError: the data is missing or damaged.
        ExportError: the name is invalid, heat maps cannot be computed, or the outputs of the exported model differ from
            the trained model's.
        StorageFullError: the disk is full.
        ValueError: `default_outputs` is unknown.

    Example:
        >>> from training import export
        >>> export("runs/shapes", "models").as_posix()
        'models/shapes/1'
    """
    signatures: Any = {"default_outputs": default_outputs, "explain": explain}
    options: Any = {
        "labels": labels,
        "data": data and Path(data),
        "input_scale": input_scale,
        "image_size": image_size,
        "color": color,
        "output": output,
        "custom": custom and Path(custom),
    }
    if not _is_model(source):
        if given := [option for option, value in options.items() if value is not None]:
            raise RunError(f"{source} is a run, which has its own settings: leave out {', '.join(given)}")
        return export_run(
            RunDir.open(Path(source)), models_dir=Path(models_dir), name=name, mirror=mirror, **signatures
        )
    if mirror:
        raise ModelError("mirror is for runs, which can be evaluated with it: leave it out for a model")
    return import_model(source, models_dir=Path(models_dir), name=name, tell=_log, **signatures, **options)


def _is_model(source: Any) -> bool:
    if not isinstance(source, str | Path):
        return True
    path = Path(source)
    is_model_folder = any((path / name).is_file() for name in ("saved_model.pb", "metadata.json"))
    return path.is_file() or path.suffix.lower() in (".keras", ".h5", ".hdf5") or is_model_folder


def _log(subject: str, inferred: str) -> None:
    logger.info("%s: %s", subject, inferred)
