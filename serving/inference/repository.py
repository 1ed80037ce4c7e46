"""Registry of the loaded model versions: hands them out, reports their state, and unloads them after their last use."""

from __future__ import annotations

import gc
import logging
import queue
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NoReturn

from serving.errors import HTTP_STATUS_OF_CODE, InvalidRequest, ModelNotFound, NotReady, ServingError
from serving.inference.model_config import ModelConfig
from serving.inference.model_info import ModelInfo
from serving.inference.path_hiding import hide_paths
from serving.inference.signatures import Predictor
from serving.quoting import printable, quote

logger = logging.getLogger(__name__)

MAX_ENDED = 20  # versions of a model that are shown after their end
MAX_MESSAGE = 2_000  # characters of an error that are shown
CODES = {*HTTP_STATUS_OF_CODE, "OK", "UNKNOWN", "INTERNAL", "DATA_LOSS"}  # of the status API


@dataclass(frozen=True, eq=False)
class ModelVersion:
    """An available version. It is unloaded after its last use: when nothing refers to its predictor any more."""

    name: str
    version: int
    predictor: Predictor
    info: ModelInfo = field(default_factory=ModelInfo)


@dataclass(frozen=True)
class VersionStatus:
    """What became of a version, in the words of TensorFlow Serving's status API.

    A version that is served with a limitation is AVAILABLE and OK, with the limitation as its message. `warnings`
    are the kinds of limitation: "model_info" (model.json cannot be used), "warmup" (the warm-up records that came
    later cannot be replayed), "dependent_rows" (requests are not batched), "folder" (it cannot be read any more).
    """

    name: str
    version: int
    state: str = "START"  # START, LOADING, AVAILABLE, UNLOADING or END
    error_code: str = "OK"
    error_message: str = ""
    warmup_records: int = 0
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class FolderProblem:
    """A folder that cannot be read: of one model, or with `model` None the models folder. Loaded models stay.

    `path` and `error` are for the log, `reason` is for responses.
    """

    path: str
    model: str | None
    error: str

    @property
    def reason(self) -> str:
        """What is wrong, without the folder's path."""
        folder = "the models folder" if self.model is None else f"the folder of model {self.model}"
        return hide_paths(self.error.replace(self.path, folder))


class ModelRepository(ABC):
    """Registry of the versions that can be used. Where they come from is decided by the subclasses.

    One thread at a time changes what is served; any number may read it meanwhile.

    Args:
        names: the models to serve, as far as they are known.
        required: the models without which the repository is not ready.
    """

    def __init__(self, names: Iterable[str], *, required: Iterable[str] = ()) -> None:
        self._required = tuple(required)
        self._changing = threading.Lock()
        self._loaded = False
        # Read without the lock, so never changed in place: replaced whole.
        self._names = tuple(sorted(names))
        self._available: dict[str, dict[int, ModelVersion]] = {}
        self._labels: dict[str, dict[str, int]] = {}
        self._statuses: dict[str, dict[int, VersionStatus]] = {}
        self._folder_problems: tuple[FolderProblem, ...] = ()
        # Versions after their last use; None asks for a poll before the next one is due.
        self._released: queue.SimpleQueue[tuple[str, int] | None] = queue.SimpleQueue()

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

    def labels(self, name: str) -> Mapping[str, int]:
        """Return the version of each label of a model."""
        return self._labels.get(name, {})

    def available_versions(self, name: str) -> list[int]:
        """List the versions of a model that can be used, oldest first."""
        return sorted(self._available.get(name, {}))

    def resolve(self, name: str, *, version: int | None = None, label: str | None = None) -> ModelVersion:
        """Return the newest available version of a model, or the one with a number or a label.

        Raises:
            NotReady: the model exists and is still being loaded.
            ModelNotFound: the model, or that version of it, is not available.
            InvalidRequest: no version of the model has that label.
        """
        if label is not None and (version := self._labels.get(name, {}).get(label)) is None:
            raise self._unknown_label(name, label)
        available = self._available.get(name, {})
        if version is None and available:
            return available[max(available)]
        if version is not None and version in available:
            return available[version]
        raise self._not_available(name, version)

    def _unknown_label(self, name: str, label: str) -> ServingError:
        error: ServingError
        if name not in self._available:  # labels are known once the model is loaded
            error = self._not_available(name, None)
        else:
            labels = ", ".join(sorted(self._labels.get(name, {})))
            has = f"it has {labels}" if labels else "it has no labels"
            error = InvalidRequest(f"model {name} has no label {quote(label)}; {has}")
        error.tensorflow_serving = InvalidRequest(f"Unrecognized servable version label: {label}")
        return error

    def _not_available(self, name: str, version: int | None) -> ServingError:
        available = sorted(self._available.get(name, {}))
        if not self._loaded and not available and name in self._names:
            return NotReady(f"model {name} is still being loaded; try again in a few seconds")
        if name not in self._names:
            names = ", ".join(self._names)
            error = ModelNotFound(
                f"there is no model {quote(name)}; {f'available: {names}' if names else 'no model is served'}"
            )
        elif version is None:
            error = ModelNotFound(f"model {name} cannot be used: {self.problem(name)}")
        else:
            numbers = ", ".join(map(str, available)) or "none"
            error = ModelNotFound(f"there is no version {version} of model {name}; available: {numbers}")
        wanted = f"Latest({name})" if version is None else f"Specific({name}, {version})"
        error.tensorflow_serving = ModelNotFound(f"Servable not found for request: {wanted}")
        return error

    def versions(self, name: str, number: int | None = None) -> list[VersionStatus]:
        """List the versions of a model that were tried or wait to be, newest first, or the one of this number.

        Older versions that were never needed stay out, as TensorFlow Serving's default policy has it.

        Raises:
            NotReady: nothing is known of the model yet.
            ModelNotFound: there is no model of that name, or no such version of it.
        """
        versions = self._list_versions(name)
        found = versions if number is None else [version for version in versions if version.version == number]
        if not found:
            if not versions and not self._loaded and name in self._names:
                raise NotReady(f"model {name} is still being loaded; try again in a few seconds")
            reason = self._folder_problem(name)
            wanted = "any versions" if number is None else f"version {number}"
            raise ModelNotFound(f"Could not find {wanted} of model {name}{f': {reason}' if reason else ''}")
        return found

    def all_versions(self) -> list[VersionStatus]:
        """List the versions of every model that is to be served, those that were tried or wait to be."""
        return [version for name in self.all_names() for version in self._list_versions(name)]

    def _list_versions(self, name: str) -> list[VersionStatus]:
        statuses = self._statuses.get(name, {})
        return [self._with_folder_problem(statuses[version]) for version in sorted(statuses, reverse=True)]

    @property
    def folder_problems(self) -> Sequence[FolderProblem]:
        """The folders that cannot be read at the moment."""
        return self._folder_problems

    @property
    def ready(self) -> bool:
        """Whether every model had its first load attempt, and the required ones and at least one are available."""
        return self.not_ready_because is None

    @property
    def not_ready_because(self) -> str | None:
        """Why the repository is not ready, in a sentence; None when it is.

        One model that cannot be loaded does not take the service out of use that serves others, unless it is
        required.
        """
        if not self._loaded:
            missing = sorted({*self._names, *self._required} - self._available.keys())
            return printable(f"loading {', '.join(missing)}" if missing else "loading")
        missing = [name for name in self._required if name not in self._available]
        if not missing and not self._available:
            missing = list(self._names)
        if missing:
            return printable("; ".join(f"{name}: {self.problem(name)}" for name in missing))
        if self._available:
            return None
        reasons = [problem.reason for problem in self._folder_problems]
        return "; ".join(["there is no model to answer with", *reasons])

    def problem(self, name: str) -> str:
        """Return why a model has no version that can be used."""
        statuses = sorted(self._statuses.get(name, {}).values(), key=lambda status: -status.version)
        errors = (status.error_message for status in statuses if status.error_message)
        return next(errors, None) or self._folder_problem(name) or "no version to serve"

    def _folder_problem(self, name: str) -> str | None:
        return next((problem.reason for problem in self._folder_problems if problem.model in (name, None)), None)

    def _with_folder_problem(self, status: VersionStatus) -> VersionStatus:
        problem = self._folder_problem(status.name)
        if problem is None or status.state != "AVAILABLE":
            return status
        message = "; ".join(filter(None, (status.error_message, f"{problem}; this version stays loaded")))
        return replace(status, error_message=message, warnings=(*status.warnings, "folder"))

    def load(self) -> None:
        """Try to load what is to be served, for the first time."""
        self.update()
        self._loaded = True

    def update(self) -> None:
        """Bring what is served up to date."""
        with self._changing:
            self._look()

    def watch(self, interval_s: float) -> NoReturn:
        """Bring what is served up to date every so many seconds; does not return."""
        next_look_s = time.monotonic() + interval_s
        reason = self.not_ready_because
        while True:
            try:
                released = self._released.get(timeout=max(0.0, next_look_s - time.monotonic()))
            except queue.Empty:
                released = None
            try:
                if released is not None:
                    self._finish_unloading(*released)
                else:
                    self.update()
            except Exception:  # keep polling, whatever this poll raised
                logger.exception("the models could not be updated")
            if released is None:
                next_look_s = time.monotonic() + interval_s
                reason = self._log_readiness(reason)

    def _log_readiness(self, before: str | None) -> str | None:
        reason = self.not_ready_because
        if reason != before:
            if reason is None:
                logger.info("ready")
            else:
                logger.error("not ready: %s", reason)
        return reason

    def _serve(self, loaded: ModelVersion) -> None:
        """Hand out a version from now on."""
        # Called when the last request that uses it is done, in whatever thread that is: only a note is left then.
        weakref.finalize(loaded.predictor, self._released.put, (loaded.name, loaded.version)).atexit = False
        self._replace(loaded)

    def _replace(self, loaded: ModelVersion) -> None:
        """Hand out a version in place of the one of the same number, or add it."""
        versions = {**self._available.get(loaded.name, {}), loaded.version: loaded}
        self._available = {**self._available, loaded.name: versions}

    def _unload(self, name: str, *, keep: set[int]) -> None:
        """Take versions of a model out of use; each is unloaded when the last request that has it is done."""
        available = self._available.get(name, {})
        if gone := available.keys() - keep:
            for version in gone:
                logger.info("unloading %s version %d", name, version)
                status = self._statuses.get(name, {}).get(version, VersionStatus(name, version))
                self._show(replace(status, state="UNLOADING", error_code="OK", error_message="", warnings=()))
            kept = {version: loaded for version, loaded in available.items() if version in keep}
            others = {other: versions for other, versions in self._available.items() if other != name}
            self._available = {**others, name: kept} if kept else others

    def _finish_unloading(self, name: str, version: int) -> None:
        gc.collect()  # TensorFlow's Python objects hold each other in circles
        with self._changing:
            status = self._statuses[name][version]
            if status.state == "UNLOADING":  # else it has been loaded again since
                self._show(replace(status, state="END"))

    def _set_folder_problems(self, problems: Sequence[FolderProblem]) -> None:
        """Report the folders that cannot be read; each is logged when that begins and when it ends."""
        before, now = set(self._folder_problems), set(problems)
        for problem in sorted(now - before, key=lambda problem: problem.path):
            logger.error("%s; what is loaded from it stays served", problem.error)
        for path in sorted({problem.path for problem in before} - {problem.path for problem in now}):
            logger.warning("%s can be read again, or is not needed any more", path)
        self._folder_problems = tuple(problems)

    def _show(self, status: VersionStatus) -> None:
        message = hide_paths(printable(status.error_message))[:MAX_MESSAGE]
        code = status.error_code if status.error_code in CODES else "UNKNOWN"
        status = replace(status, error_message=message, error_code=code)
        statuses = {**self._statuses.get(status.name, {}), status.version: status}
        for version in sorted(version for version, other in statuses.items() if other.state == "END")[:-MAX_ENDED]:
            del statuses[version]
        self._statuses = {**self._statuses, status.name: statuses}
