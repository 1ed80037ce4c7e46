"""Trains a run, then evaluates its best checkpoint. Imports neither the command line nor the export."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from training.callbacks import ReplicaCallback, RunCallback
from training.checkpoints import Checkpoints, read_best_state, restore_best
from training.config import CHANGEABLE, TrainingConfig
from training.data import Dataset, Split, input_pipeline
from training.data.class_sizes import balance_classes
from training.data.streamed_images import Images, explain_unreadable, read_batches
from training.distribution import Distribution, explain_lost_workers
from training.errors import RunError
from training.evaluation.calibration import apply_temperature, average_logits, fit_temperature
from training.evaluation.guard_evaluation import GuardEvaluation
from training.evaluation.metrics import CalibratedEvaluation, Evaluation, evaluate
from training.evaluation.reference import Reference
from training.evaluation.report import write_report
from training.evaluation.typicality import evaluate_guard, fit_guard, measure_reference
from training.history import EpochResult
from training.interrupts import DeferredInterrupts
from training.loops import TRAIN_FUNCTIONS
from training.models import build_model
from training.models.losses import ClassWeightedLoss
from training.progress import ProgressDisplay
from training.run_dir import DatasetInfo, RunDir
from training.shell_command import format_command
from training.storage import explain_full_storage

_EVALUATION_BATCH_SIZE = 250

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class BestModel:
    """The best checkpoint of a run, loaded.

    Attributes:
        model: in float32, with the weights of the checkpoint.
        epoch: metrics of the checkpoint's epoch.
        config: of the run.
    """

    model: keras.Model
    epoch: EpochResult
    config: TrainingConfig


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """A trained and evaluated run.

    Attributes:
        run: the run on disk.
        best: the checkpoint with the lowest validation loss.
        evaluation: metrics of that checkpoint on the test images, after calibration.
        mirrored: the same with horizontal-flip test-time augmentation; `None` unless requested.
    """

    run: RunDir
    best: BestModel
    evaluation: Evaluation
    mirrored: Evaluation | None = None


def train_and_evaluate(run: RunDir, dataset: Dataset, *, config: TrainingConfig | None = None) -> TrainingResult:
    """Train a run from its newest checkpoint on, then evaluate its best checkpoint on the test images.

    A complete run is only evaluated again.

    Args:
        run: the run.
        dataset: the data of the run.
        config: replaces the run's own: with more epochs, or another path of the same data.

    Raises:
        TrainingError: the data, the run directory or the storage is unusable, or the loss diverged. Checkpoints
            written before the error are kept.
    """
    config = config or run.read_config()
    with run.lock(), _explain_full_storage(run):
        _check_dataset(run, dataset)
        train, validation = input_pipeline.split_validation(dataset.train, seed=config.seed)
        _train(run, config, dataset, train=train, validation=validation)
        return _evaluate_best(run, config, dataset, validation=validation)


def train_as_follower(config: TrainingConfig, dataset: Dataset) -> None:
    """Train with the other workers of `TF_CONFIG`, of which another one is the chief.

    Args:
        config: of the run; the chief's is the same.
        dataset: the data of the run.

    Raises:
        TrainingError: as in `train_and_evaluate`, or the chief has ended.
    """
    train, validation = input_pipeline.split_validation(dataset.train, seed=config.seed)
    _train(None, config, dataset, train=train, validation=validation)


def evaluate_run(run: RunDir, dataset: Dataset, *, config: TrainingConfig, mirror: bool = False) -> TrainingResult:
    """Evaluate the best checkpoint of a past run on the test images again, and write its report.

    Args:
        run: the run.
        dataset: the data of the run.
        config: of the run.
        mirror: evaluate with horizontal-flip test-time augmentation too.

    Raises:
        TrainingError: the run has no checkpoint, or the data differs from the run's.
    """
    with run.lock(), _explain_full_storage(run):
        _check_dataset(run, dataset)
        _, validation = input_pipeline.split_validation(dataset.train, seed=config.seed)
        return _evaluate_best(run, config, dataset, validation=validation, mirror=mirror)


def load_best_model(run: RunDir, config: TrainingConfig | None = None) -> BestModel:
    """Build the run's model in float32 and load its best checkpoint, or with a warning its latest if that is lost.

    Args:
        run: the run.
        config: the run's config, if it was read already.

    Raises:
        RunError: the run has no complete checkpoint, or config.json was changed after training.
    """
    config = config or run.read_config()
    dataset = run.read_dataset()
    model = _build(config, dataset.input_shape, classes=len(dataset.class_names), dtype="float32")
    state = restore_best(run.checkpoints, model)
    if state is None:
        raise RunError(
            f"{run.path} has no checkpoint: no epoch was completed. Resume it: "
            f"{format_command('train', '--resume', run.path)}"
        )
    run.check_config(config, state.config or {})
    return BestModel(model=model, epoch=state.history[-1], config=config)


def predict_probabilities(model: keras.Model, images: Images, *, mirror: bool = False) -> np.ndarray:
    """Return the model's probabilities, float32 (n, classes).

    Args:
        model: the model.
        images: uint8 (n, height, width, 3).
        mirror: average the logits of each image and its horizontal flip.
    """
    predict = tf.function(lambda batch: model(batch, training=False), reduce_retracing=True)

    def predict_batch(batch: np.ndarray) -> np.ndarray:
        probabilities: np.ndarray = predict(tf.constant(batch)).numpy()
        if mirror:
            probabilities = average_logits(probabilities, predict(tf.constant(batch[:, :, ::-1])).numpy())
        return probabilities

    return np.concatenate([predict_batch(batch) for batch in read_batches(images, _EVALUATION_BATCH_SIZE)])


def _check_dataset(run: RunDir, dataset: Dataset) -> None:
    """Compare the data with the run's: by dataset.json or, if that is lost, by a checkpoint. Write dataset.json.

    Raises:
        RunError: the run was trained on other data.
    """
    info = DatasetInfo.of(dataset)
    known: str | None = info.content_hash
    if run.has_dataset():
        known = run.read_dataset().content_hash
    elif state := read_best_state(run.checkpoints):
        known = state.content_hash
    if known is None:
        logger.warning(
            "%s is lost: cannot check that %s is the data of the run", run.path / "dataset.json", info.source
        )
    elif known != info.content_hash:
        raise RunError(
            f"{run.path} was trained on other data than these {info.train_images:,} training images from "
            f"{info.source}: the content hash differs. Name the data of the run with --data"
        )
    if not run.has_dataset():
        run.write_dataset(info)


def _train(run: RunDir | None, config: TrainingConfig, dataset: Dataset, *, train: Split, validation: Split) -> None:
    """Train the epochs that are left; `run` is None in a worker that is not the chief."""
    if config.deterministic:
        tf.config.experimental.enable_op_determinism()
    values = {**json.loads(config.to_json()), **dict.fromkeys(CHANGEABLE - {"epochs"}), "content": dataset.content_hash}
    with explain_lost_workers(), explain_unreadable(train.images):
        distribution = Distribution.of(config)
        distribution.check_batches(images=len(train.labels), batch_size=config.batch_size)
        distribution.check_equal(hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest())
        _train_replicas(run, config, dataset, distribution, train=train, validation=validation)


def _train_replicas(
    run: RunDir | None,
    config: TrainingConfig,
    dataset: Dataset,
    distribution: Distribution,
    *,
    train: Split,
    validation: Split,
) -> None:
    keras.utils.set_random_seed(config.seed)
    steps, images = input_pipeline.steps_per_epoch(train, config.batch_size), len(train.labels)
    with distribution.strategy.scope():
        model = _build(config, train.images.shape[1:], classes=len(dataset.class_names), dtype=config.dtype)
        optimizer = config.recipe.make_optimizer(config, steps_per_epoch=steps)
        optimizer.build(model.trainable_variables)
    if run is None:
        callback = ReplicaCallback(config, optimizer)
    else:
        checkpoints = Checkpoints(run.checkpoints, model=model, optimizer=optimizer)
        callback = saved = RunCallback(run, config, checkpoints, optimizer, content_hash=dataset.content_hash)
        with distribution.strategy.scope():
            saved.restore()
        run.write_config(config)  # with more epochs, or a new path of the data
    if len(distribution.own) < distribution.replicas:
        with distribution.strategy.scope():
            _copy_from_chief(distribution, callback, [*model.variables, *optimizer.variables])
    done = callback.done
    if done >= config.epochs:
        return
    message = "training %s in %s with %s on %s training images, %s for validation, from epoch %d"
    counts = f"{images:,}", f"{len(validation.labels):,}"
    logger.info(message, config.variant, config.dtype, config.loop, *counts, done + 1)
    with contextlib.ExitStack() as stack:
        stack.enter_context(distribution.strategy.scope())
        cache = run.path / "features" if run else Path(stack.enter_context(tempfile.TemporaryDirectory()))
        part = config.recipe.prepare(model, config, train.images, validation.images, is_new=done == 0, cache=cache)
    parts = input_pipeline.Parts(distribution.replicas, distribution.own)
    preset = config.recipe.presets.get(config.preset or "")
    data = input_pipeline.LoopData(
        train=distribution.distribute(
            input_pipeline.training_batches(
                train,
                inputs=part.train,
                batch_size=config.batch_size,
                seed=config.seed,
                first_epoch=done,
                augmentation=preset.augmentation if preset else None,
                parts=parts,
            )
        ),
        validation=distribution.distribute(
            input_pipeline.evaluation_batches(
                validation, inputs=part.validation, batch_size=_EVALUATION_BATCH_SIZE, parts=parts
            )
        ),
        steps_per_epoch=steps,
        images_per_epoch=images,
        batch_size=config.batch_size,
    )
    loss = config.recipe.make_loss()
    if (weights := balance_classes(dataset.train.labels, dataset.class_names)) is not None:
        loss = ClassWeightedLoss(loss, weights)
    epochs = range(done + 1, config.epochs + 1)
    display = ProgressDisplay(epochs=epochs, steps_per_epoch=steps, images_per_epoch=images)
    with distribution.strategy.scope(), display as callback.display, DeferredInterrupts() as callback.interrupts:
        TRAIN_FUNCTIONS[config.loop](part.model, optimizer, loss, data, epochs=epochs, callback=callback)


def _copy_from_chief(distribution: Distribution, callback: ReplicaCallback, variables: Sequence[Any]) -> None:
    """Give the chief's weights, optimizer and progress, which it may have restored, to the other workers."""
    progress, *values = distribution.broadcast([np.array(callback.progress), *variables])
    if not distribution.is_chief:
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value)
        callback.progress = [float(number) for number in progress]


def _evaluate_best(
    run: RunDir, config: TrainingConfig, dataset: Dataset, *, validation: Split, mirror: bool = False
) -> TrainingResult:
    """Calibrate the best checkpoint on the validation images, evaluate it on the test images, write the report."""
    best = load_best_model(run, config)
    test = _evaluate_calibrated(best.model, validation, dataset, mirror=False)
    guard, reference = _fit_and_evaluate_guard(run, best, validation, dataset, temperature=test.temperature)
    test_values = {**test.to_json(), **guard.to_json(), "reference": reference.to_json()}
    values = {"best": dataclasses.asdict(best.epoch), "test": test_values}
    mirrored = None
    if mirror:
        mirrored = _evaluate_calibrated(best.model, validation, dataset, mirror=True)
        temperature = mirrored.temperature
        of_both, reference = _fit_and_evaluate_guard(
            run, best, validation, dataset, temperature=temperature, mirror=True
        )
        values["mirror"] = {**mirrored.to_json(), **of_both.to_json(), "reference": reference.to_json()}
    run.write_evaluation(values)
    write_report(run, config=config, dataset=dataset, test=test, mirrored=mirrored, best=best.epoch, guard=guard)
    flipped = mirrored.evaluation if mirrored else None
    return TrainingResult(run=run, best=best, evaluation=test.evaluation, mirrored=flipped)


def _evaluate_calibrated(
    model: keras.Model, validation: Split, dataset: Dataset, *, mirror: bool
) -> CalibratedEvaluation:
    temperature = fit_temperature(predict_probabilities(model, validation.images, mirror=mirror), validation.labels)
    uncalibrated = predict_probabilities(model, dataset.test.images, mirror=mirror)
    probabilities = apply_temperature(uncalibrated, temperature)
    return CalibratedEvaluation(
        evaluation=evaluate(probabilities, dataset.test.labels, dataset.class_names),
        uncalibrated=evaluate(uncalibrated, dataset.test.labels, dataset.class_names).calibration,
        temperature=temperature,
        probabilities=probabilities,
    )


def _fit_and_evaluate_guard(
    run: RunDir, best: BestModel, validation: Split, dataset: Dataset, *, temperature: float, mirror: bool = False
) -> tuple[GuardEvaluation, Reference]:
    """Fit the guard on the graph that is exported, store it in the run directory, and evaluate it.

    Returns:
        Its evaluation on the test images, and the predictions on the validation images.
    """
    graph = best.config.recipe.fold(best.model, best.config, temperature=temperature)
    if mirror:
        graph = graph.average_flips()
    guard = fit_guard(graph, validation)
    guard.save(run.guard_path(mirror=mirror))
    evaluation = evaluate_guard(graph, guard, dataset.test, dataset_name=dataset.name)
    return evaluation, measure_reference(graph, guard, validation)


def _build(config: TrainingConfig, input_shape: tuple[int, int, int], *, classes: int, dtype: str) -> keras.Model:
    return build_model(
        config.variant,
        input_shape,
        classes=classes,
        conv_activation=config.conv_activation,
        preset=config.preset,
        backbone=config.backbone,
        dtype=dtype,
    )


def _explain_full_storage(run: RunDir) -> contextlib.AbstractContextManager[None]:
    resume = format_command("train", "--resume", run.path)
    return explain_full_storage(run.path, f"Earlier checkpoints are intact: free some space, then resume: {resume}")
