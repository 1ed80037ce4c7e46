"""Train a model and judge it: `train_and_evaluate`, the one thing this package does.

Knows of no command line, and not of export.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from training.callbacks import EpochResult
from training.checkpoints import Checkpoints, TrainingState, read_best_state, restore_best
from training.config import PRESETS, TrainingConfig
from training.data import Dataset
from training.data.input_pipeline import evaluation_batches, split_validation, steps_per_epoch, training_batches
from training.errors import RunError
from training.evaluation.calibration import apply_temperature, average_views, fit_temperature
from training.evaluation.metrics import Evaluation, evaluate
from training.evaluation.report import write_report
from training.loops import LOOPS
from training.models import build_model
from training.optimizers.muon import LinearDecay, Muon, SmoothedCrossentropy
from training.optimizers.schedules import PlateauSchedule
from training.progress import ProgressDisplay
from training.run_dir import DatasetSummary, RunDir
from training.shell_command import format_command
from training.storage import explain_full_storage

_EVALUATION_BATCH_SIZE = 250

logger = logging.getLogger(__name__)


def train_and_evaluate(run: RunDir, dataset: Dataset, *, config: TrainingConfig | None = None) -> Evaluation:
    """Train as the run's config says, from where the run stands, then evaluate the best checkpoint on the test set.

    A run that is complete is only evaluated again.

    Args:
        run: the run.
        dataset: what it is trained on.
        config: takes the place of the run's own: more epochs, or another path of the same data.

    Returns:
        The test set's figures for the checkpoint with the lowest validation loss.

    Raises:
        TrainingError: the data, the run folder or the storage is at fault, or the loss diverged. Whatever the
            error, the checkpoints written before it stay.
    """
    config = config or run.read_config()
    with run.lock(), _explain_full_storage(run):
        _record_dataset(run, dataset)
        _train(run, config, dataset)
        return _judge(run, config, dataset)["test"]


def evaluate_run(run: RunDir, dataset: Dataset, *, mirror: bool = False) -> dict[str, Evaluation]:
    """Judge the best checkpoint of a past run on the test set again, and write its report.

    Args:
        run: the run.
        dataset: what it was trained on.
        mirror: judge the mean of each image and its mirror image too.

    Returns:
        The figures by view: "test", and "mirror" where asked for.

    Raises:
        TrainingError: the run has no checkpoint yet, or its data is not what it was.
    """
    config = run.read_config()
    with run.lock(), _explain_full_storage(run):
        _record_dataset(run, dataset)
        return _judge(run, config, dataset, mirror=mirror)


def load_best_model(run: RunDir) -> tuple[keras.Model, dict[str, Any]]:
    """Build the run's model, in float32, with its best checkpoint's weights; a warning says so if it is the latest's.

    Returns:
        The model, and the figures of the checkpoint's epoch, as `EpochResult` names them.

    Raises:
        RunError: the run has no complete checkpoint, or config.json is not what it was trained with.
    """
    config = run.read_config()
    summary = run.read_dataset()
    model = _build(config, summary.input_shape, classes=len(summary.class_names), dtype="float32")
    state = restore_best(run.checkpoints, model)
    if state is None:
        raise RunError(
            f"{run.path} has no checkpoint: no epoch was completed. Go on with it: "
            f"{format_command('train', '--resume', run.path)}"
        )
    _check_config(run, config, state)
    return model, dataclasses.asdict(state.history[-1])


def make_optimizer(config: TrainingConfig, *, steps_per_epoch: int) -> keras.optimizers.Optimizer:
    """Make the optimizer that the config's variant is trained with."""
    if config.variant == "airbench":
        return Muon(LinearDecay(config.learning_rate, steps=config.epochs * steps_per_epoch))
    return keras.optimizers.Adam(config.learning_rate)


def make_loss(config: TrainingConfig) -> keras.losses.Loss:
    """Make the loss, of class numbers and probabilities, that the config's variant is trained with."""
    return SmoothedCrossentropy() if config.variant == "airbench" else keras.losses.SparseCategoricalCrossentropy()


def predict_probabilities(model: keras.Model, images: np.ndarray, *, mirror: bool = False) -> np.ndarray:
    """Return the model's probabilities, float32 (n, classes), for uint8 images (n, height, width, 3).

    Args:
        model: the model.
        images: what it is to see.
        mirror: see each image and its mirror image, and average their logits.
    """
    if mirror:
        return average_views(predict_probabilities(model, images), predict_probabilities(model, images[:, :, ::-1]))
    predict = tf.function(lambda batch: model(batch, training=False), reduce_retracing=True)
    batches = range(0, len(images), _EVALUATION_BATCH_SIZE)
    return np.concatenate(
        [predict(tf.constant(images[start : start + _EVALUATION_BATCH_SIZE])).numpy() for start in batches]
    )


def _record_dataset(run: RunDir, dataset: Dataset) -> None:
    """Remember the run's data, or check that it is what it was: by dataset.json or, if that is lost, by a checkpoint.

    Raises:
        RunError: the run was begun with other data.
    """
    summary = DatasetSummary.of(dataset)
    state = None if (run.path / "dataset.json").exists() else read_best_state(run.checkpoints)
    if state is not None:
        if state.content_hash is None:
            logger.warning(
                "%s is lost: it cannot be checked that %s is the data that the run was begun with",
                run.path / "dataset.json",
                summary.source,
            )
        elif state.content_hash != summary.content_hash:
            raise RunError(
                f"{run.path} was trained on other data than these {summary.train_images:,} training images from "
                f"{summary.source}: the content hash in its checkpoint differs. Name the "
                "data that it was begun with, by --data"
            )
    run.record_dataset(summary)


def _train(run: RunDir, config: TrainingConfig, dataset: Dataset) -> None:
    if config.deterministic:
        tf.config.experimental.enable_op_determinism()
    keras.utils.set_random_seed(config.seed)
    train, validation = split_validation(dataset.train, seed=config.seed)
    model = _build(config, train.images.shape[1:], classes=len(dataset.class_names), dtype=config.dtype)
    if hasattr(model, "adapt"):
        model.adapt(train.images)
    steps = steps_per_epoch(train, config.batch_size)
    optimizer = make_optimizer(config, steps_per_epoch=steps)
    checkpoints = Checkpoints(run.checkpoints, model=model, optimizer=optimizer)
    follower = _Follower(run, config, checkpoints, optimizer, content_hash=dataset.content_hash)
    first_epoch = follower.restore()
    if config != run.read_config():
        run.write_config(config)
    if first_epoch >= config.epochs:
        return
    logger.info(
        "training %s in %s with %s on %s training images, %s for validation, from epoch %d",
        config.variant,
        config.dtype,
        config.loop,
        f"{len(train.labels):,}",
        f"{len(validation.labels):,}",
        first_epoch + 1,
    )
    with ProgressDisplay(
        epochs=config.epochs,
        first_epoch=first_epoch,
        steps_per_epoch=steps,
        images_per_epoch=len(train.labels),
    ) as follower.display:
        LOOPS[config.loop](
            model,
            optimizer,
            make_loss(config),
            train=training_batches(
                train,
                batch_size=config.batch_size,
                seed=config.seed,
                first_epoch=first_epoch,
                augmentation=PRESETS[config.preset].augmentation if config.preset else None,
            ),
            validation=evaluation_batches(validation, batch_size=_EVALUATION_BATCH_SIZE),
            steps_per_epoch=steps,
            images_per_epoch=len(train.labels),
            first_epoch=first_epoch,
            epochs=config.epochs,
            monitor=follower,
        )


def _judge(run: RunDir, config: TrainingConfig, dataset: Dataset, *, mirror: bool = False) -> dict[str, Evaluation]:
    """Judge the best checkpoint on the test set, its temperature fitted on the validation images."""
    model, best = load_best_model(run)
    _, validation = split_validation(dataset.train, seed=config.seed)
    views = {"test": False, "mirror": True} if mirror else {"test": False}
    raw = {view: predict_probabilities(model, dataset.test.images, mirror=flip) for view, flip in views.items()}
    temperatures = {
        view: fit_temperature(predict_probabilities(model, validation.images, mirror=flip), validation.labels)
        for view, flip in views.items()
    }
    probabilities = {view: apply_temperature(raw[view], temperatures[view]) for view in views}
    before, after = (
        {view: evaluate(rows, dataset.test.labels, dataset.class_names) for view, rows in predictions.items()}
        for predictions in (raw, probabilities)
    )
    run.write_evaluation(
        {
            "best": best,
            **{
                view: {
                    **after[view].to_json(),
                    "temperature": temperatures[view],
                    "uncalibrated": before[view].calibration.to_json(),
                }
                for view in views
            },
        }
    )
    write_report(
        run,
        config=config,
        dataset=dataset,
        evaluation=after["test"],
        mirrored=after.get("mirror"),
        uncalibrated=before["test"].calibration,
        temperature=temperatures["test"],
        probabilities=probabilities["test"],
        best=best,
    )
    return after


def _build(config: TrainingConfig, input_shape: tuple[int, int, int], *, classes: int, dtype: str) -> keras.Model:
    return build_model(
        config.variant,
        input_shape,
        classes=classes,
        conv_activation=config.conv_activation,
        preset=config.preset,
        dtype=dtype,
    )


class _Follower:
    """The `Monitor` of a run: progress, learning rate, checkpoints, history."""

    display: ProgressDisplay

    def __init__(
        self,
        run: RunDir,
        config: TrainingConfig,
        checkpoints: Checkpoints,
        optimizer: keras.optimizers.Optimizer,
        *,
        content_hash: str,
    ) -> None:
        self._content_hash = content_hash
        self._run = run
        self._config = config
        self._checkpoints = checkpoints
        self._optimizer = optimizer
        # Muon follows a schedule of its own, by the step.
        self._has_plateaus = config.variant != "airbench"
        self._plateau = PlateauSchedule(factor=config.plateau_factor, patience=config.plateau_patience)
        self._history: list[EpochResult] = []
        self._best_val_loss = math.inf
        self._writers = {
            name: tf.summary.create_file_writer(str(run.tensorboard / name))
            for name in (("train", "validation") if config.tensorboard else ())
        }

    def restore(self) -> int:
        """Go back to the newest checkpoint, if there is one; return how many epochs are done.

        Raises:
            RunError: the checkpoints are lost or damaged, or the config is not one that the run can go on with.
        """
        state = self._checkpoints.restore()
        if state is None:
            if recorded := self._run.read_history():
                raise RunError(
                    f"{self._run.path} has no checkpoint, though {len(recorded)} epochs were completed: its files are "
                    "lost. Put them back, or begin a new run"
                )
            return 0
        _check_config(self._run, self._config, state)
        done = len(state.history)
        if done > self._config.epochs:
            raise RunError(
                f"{self._run.path} has completed {done} epochs, more than the {self._config.epochs} asked for: "
                f"ask for {done} or more (--epochs, or epochs in config.json)"
            )
        with contextlib.suppress(RunError):  # a damaged history.csv is written anew
            if (recorded_epochs := len(self._run.read_history())) > done:
                logger.warning(
                    "%d epochs were completed, and the newest checkpoint is of epoch %d: training continues from there",
                    recorded_epochs,
                    done,
                )
        self._history = list(state.history)
        self._plateau.restore(state.plateau)
        best = read_best_state(self._run.checkpoints)
        assert best is not None  # `restore` has seen to it
        self._best_val_loss = best.history[-1].val_loss
        self._run.write_history(self._history)
        return done

    def on_epoch_start(self, epoch: int) -> None:
        self.display.start_epoch(epoch)

    def on_batch_end(self, step: int, *, loss: float, accuracy: float) -> None:
        self.display.update(step, loss=loss, accuracy=accuracy)

    def on_epoch_end(self, result: EpochResult) -> None:
        self._history.append(result)
        if self._has_plateaus:
            self._optimizer.learning_rate.assign(
                self._plateau.next_learning_rate(result.learning_rate, val_loss=result.val_loss)
            )
        state = TrainingState(
            history=tuple(self._history),
            plateau=self._plateau.state,
            config=json.loads(self._config.to_json()),
            content_hash=self._content_hash,
        )
        is_best = result.val_loss < self._best_val_loss
        if is_best:
            self._best_val_loss = result.val_loss
            self._checkpoints.save_best(state)
        self._checkpoints.save_latest(state)
        self._run.write_history(self._history)
        self._write_summaries(result)
        self.display.end_epoch(result, is_best=is_best)

    def _write_summaries(self, result: EpochResult) -> None:
        figures = {
            "train": {
                "loss": result.loss,
                "accuracy": result.accuracy,
                "learning_rate": result.learning_rate,
                "images_per_s": result.images_per_s,
            },
            "validation": {"loss": result.val_loss, "accuracy": result.val_accuracy},
        }
        for name, writer in self._writers.items():
            with writer.as_default(step=result.epoch):
                for figure, value in figures[name].items():
                    tf.summary.scalar(figure, value)
            writer.flush()


def _check_config(run: RunDir, config: TrainingConfig, state: TrainingState) -> None:
    """Raise `RunError` if config.json describes another training than the checkpoint comes from."""
    changes = config.changes_from(state.config or {})
    if changes:
        listed = ", ".join(f"{name} is {now!r} and was {then!r}" for name, (now, then) in changes.items())
        raise RunError(
            f"{run.path / 'config.json'} was changed since the checkpoint was written: {listed}. Change it back, or "
            "begin a new run; epochs, data and tensorboard may be changed"
        )


def _explain_full_storage(run: RunDir) -> contextlib.AbstractContextManager[None]:
    return explain_full_storage(
        run.path,
        "The checkpoints written before are whole: free some space, then go on with: "
        + format_command("train", "--resume", run.path),
    )
