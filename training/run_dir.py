"""A run folder: what a training run was asked, where it stands, and what came out.

runs/<run>/
    config.json       what was asked (`TrainingConfig`)
    dataset.json      what it was trained on (`DatasetSummary`)
    checkpoints/      best and latest
    history.csv       the figures of every epoch
    evaluation.json   the test set's verdict on the best checkpoint
    report.md *.png   the same, to look at
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import fcntl
import io
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.callbacks import EpochResult
from training.config import TrainingConfig
from training.data import Dataset
from training.errors import RunError
from training.shell_command import format_command
from training.storage import make_folder, sync, write_file


@dataclass(frozen=True)
class DatasetSummary:
    """What is remembered of a dataset: enough to export the model and to know the data again."""

    name: str
    source: str
    class_names: tuple[str, ...]
    input_shape: tuple[int, int, int]
    train_images: int
    test_images: int
    content_hash: str

    @classmethod
    def of(cls, dataset: Dataset) -> DatasetSummary:
        """Summarise `dataset`."""
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
    """One run on disk. Every file is replaced whole: a killed run leaves none of them half written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.tensorboard = path / "tensorboard"

    @classmethod
    def create(cls, path: Path, config: TrainingConfig) -> RunDir:
        """Make the folder of a new run.

        Raises:
            RunError: there is a run at `path` already.
        """
        run = cls(path)
        make_folder(path)
        with run.lock():
            if (path / "config.json").exists():
                raise RunError(
                    f"{path} holds a run already: go on with it by --resume {path}, or name another with --run"
                )
            run.write_config(config)
        return run

    @classmethod
    def create_numbered(cls, path: Path, config: TrainingConfig) -> RunDir:
        """Make the folder of a new run at `path` or, if that is taken, at `path`-2, `path`-3 and so on."""
        make_folder(path.parent)
        for number in itertools.count(1):
            folder = path if number == 1 else path.with_name(f"{path.name}-{number}")
            with contextlib.suppress(FileExistsError):
                folder.mkdir()  # only one of several processes succeeds
                break
        sync(folder.parent)
        return cls.create(folder, config)

    @classmethod
    def open(cls, path: Path) -> RunDir:
        """Open the folder of a run made before.

        Raises:
            RunError: there is no run at `path`.
        """
        if not (path / "config.json").is_file():
            raise RunError(f"{path} is not a run folder: it has no config.json")
        return cls(path)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep every other process from working on this run; a killed process lets go of it by itself.

        Raises:
            RunError: another process works on it.
        """
        with (self.path / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunError(f"another process is working on {self.path}: wait for it, or stop it") from None
            yield

    def read_config(self) -> TrainingConfig:
        """Return what the run was asked to do.

        Raises:
            RunError: config.json is not what a run writes.
        """
        try:
            return TrainingConfig.from_json((self.path / "config.json").read_text())
        except (ValueError, TypeError) as error:
            raise RunError(f"{self.path / 'config.json'} cannot be read: {error}") from error

    def write_config(self, config: TrainingConfig) -> None:
        """Write config.json."""
        self.write_text("config.json", config.to_json())

    def record_dataset(self, summary: DatasetSummary) -> None:
        """Remember the run's data, or check that it is what it was.

        Raises:
            RunError: the run was begun with other data.
        """
        if not (self.path / "dataset.json").exists():
            self.write_json("dataset.json", dataclasses.asdict(summary))
            return
        known = self.read_dataset()
        if known.content_hash != summary.content_hash:
            raise RunError(
                f"{self.path} was trained on other data: {known.train_images:,} training images from "
                f"{known.source}, not these {summary.train_images:,} from {summary.source}"
            )

    def read_dataset(self) -> DatasetSummary:
        """Return what the run was trained on.

        Raises:
            RunError: the run ended before it had read its data.
        """
        path, again = self.path / "dataset.json", format_command("train", "--resume", self.path)
        values = self._read_json(
            "dataset.json",
            missing=f"the run ended before it had read its data, or the file was lost. It is written anew by: {again}",
        )
        try:
            values["class_names"] = tuple(values["class_names"])
            values["input_shape"] = tuple(values["input_shape"])
            return DatasetSummary(**values)
        except (KeyError, TypeError) as error:
            raise RunError(
                f"{path} is not what a run writes ({error!r}). Delete it, then write it anew by: {again}"
            ) from error

    def read_exported_name(self) -> str | None:
        """Return what a model exported from this run is called; `None` if it has not read its data yet."""
        return self.read_dataset().name if (self.path / "dataset.json").exists() else None

    def write_history(self, history: Sequence[EpochResult]) -> None:
        """Write history.csv, a line an epoch."""
        text = io.StringIO()
        writer = csv.DictWriter(text, [field.name for field in dataclasses.fields(EpochResult)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(dataclasses.asdict(result) for result in history)
        self.write_text("history.csv", text.getvalue())

    def read_history(self) -> list[EpochResult]:
        """Return the epochs that `write_history` wrote; none if the run ended before it could.

        Raises:
            RunError: the file is damaged.
        """
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
                f"{self.path / 'history.csv'} cannot be read ({error!r}). It is written anew by: "
                f"{format_command('train', '--resume', self.path)}"
            ) from error

    def write_evaluation(self, values: dict[str, Any]) -> None:
        """Write evaluation.json."""
        self.write_json("evaluation.json", values)

    def read_evaluation(self) -> dict[str, Any]:
        """Return what evaluation.json holds.

        Raises:
            RunError: the run has not been evaluated.
        """
        return self._read_json(
            "evaluation.json", missing=f"evaluate the run first: {format_command('evaluate', self.path)}"
        )

    def write_json(self, name: str, values: dict[str, Any]) -> None:
        """Write `values` to the file `name` in the folder."""
        self.write_text(name, json.dumps(values, indent=2) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Write `text` to the file `name` in the folder, whole or not at all."""
        # Paths that are not UTF-8 are shown with escapes.
        self.write_bytes(name, text.encode(errors="backslashreplace"))

    def write_bytes(self, name: str, content: bytes) -> None:
        """Write `content` to the file `name` in the folder, whole or not at all."""
        write_file(self.path / name, content)

    def _read_json(self, name: str, *, missing: str) -> dict[str, Any]:
        try:
            values = json.loads((self.path / name).read_text())
        except FileNotFoundError:
            raise RunError(f"{self.path / name} is missing: {missing}") from None
        except ValueError as error:
            raise RunError(f"{self.path / name} cannot be read: {error}") from error
        if not isinstance(values, dict):
            raise RunError(f"{self.path / name} is not what a run writes: expected a JSON object")
        return values
