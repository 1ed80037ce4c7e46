"""Registry of the loaded model versions: resolves requests to versions, reports their states, unloads unused ones."""

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
from serving.inference.signatures import Predictor
from serving.inference.statistics import Statistics
from serving.quoting import hide_paths, printable, quote

logger = logging.getLogger(__name__)

MAX_ENDED = 20  # versions in state END that are kept per model
MAX_MESSAGE = 2_000  # characters of an error message
CODES = {*HTTP_STATUS_OF_CODE, "OK", "UNKNOWN", "INTERNAL", "DATA_LOSS"}  # of the status API


@dataclass(frozen=True, eq=False)
class ModelVersion:
    """An available version. It is unloaded once the last request has released its predictor."""

    name: str
    version: int
    predictor: Predictor
    info: ModelInfo = field(default_factory=ModelInfo)
    statistics: Statistics = field(default_factory=Statistics)
    # Of a remote version that was chosen by default: another one may take its place while a request is in flight.
    is_replaceable: bool = False


@dataclass(frozen=True)
class VersionStatus:
    """The state of a version, with the terms of TensorFlow Serving's status API.

    A version that is served with a limitation is AVAILABLE and OK; the message describes the limitation. `warnings`
    lists the kinds of limitation: "model_info" (invalid model.json), "warmup" (warm-up records that were added later
    cannot be replayed), "dependent_rows" (requests are not batched), "folder" (the folder has become unreadable),
    "files" (the model's folder is itself the version, and its changed files cannot be loaded).
    """

    name: str
    version: int
    state: str = "START"  # START, LOADING, AVAILABLE, UNLOADING or END
    error_code: str = "OK"
    error_message: str = ""
    warmup_records: int = 0
    load_s: float = 0.0  # to load it, warm-up included; 0 until it is loaded
    warmup_s: float = 0.0
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class LoadCounts:
    """How many loads of a model's versions have succeeded and failed."""

    loaded: int = 0
    failed: int = 0


@dataclass(frozen=True)
class FolderProblem:
    """An unreadable folder: of one model, or the models folder if `model` is None. Loaded models stay loaded.

    `path` and `error` are for the log, `reason` is for responses.
    """

    path: str
    model: str | None
    error: str

    @property
    def reason(self) -> str:
        """The error without the folder's path."""
        folder = "the models folder" if self.model is None else f"the folder of model {self.model}"
        return hide_paths(self.error.replace(self.path, folder))


class ModelRepository(ABC):
    """Registry of the available model versions; subclasses decide where they come from.

    One thread at a time may change the registry. Reads are thread-safe.

    Args:
        names: the models to serve that are already known.
        required: the models without which the repository is not ready.
    """

    def __init__(self, names: Iterable[str], *, required: Iterable[str] = ()) -> None:
        self._required = tuple(required)
        self._update_lock = threading.Lock()
        self._loaded = False
        # Read without the lock, so never mutated: every change replaces the whole object.
        self._names = tuple(sorted(names))
        self._available: dict[str, dict[int, ModelVersion]] = {}
        self._labels: dict[str, dict[str, int]] = {}
        self._statuses: dict[str, dict[int, VersionStatus]] = {}
        self._folder_problems: tuple[FolderProblem, ...] = ()
        self._load_counts: dict[str, LoadCounts] = {}
        # Released versions, to be reported as unloaded; None requests an immediate poll.
        self._released: queue.SimpleQueue[tuple[str, int] | None] = queue.SimpleQueue()

    @abstractmethod
    def _poll(self) -> None:
        """Load and unload versions as the source requires; called by one thread at a time."""

    @abstractmethod
    def reload(self, configs: Sequence[ModelConfig]) -> None:
        """Replace the served models by these; returns when they are loaded.

        Raises:
            ModelFailed: a model could not be loaded, a label names a version that is not served, or the repository
                cannot be reconfigured.
        """

    @abstractmethod
    def load_model(self, name: str) -> None:
        """Serve a model, also after `unload_model`; returns when its newest version is loaded.

        Raises:
            ModelNotFound: the model is not configured.
            ModelFailed: it could not be loaded, or the repository cannot load models.
        """

    @abstractmethod
    def unload_model(self, name: str) -> None:
        """Stop serving a model until `load_model` or `reload`. Its requests in flight finish.

        Raises:
            ModelNotFound: the model is not configured.
            ModelFailed: the repository cannot unload models.
        """

    def names(self) -> list[str]:
        """List the models with an available version, in alphabetical order."""
        return sorted(self._available)

    def all_names(self) -> list[str]:
        """List every configured model, including those that could not be loaded."""
        return list(self._names)

    def is_named(self, name: str) -> bool:
        """Return whether a model is configured, even if it could not be loaded."""
        return name in self._names

    def resolve(self, name: str, *, version: int | None = None, label: str | None = None) -> ModelVersion:
        """Return the newest available version of a model, or the version with this number or label.

        Raises:
            NotReady: the model is still being loaded.
            ModelNotFound: the model or the version is not available.
            InvalidRequest: no version of the model has this label.
        """
        if label is not None and (version := self._labels.get(name, {}).get(label)) is None:
            raise self._unknown_label(name, label)
        available = self._available.get(name, {})
        if version is None and available:
            return available[max(available)]
        if version is not None and version in available:
            return available[version]
        raise self._not_available(name, version)

    def available(self, name: str) -> list[ModelVersion]:
        """List the available versions of a model, oldest first."""
        return [version for _, version in sorted(self._available.get(name, {}).items())]

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
        if not available and name in self._names and (not self._loaded or self._is_loading(name)):
            return NotReady(f"model {name} is still being loaded; try again in a few seconds")
        if name not in self._names:
            error = self._unknown_model(name)
        elif version is None:
            error = ModelNotFound(f"model {name} cannot be used: {self.problem(name)}")
        else:
            numbers = ", ".join(map(str, available)) or "none"
            error = ModelNotFound(f"there is no version {version} of model {name}; available: {numbers}")
        wanted = f"Latest({name})" if version is None else f"Specific({name}, {version})"
        error.tensorflow_serving = ModelNotFound(f"Servable not found for request: {wanted}")
        return error

    def _is_loading(self, name: str) -> bool:
        """Return whether a version is on its way: in a remote server that has been restarted, for example."""
        return any(status.state in ("START", "LOADING") for status in self.list_versions(name))

    def _unknown_model(self, name: str) -> ModelNotFound:
        names = ", ".join(self._names)
        return ModelNotFound(
            f"there is no model {quote(name)}; {f'available: {names}' if names else 'no model is served'}"
        )

    def versions(self, name: str, number: int | None = None) -> list[VersionStatus]:
        """List the statuses of a model's versions, newest first, or of the version with this number.

        Older versions that were never loaded are omitted, as with TensorFlow Serving's default policy.

        Raises:
            NotReady: the model is still being loaded and has no status yet.
            ModelNotFound: the model or the version does not exist.
        """
        versions = self.list_versions(name)
        found = versions if number is None else [version for version in versions if version.version == number]
        if not found:
            if not versions and not self._loaded and name in self._names:
                raise NotReady(f"model {name} is still being loaded; try again in a few seconds")
            reason = self._folder_problem(name)
            wanted = "any versions" if number is None else f"version {number}"
            raise ModelNotFound(f"Could not find {wanted} of model {name}{f': {reason}' if reason else ''}")
        return found

    def all_versions(self) -> list[VersionStatus]:
        """List the statuses of the versions of every configured model."""
        return [version for name in self.all_names() for version in self.list_versions(name)]

    def load_counts(self, name: str) -> LoadCounts:
        """Return how many loads of a model's versions have succeeded and failed."""
        return self._load_counts.get(name, LoadCounts())

    def list_versions(self, name: str) -> list[VersionStatus]:
        """List the statuses of a model's versions, newest first; empty if it has none."""
        statuses = self._statuses.get(name, {})
        return [self._with_folder_problem(statuses[version]) for version in sorted(statuses, reverse=True)]

    @property
    def backends(self) -> Mapping[str, bool]:
        """The address of each remote server, and whether it responded to the last poll; empty without any."""
        return {}

    @property
    def folder_problems(self) -> Sequence[FolderProblem]:
        """The folders that are currently unreadable."""
        return self._folder_problems

    @property
    def ready(self) -> bool:
        """True after every model's first load attempt, if all required models and at least one are available."""
        return self.not_ready_because is None

    @property
    def not_ready_because(self) -> str | None:
        """The reason why the repository is not ready, or None if it is ready.

        A model that cannot be loaded leaves the repository ready if others are available, unless it is required.
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
        return "; ".join(["no model is available", *reasons])

    def problem(self, name: str) -> str:
        """Return the reason why a model has no available version."""
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
        """Load the models for the first time."""
        self.poll()
        self._loaded = True
        self._on_change()

    def poll(self) -> None:
        """Load new versions and unload removed ones (version swap, hot reload)."""
        with self._update_lock:
            self._poll()
            self._on_change()

    def _on_change(self) -> None:  # noqa: B027 - a hook, which most subclasses do not need
        """Do what is due after a change of what is served or reported, or when there may be one."""

    def poll_forever(self, interval_s: float) -> NoReturn:
        """Poll every `interval_s` seconds and unload released versions; never returns."""
        next_poll_s = time.monotonic() + interval_s
        reason = self.not_ready_because
        while True:
            try:
                released = self._released.get(timeout=max(0.0, next_poll_s - time.monotonic()))
            except queue.Empty:
                released = None
            try:
                if released is not None:
                    self._finish_unloading(*released)
                else:
                    self.poll()
            except Exception:  # keep polling, whatever this poll raised
                logger.exception("polling the models failed")
            if released is None:
                next_poll_s = time.monotonic() + interval_s
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
        """Make a version available."""
        # The callback runs in the thread that releases the last reference, so it only queues the version.
        weakref.finalize(loaded.predictor, self._released.put, (loaded.name, loaded.version)).atexit = False
        self._replace(loaded)

    def _replace(self, loaded: ModelVersion) -> None:
        versions = {**self._available.get(loaded.name, {}), loaded.version: loaded}
        self._available = {**self._available, loaded.name: versions}
        self._on_change()

    def _unload(self, name: str, *, keep: set[int]) -> None:
        """Stop serving versions of a model; each is unloaded after its last in-flight request (graceful unload)."""
        available = self._available.get(name, {})
        if gone := available.keys() - keep:
            for version in gone:
                logger.info("unloading %s version %d", name, version)
                status = self._statuses.get(name, {}).get(version, VersionStatus(name, version, state="AVAILABLE"))
                if status.state == "AVAILABLE":  # a remote server has reported another state already
                    self._set_status(replace(status, state="UNLOADING", error_code="OK", error_message="", warnings=()))
            kept = {version: loaded for version, loaded in available.items() if version in keep}
            others = {other: versions for other, versions in self._available.items() if other != name}
            self._available = {**others, name: kept} if kept else others
        self._on_change()

    def _finish_unloading(self, name: str, version: int) -> None:
        gc.collect()  # TensorFlow's Python objects form reference cycles
        with self._update_lock:
            status = self._statuses[name][version]
            if status.state == "UNLOADING":  # otherwise it has been reloaded meanwhile
                self._set_status(replace(status, state="END"))

    def _set_folder_problems(self, problems: Sequence[FolderProblem]) -> None:
        """Replace the unreadable folders, and log those that become unreadable or readable again."""
        before, now = set(self._folder_problems), set(problems)
        for problem in sorted(now - before, key=lambda problem: problem.path):
            logger.error("%s; versions loaded from it are still served", problem.error)
        for path in sorted({problem.path for problem in before} - {problem.path for problem in now}):
            logger.warning("%s is readable again, or no longer configured", path)
        self._folder_problems = tuple(problems)
        self._on_change()

    def _set_status(self, status: VersionStatus) -> None:
        message = hide_paths(printable(status.error_message))[:MAX_MESSAGE]
        code = status.error_code if status.error_code in CODES else "UNKNOWN"
        status = replace(status, error_message=message, error_code=code)
        statuses = {**self._statuses.get(status.name, {}), status.version: status}
        for version in sorted(version for version, other in statuses.items() if other.state == "END")[:-MAX_ENDED]:
            del statuses[version]
        self._statuses = {**self._statuses, status.name: statuses}
        self._on_change()
