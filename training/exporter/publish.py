"""Publishes a trained model as a new version: writes it to a hidden folder, verifies it, renames it.

models/<name>/<version>/    see `training.exporter.saved_model`
assets.extra/SHA256SUMS    checksums of all other files, verified by the service
"""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from importlib.metadata import version as library_version
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from training.errors import RunError
from training.exporter.checksums import write_checksums
from training.exporter.grad_cam import check_explainable
from training.exporter.saved_model import write_extra_assets, write_saved_model
from training.exporter.signatures import output_names
from training.exporter.verify import ExpectedLogits, verify_graph, verify_saved_model
from training.exporter.versions import next_version
from training.models.folding import compute_logits
from training.models.guard import Guard
from training.models.inference_graph import InferenceGraph
from training.preflight import check_model_name
from training.run_dir import RunDir
from training.shell_command import format_command
from training.storage import explain_full_storage
from training.trainer import BestModel, load_best_model

_GUARD_FIELDS = ("typicality", "prediction_sets")  # of evaluation.json and model.json
_OPTIONAL_FIELDS = (*_GUARD_FIELDS, "reference")  # runs that an earlier version evaluated do not have them
# Of `TrainingConfig`, for model.json.
_CONFIG_FIELDS = ("variant", "loop", "preset", "backbone", "weights_sha256", "dtype", "conv_activation")

logger = logging.getLogger(__name__)


def export_run(
    run: RunDir,
    *,
    models_dir: Path,
    name: str | None = None,
    mirror: bool = False,
    best: BestModel | None = None,
    default_outputs: str = "all",
    explain: bool = False,
) -> Path:
    """Export the best checkpoint of a run as the next version of a model.

    Args:
        run: an evaluated run.
        models_dir: the folder of all models.
        name: of the model; by default that of the run's dataset.
        mirror: export with horizontal-flip test-time augmentation: more accurate, at twice the computation.
        best: the run's best checkpoint, if it is loaded already.
        default_outputs: see `publish_model`.
        explain: see `publish_model`.

    Returns:
        The folder of the new version.

    Raises:
        RunError: the run has no checkpoint, or was not evaluated.
        ExportError: as for `publish_model`.
        ValueError: `default_outputs` is unknown.
    """
    evaluation = run.read_evaluation()
    split = "mirror" if mirror else "test"
    if split not in evaluation:
        raise RunError(
            f"{run.path} was not evaluated with --mirror, which fits a temperature of its own: "
            f"{format_command('evaluate', run.path, '--mirror')}"
        )
    best = best or load_best_model(run)
    metrics = _read_metrics(run, evaluation, split, best_epoch=best.epoch.epoch)
    guard = _read_guard(run, metrics, mirror=mirror) if "test" in metrics else None
    dataset, config, model = run.read_dataset(), best.config, best.model
    dataset_fields = ("name", "source", "train_images", "test_images", "content_hash")
    metadata = {
        **{field: getattr(config, field) for field in _CONFIG_FIELDS},
        "parameters": model.count_params(),
        "dataset": {field: getattr(dataset, field) for field in dataset_fields},
        "seed": config.seed,
        "epochs": config.epochs,
        "best_epoch": best.epoch.epoch,
        "validation": {"loss": best.epoch.val_loss, "accuracy": best.epoch.val_accuracy},
        "mirror": mirror,
        **metrics,
        "libraries": {library: library_version(library) for library in ("tensorflow", "keras", "numpy")},
    }
    temperature = metrics["temperature"]
    trained = InferenceGraph(lambda images: compute_logits(model, images), tf.identity)
    graph = config.recipe.fold(model, config, temperature=temperature)
    if mirror:
        trained, graph = trained.average_flips(), graph.average_flips()
    compute = tf.function(trained.logits, reduce_retracing=True)

    def expected(images: np.ndarray) -> np.ndarray:
        calibrated: np.ndarray = compute(tf.constant(images)).numpy().astype(np.float64) / temperature
        return calibrated

    return publish_model(
        graph,
        expected,
        models_dir=models_dir,
        name=name or dataset.name,
        class_names=dataset.class_names,
        input_shape=dataset.input_shape,
        metadata=metadata,
        default_outputs=default_outputs,
        explain=explain,
        guard=guard,
    )


def publish_model(
    graph: InferenceGraph,
    expected: ExpectedLogits,
    *,
    models_dir: Path,
    name: str,
    class_names: tuple[str, ...],
    input_shape: tuple[int, int, int],
    metadata: dict[str, Any],
    default_outputs: str = "all",
    explain: bool = False,
    guard: Guard | None = None,
) -> Path:
    """Export an image classifier as the next version of `models_dir/name`.

    Args:
        graph: what is exported.
        expected: the logits that it must have.
        models_dir: the folder of all models.
        name: of the model: letters, digits, `.`, `_` and `-`.
        class_names: a label for each class.
        input_shape: (height, width, 3).
        metadata: more fields of model.json, besides name, version, time, class names and input shape.
        default_outputs: what `serving_default` returns: "all", or the "probabilities" alone.
        explain: add the signature `explain`, heat maps of the predicted classes.
        guard: of the graph; with it, the export has the signatures `guarded` and `guarded_bytes`.

    Returns:
        The folder of the new version.

    Raises:
        ExportError: the name is invalid, heat maps of this classifier cannot be computed, or the outputs differ from
            the expected ones; nothing was published.
        ValueError: `default_outputs` is unknown.
    """
    check_model_name(name)
    outputs = output_names(default_outputs=default_outputs, explain=explain, guarded=guard is not None)
    if explain:
        check_explainable(graph, input_shape=input_shape)
    verify_graph(graph, expected, input_shape=input_shape)
    full = explain_full_storage(models_dir, "Nothing was published: free some space, then export again")
    with full, next_version(models_dir / name) as (version, partial):
        write_saved_model(
            graph,
            partial,
            class_names=class_names,
            input_shape=input_shape,
            default_outputs=default_outputs,
            explain=explain,
            guard=guard,
        )
        own = {
            "name": name,
            "version": version,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "class_names": class_names,
            "input_shape": input_shape,
        }
        metadata = {**own, **metadata, **own}
        write_extra_assets(partial, name=name, input_shape=input_shape, metadata=metadata, signatures=outputs)
        verify_saved_model(
            partial,
            expected,
            graph=graph,
            class_names=class_names,
            input_shape=input_shape,
            outputs=outputs,
            guard=guard,
        )
        write_checksums(partial)
    return models_dir / name / str(version)


def _read_metrics(run: RunDir, evaluation: dict[str, Any], split: str, *, best_epoch: int) -> dict[str, Any]:
    """Return test metrics, temperature and calibration for model.json.

    If evaluation.json is of another epoch, the temperature is 1 and a warning says so.

    Raises:
        RunError: evaluation.json is invalid.
    """
    try:
        evaluated_epoch = evaluation["best"]["epoch"]
        metrics = {
            "test": {"loss": evaluation[split]["loss"], "accuracy": evaluation[split]["accuracy"]},
            "temperature": float(evaluation[split]["temperature"]),
            "calibration": evaluation[split]["calibration"],
            "uncalibrated_error": evaluation[split]["uncalibrated"]["expected_calibration_error"],
            **{field: evaluation[split][field] for field in _OPTIONAL_FIELDS if field in evaluation[split]},
        }
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(
            f"{run.path / 'evaluation.json'} is invalid ({error!r}). Evaluate the run again: "
            f"{format_command('evaluate', run.path)}"
        ) from error
    if evaluated_epoch == best_epoch:
        return metrics
    logger.warning(
        "evaluation.json is of epoch %s, and the checkpoint of epoch %d: the export has no test metrics and no "
        "guarded signatures, and its confidences are not calibrated. To add all three: %s, then export again",
        evaluated_epoch,
        best_epoch,
        format_command("evaluate", run.path),
    )
    return {"temperature": 1.0}


def _read_guard(run: RunDir, metrics: dict[str, Any], *, mirror: bool) -> Guard | None:
    """Return the guard of a run; without one, remove its fields from the metrics, and a warning says how to get it."""
    path = run.guard_path(mirror=mirror)
    again = format_command("evaluate", run.path, *(["--mirror"] if mirror else []))
    try:
        if all(field in metrics for field in _GUARD_FIELDS):
            return Guard.load(path)
        reason = "the run was evaluated by an earlier version"
    except FileNotFoundError:
        reason = f"{path} is lost"
    except ValueError as error:
        reason = str(error)
    logger.warning(
        "exporting without the signatures guarded and guarded_bytes (typicality and prediction sets): %s. To add them: "
        "%s, then export again",
        reason,
        again,
    )
    for field in _GUARD_FIELDS:
        metrics.pop(field, None)
    return None
