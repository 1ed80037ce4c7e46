"""The repository of a worker: it loads and serves what the supervisor says."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

from typing_extensions import override

from serving.greenlets import run_blocking
from serving.inference.model_config import ModelConfig
from serving.inference.repository import ModelRepository, ModelVersion
from serving.inference.signatures import Predictor
from serving.inference.statistics import CountedPredictor, Statistics
from serving.inference.version_loader import LoadedPredictor, VersionLoader, WarmUp
from serving.workers.channel import Channel
from serving.workers.messages import (
    Load,
    LoadModel,
    LoadReport,
    Released,
    Reload,
    Served,
    State,
    UnloadModel,
    WarmUpAgain,
)


class FollowingRepository(ModelRepository):
    """Serves the versions of the last `State`. What changes the served models goes to the supervisor.

    `load_version`, `warm_up`, `drop` and `apply` are called by one thread.

    Args:
        channel: to the supervisor.
        required: see `ModelRepository`.
        loader: loads versions in this process.
        wrap_predictor: see `LocalRepository`.
    """

    def __init__(
        self,
        channel: Channel,
        *,
        required: Sequence[str],
        loader: VersionLoader,
        wrap_predictor: Callable[[str, Predictor, Collection[str]], Predictor],
    ) -> None:
        super().__init__((), required=required)
        self._channel = channel
        self._loader = loader
        self._wrap_predictor = wrap_predictor
        self._predictors: dict[int, LoadedPredictor] = {}  # by the number of their load
        self._state = State()
        self._has_loaded = threading.Event()

    def load_version(self, message: Load) -> LoadReport:
        """Load a version without serving it. Raises ModelLoadError."""
        loaded = self._loader.load(message.path)
        self._predictors[message.number] = loaded
        names = self._loader.read_label_names(loaded.predictor)
        return LoadReport(loaded.warmup, names, loaded.load_s, loaded.warmup_s)

    def warm_up(self, message: WarmUpAgain) -> WarmUp:
        """Replay the warm-up records of a loaded version. Raises ModelLoadError."""
        return self._loader.warm_up(message.path, self._predictors[message.load].predictor)

    def drop(self, load: int) -> None:
        """Forget a loaded version that will not be served."""
        self._predictors.pop(load, None)
        gc.collect()  # TensorFlow's Python objects form reference cycles

    def apply(self, state: State) -> None:
        """Serve the versions of a state, and report its statuses."""
        available = {
            name: {number: self._serve_version(name, number, served) for number, served in versions.items()}
            for name, versions in state.versions.items()
        }
        # Before the old versions are released: what releases them looks whether their load is still served.
        for load in _loads(self._state) - _loads(state):
            self._predictors.pop(load, None)
        with self._update_lock:
            self._state = state
            self._names = state.names
            self._available = available
            self._labels = {name: dict(labels) for name, labels in state.labels.items()}
            self._statuses = {name: dict(statuses) for name, statuses in state.statuses.items()}
            self._folder_problems = state.folder_problems
            self._load_counts = dict(state.load_counts)
            self._loaded = state.is_loaded
        if state.is_loaded:
            self._has_loaded.set()

    def _serve_version(self, name: str, number: int, served: Served) -> ModelVersion:
        current = self._available.get(name, {}).get(number)
        before = self._state.versions.get(name, {}).get(number)
        if current is not None and before is not None and before.has_same_batcher(served):
            return current if before.info == served.info else replace(current, info=served.info)
        statistics = Statistics()
        counted = CountedPredictor(self._predictors[served.load].predictor, statistics)
        wrapped = self._wrap_predictor(name, counted, served.unbatched)
        # The callback runs in the thread that releases the last reference, so it only queues the load.
        weakref.finalize(wrapped, self._released.put, ("", served.load)).atexit = False
        return ModelVersion(name, number, wrapped, served.info, statistics)

    @override
    def _finish_unloading(self, name: str, version: int) -> None:
        """Tell the supervisor that a load is released; `version` is its number."""
        gc.collect()  # TensorFlow's Python objects form reference cycles
        if version not in self._predictors:  # otherwise it is served with another batcher
            self._channel.post(Released(version))

    @override
    def load(self) -> None:
        self._has_loaded.wait()

    @override
    def _poll(self) -> None:
        pass  # the supervisor polls

    @override
    def problem(self, name: str) -> str:
        return self._state.problems.get(name) or super().problem(name)

    @override
    def reload(self, configs: Sequence[ModelConfig]) -> None:
        run_blocking(self._channel.call, Reload(configs))

    @override
    def load_model(self, name: str) -> None:
        run_blocking(self._channel.call, LoadModel(name))

    @override
    def unload_model(self, name: str) -> None:
        run_blocking(self._channel.call, UnloadModel(name))


def _loads(state: State) -> set[int]:
    return {served.load for versions in state.versions.values() for served in versions.values()}
