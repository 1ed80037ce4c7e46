"""The callbacks of a run: progress and learning rate; checkpoints, history, TensorBoard."""

from __future__ import annotations

import contextlib
import json
import logging
import math

import keras
import tensorflow as tf
from typing_extensions import override

from training.checkpoints import Checkpoints, TrainingState, read_best_state
from training.config import TrainingConfig
from training.errors import RunError
from training.history import EpochResult
from training.interrupts import DeferredInterrupts
from training.optimizers.schedules import PlateauSchedule
from training.progress import ProgressDisplay
from training.run_dir import RunDir

logger = logging.getLogger(__name__)


class ReplicaCallback:
    """The `TrainingCallback` of every worker process: shows the progress, and changes the learning rate.

    Attributes:
        display: shows the progress; set it before training.
        interrupts: hold signals back until the end of a batch; set it before training.
        done: the number of completed epochs, before training.
    """

    display: ProgressDisplay
    interrupts: DeferredInterrupts

    def __init__(self, config: TrainingConfig, optimizer: keras.optimizers.Optimizer) -> None:
        self._config = config
        self._optimizer = optimizer
        self._plateau = PlateauSchedule(factor=config.plateau_factor, patience=config.plateau_patience)
        self.done = 0

    @property
    def progress(self) -> list[float]:
        """The completed epochs and the state of the learning rate's schedule."""
        return [self.done, *self._plateau.state.values()]

    @progress.setter
    def progress(self, values: list[float]) -> None:
        self.done = int(values[0])
        self._plateau.restore(dict(zip(self._plateau.state, values[1:], strict=True)))

    def on_epoch_begin(self, epoch: int) -> None:
        self.interrupts.check()
        self.display.start_epoch(epoch)

    def on_batch_end(self, step: int, *, loss: float, accuracy: float) -> None:
        self.display.update(step, loss=loss, accuracy=accuracy)
        self.interrupts.check()

    def on_validation_batch_end(self) -> None:
        self.interrupts.check()

    def on_epoch_end(self, result: EpochResult) -> None:
        self._change_learning_rate(result)
        self.display.end_epoch(result, is_best=False)

    def _change_learning_rate(self, result: EpochResult) -> None:
        if self._config.recipe.uses_plateau:
            self._optimizer.learning_rate.assign(
                self._plateau.next_learning_rate(result.learning_rate, val_loss=result.val_loss)
            )


class RunCallback(ReplicaCallback):
    """The `TrainingCallback` of the chief: restores the run first, then also saves it after every epoch."""

    def __init__(
        self,
        run: RunDir,
        config: TrainingConfig,
        checkpoints: Checkpoints,
        optimizer: keras.optimizers.Optimizer,
        *,
        content_hash: str,
    ) -> None:
        super().__init__(config, optimizer)
        self._run = run
        self._checkpoints = checkpoints
        self._content_hash = content_hash
        self._history: list[EpochResult] = []
        self._best_val_loss = math.inf
        self._writers = {
            name: tf.summary.create_file_writer(str(run.tensorboard / name))
            for name in (("train", "validation") if config.tensorboard else ())
        }

    def restore(self) -> None:
        """Restore the newest checkpoint, if there is one.

        Raises:
            RunError: the checkpoints are lost or damaged, or the run cannot be resumed with this config.
        """
        state = self._checkpoints.restore()
        if state is None:
            if recorded := self._run.read_history():
                raise RunError(
                    f"{self._run.path} has no checkpoint, though {len(recorded)} epochs were completed: its files are "
                    "lost. Restore them, or start a new run"
                )
            return
        self._run.check_config(self._config, state.config or {})
        done = self.done = len(state.history)
        if done > self._config.epochs:
            raise RunError(
                f"{self._run.path} has completed {done} epochs, more than the {self._config.epochs} requested: "
                f"request at least {done} (--epochs, or epochs in config.json)"
            )
        with contextlib.suppress(RunError):  # a damaged history.csv is replaced below
            if (recorded_epochs := len(self._run.read_history())) > done:
                logger.warning(
                    "%d epochs were completed, but the newest checkpoint is of epoch %d: training continues from there",
                    recorded_epochs,
                    done,
                )
        self._history = list(state.history)
        self._plateau.restore(state.plateau)
        best = read_best_state(self._run.checkpoints)
        assert best is not None  # `Checkpoints.restore` saves one
        self._best_val_loss = best.history[-1].val_loss
        self._run.write_history(self._history)

    @override
    def on_epoch_end(self, result: EpochResult) -> None:
        self._history.append(result)
        self._change_learning_rate(result)
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
        metrics = {
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
                for metric, value in metrics[name].items():
                    tf.summary.scalar(metric, value)
            writer.flush()
