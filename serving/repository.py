"""The versions that can answer: handed out, shown, and unloaded when nobody needs them any more."""

from __future__ import annotations

import gc
import logging
import queue
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from serving.errors import InvalidRequest, ModelNotFound, NotReady, StartupError
from serving.model_config import ModelConfig
from serving.predictor import Predictor

logger = logging.getLogger(__name__)

MAX_ENDED = 20  # versions of a model that are shown after their end


@dataclass(frozen=True, eq=False)
class ModelVersion:
    """A version that answers. Whoever holds its predictor may use it; it is unloaded when nobody does."""

    name: str
    version: int
    predictor: Predictor
    card: dict[str, Any] | None  # assets.extra/model.json, shown where it exists, never needed


@dataclass(frozen=True)
class VersionStatus:
    """What became of a version, in the words of TensorFlow Serving's status API."""

    name: str
    version: int
    state: str = "START"  # START, LOADING, AVAILABLE, UNLOADING or END
    error_code: str = "OK"
    error_message: str = ""
    warmup_records: int = 0


class ModelRepository(ABC):
    """Knows the versions that answer, and hands them out. Where they come from is its subclasses' affair.

    One thread at a time changes what is served; any number may read it meanwhile.

    Args:
        names: the models without which the repository is not ready.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._awaited = frozenset(names)
        self._changing = threading.Lock()
        self._loaded = False
        # Read without the lock, so never changed in place: replaced whole.
        self._names = tuple(sorted(self._awaited))
        self._available: dict[str, dict[int, ModelVersion]] = {}
        self._labels: dict[str, dict[str, int]] = {}
        self._statuses: dict[str, dict[int, VersionStatus]] = {}
        self._released: queue.SimpleQueue[tuple[str, int]] = queue.SimpleQueue()

    @abstractmethod
    def _look(self) -> None:
        """Bring what is served up to date; called by one thread at a time."""

    @abstractmethod
    def reload(self, configs: Sequence[ModelConfig]) -> None:
        """Serve exactly these models from now on; returns when they are loaded.

        Raises:
            ModelFailed: some could not be loaded, a label is for a version that is not served, or what is served
                is not decided here.
        """

    def names(self) -> list[str]:
        """List the models that have a version to answer with, in alphabetical order."""
        return sorted(self._available)

    def all_names(self) -> list[str]:
        """List every model that is to be served, those that could not be loaded included."""
        return list(self._names)

    def resolve(self, name: str, *, version: int | None = None, label: str | None = None) -> ModelVersion:
        """Return the newest version of a model that can answer, or the one asked for by number or by label.

        Raises:
            NotReady: the model exists and is still being loaded.
            ModelNotFound: there is nothing of that name and version to answer with.
            InvalidRequest: no version of the model has that label.
        """
        if label is not None:
            version = self._labels.get(name, {}).get(label)
            if version is None:
                raise InvalidRequest(f"Unrecognized servable version label: {label}")
        available = self._available.get(name, {})
        if version is None and available:
            return available[max(available)]
        if version is not None and version in available:
            return available[version]
        if not self._loaded and not available and name in self._names:
            raise NotReady(f"model {name} is still being loaded; try again in a few seconds")
        wanted = f"Latest({name})" if version is None else f"Specific({name}, {version})"
        raise ModelNotFound(f"Servable not found for request: {wanted}")

    def versions(self, name: str) -> list[VersionStatus]:
        """List the versions of a model that were tried or wait to be, newest first.

        Older versions that were never needed stay out, as TensorFlow Serving's default policy has it.

        Raises:
            ModelNotFound: there is no model of that name.
        """
        statuses = self._statuses.get(name)
        if not statuses:
            raise ModelNotFound(f"Could not find any versions of model {name}")
        return [statuses[version] for version in sorted(statuses, reverse=True)]

    def all_versions(self) -> list[VersionStatus]:
        """List the versions of every model that is to be served, those that were tried or wait to be."""
        statuses = self._statuses
        return [
            statuses[name][version] for name in self.all_names() for version in sorted(statuses.get(name, {}))[::-1]
        ]

    @property
    def ready(self) -> bool:
        """Whether there is something to answer with, and nothing missing that was there at the start."""
        return self.not_ready_because is None

    @property
    def not_ready_because(self) -> str | None:
        """Why the repository is not ready, in a sentence; None when it is.

        A model that came later and cannot be loaded does not take a service out of use that was serving others.
        """
        missing = sorted(name for name in self._awaited if name in self._names and name not in self._available)
        if not self._loaded:
            return f"loading {', '.join(missing)}" if missing else "loading"
        if missing:
            return "; ".join(f"{name}: {self._problem(name)}" for name in missing)
        return None if self._available else "there is no model to answer with"

    def _problem(self, name: str) -> str:
        statuses = sorted(self._statuses.get(name, {}).values(), key=lambda status: -status.version)
        return next((status.error_message for status in statuses if status.error_message), "no version to serve")

    def load(self) -> None:
        """Load what is to be served, for the first time.

        Raises:
            StartupError: not one model could be loaded.
        """
        self.update()
        self._loaded = True
        if not self._available:
            raise StartupError(f"no model could be loaded: {self.not_ready_because}")

    def update(self) -> None:
        """Bring what is served up to date."""
        with self._changing:
            self._look()

    def watch(self, interval_s: float) -> NoReturn:
        """Bring what is served up to date every so many seconds; does not return."""
        next_look_s = time.monotonic() + interval_s
        while True:
            try:
                released = self._released.get(timeout=max(0.0, next_look_s - time.monotonic()))
            except queue.Empty:
                try:
                    self.update()
                except Exception:  # whatever a look meets, there has to be a next one
                    logger.exception("the models could not be looked at")
                next_look_s = time.monotonic() + interval_s
            else:
                self._finish_unloading(*released)

    def _serve(self, loaded: ModelVersion) -> None:
        """Hand out a version from now on."""
        # Called when the last request that uses it is done, in whatever thread that is: only a note is left then.
        weakref.finalize(loaded.predictor, self._released.put, (loaded.name, loaded.version)).atexit = False
        versions = {**self._available.get(loaded.name, {}), loaded.version: loaded}
        self._available = {**self._available, loaded.name: versions}

    def _unload(self, name: str, *, keep: set[int]) -> None:
        """Take versions of a model out of use; each is unloaded when the last request that has it is done."""
        available = self._available.get(name, {})
        if gone := available.keys() - keep:
            for version in gone:
                logger.info("unloading %s version %d", name, version)
                self._show(replace(self._statuses[name][version], state="UNLOADING"))
            kept = {version: loaded for version, loaded in available.items() if version in keep}
            others = {other: versions for other, versions in self._available.items() if other != name}
            self._available = {**others, name: kept} if kept else others

    def _finish_unloading(self, name: str, version: int) -> None:
        gc.collect()  # TensorFlow's Python objects hold each other in circles
        with self._changing:
            status = self._statuses[name][version]
            if status.state == "UNLOADING":  # else it has been loaded again since
                self._show(replace(status, state="END"))

    def _show(self, status: VersionStatus) -> None:
        statuses = {**self._statuses.get(status.name, {}), status.version: status}
        for version in sorted(version for version, other in statuses.items() if other.state == "END")[:-MAX_ENDED]:
            del statuses[version]
        self._statuses = {**self._statuses, status.name: statuses}
