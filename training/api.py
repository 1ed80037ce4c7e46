"""The public functions of `training`: `train`, `evaluate`, `export` and `predict`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from training.batch_prediction.prediction import BATCH_SIZE, PredictionSummary, predict_source
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


def predict(
    model: Path | str,
    source: Path | str,
    out: Path | str,
    *,
    column: str | None = None,
    batch_size: int = BATCH_SIZE,
    jobs: int | None = None,
    restart: bool = False,
) -> PredictionSummary:
    """Classify all images of a source with an exported model, into one Parquet file.

    The file has a row for each image, in the order of the source: `source` (path, name in the archive or row number),
    `index` int64, `label`, `class_id` int64, `confidence` float32, `probabilities` float32 (classes), where the model
    tells them `typicality` float32, `is_typical` bool and `label_set` (labels), and `error`. An image that cannot be
    read has nothing but its `error`. The same call continues a prediction that was interrupted.

    Args:
        model: `models/NAME`, for its newest version, or `models/NAME/VERSION`.
        source: a folder, an image, a pattern such as `photos/*.jpg`, a list of paths (.txt), a tar archive, or a
            Parquet file with encoded images or paths. Listed paths are relative to the working folder.
        out: the file to write, `*.parquet`; an earlier one is replaced when the new one is complete.
        column: of a Parquet source: bytes, text (paths), or a struct with the field `bytes`. By default the only
            column of bytes or, without one, the only one of text.
        batch_size: images in a call of the model.
        jobs: threads; by default two for each core, as far as the largest images fit into memory.
        restart: discard what an interrupted prediction has finished, instead of continuing.

    Returns:
        The file, the number of its rows, and how many of them have an error.

    Raises:
        PredictionError: the source is missing, damaged or has no images, the result cannot be written, finished parts
            are of another prediction, the model is altered, fails or is not an image classifier, or pyarrow is not
            installed.
        ExportError: there is no such model.
        StorageFullError: the disk is full.

    Example:
        >>> from pathlib import Path
        >>> from training import predict
        >>> from training.data.dataset import write_samples
        >>> paths = write_samples(dataset, Path("pictures"), per_class=1)
        >>> summary = predict("models/shapes", "pictures", "predictions.parquet")
        >>> summary.images, summary.unreadable
        (10, 0)
    """
    return predict_source(
        Path(model), str(source), Path(out), column=column, batch_size=batch_size, jobs=jobs, restart=restart
    )


def _is_model(source: Any) -> bool:
    if not isinstance(source, str | Path):
        return True
    path = Path(source)
    is_model_folder = any((path / name).is_file() for name in ("saved_model.pb", "metadata.json"))
    return path.is_file() or path.suffix.lower() in (".keras", ".h5", ".hdf5") or is_model_folder


def _log(subject: str, inferred: str) -> None:
    logger.info("%s: %s", subject, inferred)
