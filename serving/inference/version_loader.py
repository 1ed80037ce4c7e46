"""Loads a version from its folder: predictor, warm-up, and the signatures that must not be batched."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from serving.inference.model_info import read_label_names
from serving.inference.saved_model import SavedModelPredictor
from serving.inference.signatures import Predictor
from serving.inference.warmup import replay_warmup_records


@dataclass(frozen=True)
class WarmUp:
    """The result of a warm-up: replayed records, and the signatures whose requests must not be batched."""

    records: int
    unbatched: Collection[str]


@dataclass(frozen=True)
class LoadedPredictor:
    """A predictor that is loaded and warmed up, but serves no requests yet."""

    predictor: Predictor
    warmup: WarmUp
    load_s: float  # warm-up included
    warmup_s: float


class VersionLoader(Protocol):
    """Loads versions; in this process, or in several."""

    def load(self, path: Path) -> LoadedPredictor:
        """Load and warm up the version in a folder.

        Raises:
            ModelLoadError: it cannot be loaded, or a warm-up record fails.
        """

    def warm_up(self, path: Path, predictor: Predictor) -> WarmUp:
        """Replay the warm-up records of a loaded version.

        Raises:
            ModelLoadError: a record fails.
        """

    def read_label_names(self, predictor: Predictor) -> tuple[str, ...]:
        """Return the class names that the model itself has; see `model_info.read_label_names`."""


class InProcessLoader:
    """Loads versions in this process.

    Args:
        load_predictor: loads a predictor from a version's folder; raises `ModelLoadError`.
        find_dependent: returns the signatures of a version whose rows influence each other.
    """

    def __init__(
        self,
        load_predictor: Callable[[Path], Predictor] = SavedModelPredictor,
        find_dependent: Callable[[Path, Predictor], Collection[str]] = lambda *_: (),
    ) -> None:
        self._load_predictor = load_predictor
        self._find_dependent = find_dependent

    def load(self, path: Path) -> LoadedPredictor:
        """See `VersionLoader.load`."""
        started_s = time.perf_counter()
        predictor = self._load_predictor(path)
        loaded_s = time.perf_counter()
        records = replay_warmup_records(path, predictor)
        warmed_up_s = time.perf_counter()
        unbatched = self._find_dependent(path, predictor)
        return LoadedPredictor(predictor, WarmUp(records, unbatched), warmed_up_s - started_s, warmed_up_s - loaded_s)

    def warm_up(self, path: Path, predictor: Predictor) -> WarmUp:
        """See `VersionLoader.warm_up`."""
        return WarmUp(replay_warmup_records(path, predictor), self._find_dependent(path, predictor))

    def read_label_names(self, predictor: Predictor) -> tuple[str, ...]:
        """See `VersionLoader.read_label_names`."""
        return read_label_names(predictor)
