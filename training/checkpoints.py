"""The best and the latest checkpoint of a run, saved atomically.

    checkpoints/latest/    after the last epoch
    checkpoints/best/      after the epoch with the lowest validation loss
        checkpoint-N.index, checkpoint-N.data-00000-of-00001    weights, optimizer and `TrainingState`
        checkpoint                                              names the newest, for TensorFlow's own tools

Both contain everything for an exact resume, so each replaces the other if it is lost. A checkpoint is written to a
hidden folder, synced and renamed, and the folder is synced before the previous one is deleted: one is always complete.

Reading verifies TensorFlow's checksum of every tensor, and never writes. Only complete checkpoints are deleted, after
a newer one is durable; other files in the folders are kept.
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
    """State in a checkpoint besides its tensors.

    Attributes:
        history: metrics of all epochs up to this checkpoint.
        plateau: state of `PlateauSchedule`.
        config: JSON values of the run's config; `None` in checkpoints of earlier versions.
        content_hash: of the run's data; `None` in checkpoints of earlier versions.
    """

    history: tuple[EpochResult, ...]
    plateau: dict[str, float]
    config: dict[str, Any] | None
    content_hash: str | None = None

    def to_json(self) -> str:
        """Return the state as JSON, for `from_json`."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> TrainingState:
        """Parse the output of `to_json`; invalid JSON raises ValueError, KeyError or TypeError."""
        values = json.loads(text)
        # Best checkpoints of earlier versions contain only the metrics of their epoch.
        history = values.get("history") or [values]
        return cls(
            history=tuple(EpochResult(**result) for result in history),
            plateau=values.get("plateau", {}),
            config=values.get("config"),
            content_hash=values.get("content_hash"),
        )


@dataclass(frozen=True)
class _Checkpoint:
    path: Path  # without the suffixes of its files
    state: TrainingState
    weights: list[np.ndarray]
    optimizer: list[np.ndarray]

    @property
    def epoch(self) -> int:
        return self.state.history[-1].epoch


class Checkpoints:
    """Saves and restores the checkpoints of a run in the process that trains it."""

    def __init__(self, folder: Path, *, model: keras.Model, optimizer: keras.optimizers.Optimizer) -> None:
        """Use `folder` for the checkpoints of `model`, which must be built, and `optimizer`."""
        # Restoring into an unbuilt model silently restores nothing.
        assert model.built
        optimizer.build(model.trainable_variables)
        self._latest, self._best = folder / "latest", folder / "best"
        self._weights, self._optimizer = model.variables, optimizer.variables
        # A string variable contains the state, so that it is saved atomically with the weights.
        self._state = tf.Variable("", dtype=tf.string)
        # Variables instead of the model: a compiled model would add its metrics and optimizer, and the contents would
        # depend on the loop.
        self._checkpoint = tf.train.Checkpoint(weights=self._weights, optimizer=self._optimizer, state=self._state)
        # Complete checkpoints by folder, replaced by the next save.
        self._complete: dict[Path, list[Path]] = {self._latest: [], self._best: []}

    def save_latest(self, state: TrainingState) -> None:
        """Replace the latest checkpoint."""
        self._save(self._latest, state)

    def save_best(self, state: TrainingState) -> None:
        """Replace the best checkpoint."""
        self._save(self._best, state)

    def restore(self) -> TrainingState | None:
        """Restore the newest complete checkpoint; return its state, `None` if there is no checkpoint.

        A missing or damaged latest or best checkpoint is replaced by the other one.

        Raises:
            RunError: no checkpoint is complete, or they were written for another model.
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
                raise RunError(f"no checkpoint is usable: {_listed(damaged)}")
            return None
        # Best checkpoints of earlier versions have no optimizer.
        whole = [checkpoint for checkpoint in found.values() if checkpoint.optimizer]
        if not whole:
            raise RunError(f"resuming needs the latest checkpoint; {_listed(damaged) or 'it is missing'}")
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
        shutil.rmtree(partial, ignore_errors=True)  # left by a killed process
        # A new name, because an existing file would be overwritten.
        names = (_OWN_NAME.match(path.name) for path in folder.iterdir())
        name = f"checkpoint-{max((int(own[1]) for own in names if own), default=0) + 1}"
        try:
            self._checkpoint.write(str(partial / name))
            for suffix in (_INDEX, _DATA):
                sync(partial / f"{name}{suffix}")
            # The data last, and deleted first, so that an interrupted save leaves only small files.
            for suffix in (_INDEX, _DATA):
                (partial / f"{name}{suffix}").rename(folder / f"{name}{suffix}")
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        sync(folder)
        write_file(
            folder / "checkpoint", f'model_checkpoint_path: "{name}"\nall_model_checkpoint_paths: "{name}"\n'.encode()
        )
        for path in self._complete[folder]:
            if not _OWN_NAME.fullmatch(path.name):
                continue  # a copy made by the user
            for suffix in (_DATA, _INDEX):
                Path(f"{path}{suffix}").unlink(missing_ok=True)
        self._complete[folder] = [folder / name]


def restore_best(folder: Path, model: keras.Model) -> TrainingState | None:
    """Restore a model's weights from the best checkpoint; return its state, `None` if there is no checkpoint.

    If the best is missing or damaged, a warning is logged and the latest is used.

    Raises:
        RunError: no checkpoint is complete, or they were written for another model.
    """
    if best := _find_best(folder):
        _assign(best, best.weights, model.variables, "model")
    return best.state if best else None


def read_best_state(folder: Path) -> TrainingState | None:
    """Return the state that `restore_best` returns, without a model."""
    best = _find_best(folder)
    return best.state if best else None


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
        raise RunError(f"no checkpoint is usable: {_listed(damaged | others)}")
    return None


def _read_all(folder: Path) -> tuple[list[_Checkpoint], dict[Path, str]]:
    """Return the complete checkpoints in a folder, the newest last, and the reason why later ones are damaged."""
    complete: list[_Checkpoint] = []
    damaged: dict[Path, str] = {}
    for data in sorted(folder.glob(f"*{_DATA}"), key=lambda path: (len(path.name), path.name)):
        path = data.with_name(data.name.removesuffix(_DATA))
        try:
            complete.append(_read(path))
            damaged.clear()  # a complete one follows
        # Truncated files raise IndexError; an invalid state ValueError, KeyError or TypeError.
        except (tf.errors.OpError, OSError, IndexError, ValueError, KeyError, TypeError, RuntimeError) as error:
            # Replaced meanwhile by a training process: read the newer one.
            if not os.path.lexists(data):
                return _read_all(folder)
            damaged[path] = (str(error).splitlines() or [type(error).__name__])[0]
    complete.sort(key=lambda checkpoint: checkpoint.epoch)  # stable: of equal epochs, the higher number is last
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
        raise RunError(f"the checkpoint {checkpoint.path} was written for another {owner} than the one in config.json")
    for value, variable in zip(values, variables, strict=True):
        variable.assign(value)


def _listed(damaged: dict[Path, str]) -> str:
    return ", ".join(f"the checkpoint {path} is damaged ({reason})" for path, reason in damaged.items())
