"""The directory of a run: its config, state and results.

runs/<run>/
    config.json       `TrainingConfig`
    dataset.json      `DatasetInfo`
    checkpoints/      best and latest
    features/         of the training images, for the variant transfer
    history.csv       metrics of every epoch
    evaluation.json   metrics of the best checkpoint on the test images
    guard*.npz        constants of its guarded signatures; guard-mirror.npz with test-time augmentation
    report.md *.png   the same for people
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import fcntl
import io
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from training.config import TrainingConfig
from training.data import Dataset
from training.errors import RunError
from training.history import EpochResult
from training.shell_command import format_command
from training.storage import is_full, make_folder, sync, write_file


@dataclass(frozen=True)
class DatasetInfo:
    """Dataset metadata stored with the run: for the export, and to detect changed data."""

    name: str
    source: str
    class_names: tuple[str, ...]
    input_shape: tuple[int, int, int]
    train_images: int
    test_images: int
    content_hash: str

    @classmethod
    def of(cls, dataset: Dataset) -> DatasetInfo:
        """Return the metadata of `dataset`."""
        height, width, channels = dataset.train.images.shape[1:]
        return cls(
            name=dataset.name,
            source=dataset.source,
            class_names=dataset.class_names,
            input_shape=(height, width, channels),
            train_images=len(dataset.train.labels),
            test_images=len(dataset.test.labels),
            content_hash=dataset.content_hash,
        )


class RunDir:
    """One run on disk. Files are replaced atomically: a killed process leaves none half-written.

    Attributes:
        path: the directory.
        checkpoints, tensorboard: its subdirectories.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.tensorboard = path / "tensorboard"

    @classmethod
    def create(cls, path: Path, config: TrainingConfig) -> RunDir:
        """Create the directory of a new run; raise `RunError` if `path` has a run already, or cannot be created."""
        run = cls(path)
        _make_directory(path)
        with run.lock():
            if (path / "config.json").exists():
                raise RunError(
                    f"{path} contains a run already: resume it with --resume {path}, or choose another with --run"
                )
            run.write_config(config)
        return run

    @classmethod
    def create_default(cls, config: TrainingConfig, dataset_name: str) -> RunDir:
        """Create a directory `runs/TIME-DATASET-VARIANT-LOOP`."""
        name = f"{datetime.now():%Y%m%d-%H%M%S}-{dataset_name}-{config.variant}-{config.loop}"
        return cls.create_numbered(Path("runs") / name, config)

    @classmethod
    def create_numbered(cls, path: Path, config: TrainingConfig) -> RunDir:
        """Like `create`, at `path` or, if that exists, at `path`-2, `path`-3 and so on."""
        return cls.create(make_numbered(path), config)

    @classmethod
    def open(cls, path: Path) -> RunDir:
        """Open the directory of an existing run; raise `RunError` if there is none at `path`."""
        if not (path / "config.json").is_file():
            raise RunError(f"{path} is not a run directory: it has no config.json")
        return cls(path)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Exclude other processes from this run; raise `RunError` if one holds the lock.

        The system releases the lock of a killed process.
        """
        with (self.path / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunError(f"another process is using {self.path}: wait for it, or stop it") from None
            yield

    def read_config(self) -> TrainingConfig:
        """Return the config; raise `RunError` if config.json is invalid."""
        try:
            return TrainingConfig.from_json((self.path / "config.json").read_text())
        except (ValueError, TypeError) as error:
            raise RunError(f"{self.path / 'config.json'} is invalid: {error}") from error

    def write_config(self, config: TrainingConfig) -> None:
        """Write config.json."""
        self._write_text("config.json", config.to_json())

    def check_config(self, config: TrainingConfig, trained: Mapping[str, Any]) -> None:
        """Raise `RunError` if a value that must not change differs from a checkpoint's config, `trained`, as JSON."""
        if changes := config.changes_from(trained):
            listed = ", ".join(f"{name} is {now!r} and was {then!r}" for name, (now, then) in changes.items())
            raise RunError(
                f"{self.path / 'config.json'} was changed after the checkpoint was written: {listed}. Change it back, "
                "or start a new run; only epochs, data, stream, weights and tensorboard may change"
            )

    def has_dataset(self) -> bool:
        """Return whether dataset.json exists."""
        return (self.path / "dataset.json").exists()

    def write_dataset(self, info: DatasetInfo) -> None:
        """Write dataset.json."""
        self._write_json("dataset.json", dataclasses.asdict(info))

    def read_dataset(self) -> DatasetInfo:
        """Return the metadata of the run's data; raise `RunError` if dataset.json is missing or invalid."""
        again = format_command("train", "--resume", self.path)
        missing = f"the run ended before it read its data, or the file was lost. Write it again with: {again}"
        values = self._read_json("dataset.json", missing=missing)
        try:
            values["class_names"] = tuple(values["class_names"])
            values["input_shape"] = tuple(values["input_shape"])
            return DatasetInfo(**values)
        except (KeyError, TypeError) as error:
            raise RunError(
                f"{self.path / 'dataset.json'} is invalid ({error!r}). Delete it, then write it again with: {again}"
            ) from error

    def write_history(self, history: Sequence[EpochResult]) -> None:
        """Write history.csv, one line per epoch."""
        text = io.StringIO()
        writer = csv.DictWriter(text, [field.name for field in dataclasses.fields(EpochResult)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(dataclasses.asdict(result) for result in history)
        self._write_text("history.csv", text.getvalue())

    def read_history(self) -> list[EpochResult]:
        """Return the epochs in history.csv, none if it does not exist; raise `RunError` if it is invalid."""
        if not (self.path / "history.csv").exists():
            return []
        try:
            with (self.path / "history.csv").open(newline="") as file:
                return [
                    EpochResult(epoch=int(row.pop("epoch")), **{name: float(value) for name, value in row.items()})
                    for row in csv.DictReader(file)
                ]
        except (ValueError, TypeError, KeyError) as error:
            raise RunError(
                f"{self.path / 'history.csv'} is invalid ({error!r}). Write it again with: "
                f"{format_command('train', '--resume', self.path)}"
            ) from error

    def write_evaluation(self, values: dict[str, Any]) -> None:
        """Write evaluation.json."""
        self._write_json("evaluation.json", values)

    def read_evaluation(self) -> dict[str, Any]:
        """Return the contents of evaluation.json; raise `RunError` if the run has not been evaluated."""
        missing = f"evaluate the run first: {format_command('evaluate', self.path)}"
        return self._read_json("evaluation.json", missing=missing)

    def guard_path(self, *, mirror: bool) -> Path:
        """Return the path of the guard's constants, fitted when the run is evaluated."""
        return self.path / ("guard-mirror.npz" if mirror else "guard.npz")

    def write_report(self, text: str, plots: Mapping[str, bytes]) -> Path:
        """Write report.md and its plots, the contents of PNG files by name; return the path of report.md."""
        for name, content in plots.items():
            write_file(self.path / f"{name}.png", content)
        self._write_text("report.md", text)
        return self.path / "report.md"

    def _write_json(self, name: str, values: dict[str, Any]) -> None:
        self._write_text(name, json.dumps(values, indent=2) + "\n")

    def _write_text(self, name: str, text: str) -> None:
        # Paths that are not UTF-8 are written with escapes.
        write_file(self.path / name, text.encode(errors="backslashreplace"))

    def _read_json(self, name: str, *, missing: str) -> dict[str, Any]:
        try:
            values = json.loads((self.path / name).read_text())
        except FileNotFoundError:
            raise RunError(f"{self.path / name} is missing: {missing}") from None
        except ValueError as error:
            raise RunError(f"{self.path / name} is invalid: {error}") from error
        if not isinstance(values, dict):
            raise RunError(f"{self.path / name} is invalid: expected a JSON object")
        return values


def make_numbered(path: Path) -> Path:
    """Create a directory at `path` or, if that exists, at `path`-2, `path`-3 and so on; return its path.

    Raises:
        RunError: the directory cannot be created.
    """
    _make_directory(path.parent)
    for number in itertools.count(1):
        folder = path if number == 1 else path.with_name(f"{path.name}-{number}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir()  # succeeds in only one of several processes
            break
    sync(folder.parent)
    return folder


def _make_directory(path: Path) -> None:
    try:
        make_folder(path)
    except OSError as error:
        if is_full(error):
            raise
        reason = "is not a folder" if isinstance(error, FileExistsError) else error.strerror
        raise RunError(
            f"the run's folder {path} cannot be made: {error.filename}: {reason}. Choose another with --run"
        ) from error
