"""The best and the latest checkpoint of a run, and the way back to them.

    checkpoints/latest/    after the last epoch
    checkpoints/best/      after the epoch with the lowest validation loss
        checkpoint-N.index, checkpoint-N.data-00000-of-00001    weights, optimizer and `TrainingState`
        checkpoint                                              names the newest, for TensorFlow's own tools

Both hold all that an exact resume needs, so each can stand in for the other. A checkpoint is written to a hidden
folder, synced, renamed, and the folder synced before the predecessor is deleted: there is a complete one at any time.

Reading decides by content: TensorFlow verifies a checksum for every tensor. Reading never writes, and only complete
checkpoints are ever deleted, after a newer one is durable; any other file in the folders stays.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from training.errors import RunError
from training.history import EpochResult
from training.storage import make_folder, sync, write_file

_INDEX, _DATA = ".index", ".data-00000-of-00001"
_OWN_NAME = re.compile(r"checkpoint-(\d+)", re.ASCII)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """What a checkpoint holds besides tensors.

    Attributes:
        history: the figures of every epoch up to this checkpoint's.
        plateau: of `PlateauSchedule`.
        config: the run's config as JSON values; `None` in checkpoints of earlier versions.
        content_hash: of the data that the run is trained on; `None` in checkpoints of earlier versions.
    """

    history: tuple[EpochResult, ...]
    plateau: dict[str, float]
    config: dict[str, Any] | None
    content_hash: str | None = None

    def to_json(self) -> str:
        """Return the state as JSON text that `from_json` reads back."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> TrainingState:
        """Read what `to_json` wrote.

        Raises:
            ValueError, KeyError, TypeError: the text is something else.
        """
        values = json.loads(text)
        # The best checkpoints of earlier versions held nothing but the figures of their epoch.
        history = values.get("history") or [values]
        return cls(
            history=tuple(EpochResult(**result) for result in history),
            plateau=values.get("plateau", {}),
            config=values.get("config"),
            content_hash=values.get("content_hash"),
        )


@dataclass(frozen=True)
class _Checkpoint:
    path: Path  # without the endings of its files
    state: TrainingState
    weights: list[np.ndarray]
    optimizer: list[np.ndarray]

    @property
    def epoch(self) -> int:
        return self.state.history[-1].epoch


class Checkpoints:
    """The checkpoints of one run, under `folder`, for the process that trains it."""

    def __init__(self, folder: Path, *, model: keras.Model, optimizer: keras.optimizers.Optimizer) -> None:
        """Prepare to save and restore `model` and `optimizer`, whose variables must exist already."""
        # Restoring into variables that do not exist yet restores nothing, silently.
        assert model.built
        optimizer.build(model.trainable_variables)
        self._latest, self._best = folder / "latest", folder / "best"
        self._weights, self._optimizer = model.variables, optimizer.variables
        # A string variable carries what is not a tensor, so that it is saved in the same instant as the weights.
        self._state = tf.Variable("", dtype=tf.string)
        # The variables by themselves, not the model: once compiled, a model drags its metrics and optimizer along,
        # and what a checkpoint holds would depend on the loop.
        self._checkpoint = tf.train.Checkpoint(weights=self._weights, optimizer=self._optimizer, state=self._state)
        # Complete checkpoints, by folder: what the next save there replaces.
        self._complete: dict[Path, list[Path]] = {self._latest: [], self._best: []}

    def save_latest(self, state: TrainingState) -> None:
        """Save weights, optimizer and `state`, replacing the latest before it."""
        self._save(self._latest, state)

    def save_best(self, state: TrainingState) -> None:
        """Save weights, optimizer and `state`, replacing the best before it."""
        self._save(self._best, state)

    def restore(self) -> TrainingState | None:
        """Restore weights and optimizer to the newest complete checkpoint; return its state, `None` if there is none.

        If that is the best, because the latest is missing or damaged, it is saved as the latest too; if the best is
        missing or damaged, the latest takes its place.

        Raises:
            RunError: there are checkpoints, but none is complete, or they were written for another model.
        """
        found: dict[Path, _Checkpoint] = {}
        damaged: dict[Path, str] = {}
        for folder in (self._latest, self._best):
            complete, bad = _read_all(folder)
            self._complete[folder] = [checkpoint.path for checkpoint in complete]
            damaged |= bad
            if complete:
                found[folder] = complete[-1]
        if not found:
            if damaged:
                raise RunError(f"no checkpoint can be used: {_listed(damaged)}")
            return None
        # The best checkpoints of earlier versions held no optimizer.
        whole = [checkpoint for checkpoint in found.values() if checkpoint.optimizer]
        if not whole:
            raise RunError(f"the latest checkpoint is needed to resume; {_listed(damaged) or 'it is missing'}")
        newest = max(whole, key=lambda checkpoint: checkpoint.epoch)
        _assign(newest, newest.weights, self._weights, "model")
        _assign(newest, newest.optimizer, self._optimizer, "optimizer")
        if damaged:
            logger.warning("%s; using %s, of epoch %d, instead", _listed(damaged), newest.path, newest.epoch)
        if self._latest not in found or found[self._latest].epoch < newest.epoch:
            self.save_latest(newest.state)
        if self._best not in found:
            self.save_best(newest.state)
        return newest.state

    def _save(self, folder: Path, state: TrainingState) -> None:
        self._state.assign(state.to_json())
        make_folder(folder)
        partial = folder / ".partial"
        shutil.rmtree(partial, ignore_errors=True)  # a killed process left it
        # Never a name that is in use: that file would be overwritten.
        names = (_OWN_NAME.match(path.name) for path in folder.iterdir())
        name = f"checkpoint-{max((int(own[1]) for own in names if own), default=0) + 1}"
        try:
            self._checkpoint.write(str(partial / name))
            for ending in (_INDEX, _DATA):
                sync(partial / f"{name}{ending}")
            # The data last, and deleted first: then what an interrupted save leaves behind is small.
            for ending in (_INDEX, _DATA):
                (partial / f"{name}{ending}").rename(folder / f"{name}{ending}")
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        sync(folder)
        write_file(
            folder / "checkpoint",
            f'model_checkpoint_path: "{name}"\nall_model_checkpoint_paths: "{name}"\n'.encode(),
        )
        for path in self._complete[folder]:
            if not _OWN_NAME.fullmatch(path.name):
                continue  # somebody's copy
            for ending in (_DATA, _INDEX):
                Path(f"{path}{ending}").unlink(missing_ok=True)
        self._complete[folder] = [folder / name]


def restore_best(folder: Path, model: keras.Model) -> TrainingState | None:
    """Restore a model's weights to the best checkpoint under `folder`; return its state, `None` if there is none.

    If it is missing or damaged, the latest is used instead, and a warning says so.

    Raises:
        RunError: there are checkpoints, but none is complete, or they were written for another model.
    """
    best = _find_best(folder)
    if best is None:
        return None
    _assign(best, best.weights, model.variables, "model")
    return best.state


def read_best_state(folder: Path) -> TrainingState | None:
    """Return the state that `restore_best` would return, without a model.

    Raises:
        RunError: there are checkpoints, but none is complete.
    """
    best = _find_best(folder)
    return None if best is None else best.state


def _find_best(folder: Path) -> _Checkpoint | None:
    complete, damaged = _read_all(folder / "best")
    if complete:
        return complete[-1]
    latest, others = _read_all(folder / "latest")
    if latest:
        reason = _listed(damaged) if damaged else f"{folder / 'best'} has no checkpoint"
        logger.warning("%s; using the latest, %s, of epoch %d, instead", reason, latest[-1].path, latest[-1].epoch)
        return latest[-1]
    if damaged or others:
        raise RunError(f"no checkpoint can be used: {_listed(damaged | others)}")
    return None


def _read_all(folder: Path) -> tuple[list[_Checkpoint], dict[Path, str]]:
    """Read every checkpoint in a folder.

    Returns:
        The complete ones, the newest last, and what is wrong with each that was written after them.
    """
    complete: list[_Checkpoint] = []
    damaged: dict[Path, str] = {}
    for data in sorted(folder.glob(f"*{_DATA}"), key=lambda path: (len(path.name), path.name)):
        path = data.with_name(data.name.removesuffix(_DATA))
        try:
            complete.append(_read(path))
            damaged.clear()  # a complete one has followed
        # Truncated files raise IndexError; ValueError, KeyError and TypeError come from a state that is none.
        except (tf.errors.OpError, OSError, IndexError, ValueError, KeyError, TypeError, RuntimeError) as error:
            # A training process may have replaced it meanwhile: then the newer one is read.
            if not os.path.lexists(data):
                return _read_all(folder)
            damaged[path] = (str(error).splitlines() or [type(error).__name__])[0]
    complete.sort(key=lambda checkpoint: checkpoint.epoch)  # stable: of two of one epoch, the higher number comes last
    return complete, damaged


def _read(path: Path) -> _Checkpoint:
    reader = tf.train.load_checkpoint(str(path))
    # Reading all tensors verifies all checksums.
    tensors = {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}

    def take(kind: str) -> list[np.ndarray]:
        named = {int(name.split("/")[1]): value for name, value in tensors.items() if name.startswith(f"{kind}/")}
        return [named[number] for number in range(len(named))]

    state = TrainingState.from_json(tensors["state/.ATTRIBUTES/VARIABLE_VALUE"])
    return _Checkpoint(path, state, take("weights"), take("optimizer"))


def _assign(checkpoint: _Checkpoint, values: Sequence[np.ndarray], variables: Sequence[Any], owner: str) -> None:
    if [value.shape for value in values] != [tuple(variable.shape) for variable in variables]:
        raise RunError(f"the checkpoint {checkpoint.path} was written for another {owner} than config.json describes")
    for value, variable in zip(values, variables, strict=True):
        variable.assign(value)


def _listed(damaged: dict[Path, str]) -> str:
    return ", ".join(f"the checkpoint {path} is damaged ({reason})" for path, reason in damaged.items())
