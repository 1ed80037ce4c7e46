"""The best and the latest state of a run, and the way back to them.

Two `tf.train.CheckpointManager`s, each keeping one checkpoint: `latest` holds all that an exact resume needs, and is
written at the end of every epoch; `best` holds the weights with the lowest validation loss. A manager
writes the new checkpoint whole before it lets go of the old one, so a run killed in between loses an epoch at most.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from training.errors import RunError


class Checkpoints:
    """The checkpoints of one run, under `folder`."""

    def __init__(self, folder: Path, *, model: keras.Model, optimizer: keras.optimizers.Optimizer) -> None:
        """Prepare to save and restore `model` and `optimizer`, whose variables must exist already."""
        # Restoring into variables that do not exist yet restores nothing, silently.
        assert model.built
        optimizer.build(model.trainable_variables)
        # A string variable carries what is not a tensor, so that it is saved in the same instant as the weights.
        self._latest_state = tf.Variable("", dtype=tf.string)
        self._best_state = tf.Variable("", dtype=tf.string)
        # The variables by themselves, not the model: once compiled, a model drags its metrics and optimizer along,
        # and what a checkpoint holds would depend on the loop.
        self._latest = _manager(
            tf.train.Checkpoint(weights=model.variables, optimizer=optimizer.variables, state=self._latest_state),
            folder / "latest",
        )
        self._best = _manager(tf.train.Checkpoint(weights=model.variables, state=self._best_state), folder / "best")

    def save_latest(self, state: dict[str, Any]) -> None:
        """Save weights, optimizer and `state` (anything JSON can hold), replacing the latest before it."""
        _save(self._latest, self._latest_state, state)

    def save_best(self, state: dict[str, Any]) -> None:
        """Save weights and `state`, replacing the best before it."""
        _save(self._best, self._best_state, state)

    def restore_latest(self) -> dict[str, Any] | None:
        """Restore weights and optimizer to the latest checkpoint; return its state, `None` if there is none."""
        return _restore(self._latest, self._latest_state)

    def restore_best(self) -> dict[str, Any] | None:
        """Restore the weights to the best checkpoint; return its state, `None` if there is none."""
        return _restore(self._best, self._best_state)


def read_best_state(folder: Path) -> dict[str, Any] | None:
    """Return the state saved with the best checkpoint under `folder`, without its weights; `None` if there is none."""
    path = tf.train.latest_checkpoint(str(folder / "best"))
    if path is None:
        return None
    state: dict[str, Any] = json.loads(tf.train.load_checkpoint(path).get_tensor("state/.ATTRIBUTES/VARIABLE_VALUE"))
    return state


def _manager(checkpoint: tf.train.Checkpoint, folder: Path) -> tf.train.CheckpointManager:
    manager = tf.train.CheckpointManager(checkpoint, str(folder), max_to_keep=1, checkpoint_name="checkpoint")
    # A process killed while it saved leaves files that no manager knows of.
    kept = manager.latest_checkpoint and Path(manager.latest_checkpoint).name
    for path in folder.glob("checkpoint-*"):
        if path.is_file() and path.name.split(".")[0] != kept:
            path.unlink()
    return manager


def _save(manager: tf.train.CheckpointManager, variable: tf.Variable, state: dict[str, Any]) -> None:
    variable.assign(json.dumps(state))
    # Never the number of a checkpoint that exists: that would be overwritten in place.
    previous = manager.latest_checkpoint
    manager.save(checkpoint_number=1 if previous is None else int(previous.rsplit("-", 1)[1]) + 1)


def _restore(manager: tf.train.CheckpointManager, variable: tf.Variable) -> dict[str, Any] | None:
    path = manager.latest_checkpoint
    if path is None:
        return None
    try:
        manager.checkpoint.restore(path).assert_consumed()
    except (tf.errors.OpError, AssertionError, IndexError, ValueError) as error:
        # A truncated file raises IndexError, another network's ValueError.
        raise RunError(
            f"the checkpoint {path} cannot be restored: it is damaged, or was written for another model "
            f"({str(error).splitlines()[0]})"
        ) from error
    state: dict[str, Any] = json.loads(variable.numpy())
    return state
