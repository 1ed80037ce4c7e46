"""Repository of the models on disk: polls their folders, loads and warms up versions, retries failed ones."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from typing_extensions import override

from serving.errors import ModelFailed, ModelLoadError, StartupError
from serving.inference.model_config import ModelConfig, Volumes, describe_unreadable
from serving.inference.model_folders import find_model_versions
from serving.inference.model_info import INFO_FILE, read_model_info
from serving.inference.repository import (
    MAX_MESSAGE,
    FolderProblem,
    LoadCounts,
    ModelRepository,
    ModelVersion,
    VersionStatus,
)
from serving.inference.signatures import Predictor
from serving.inference.statistics import CountedPredictor, Statistics
from serving.inference.version_files import (
    Retries,
    Stamp,
    Verification,
    has_checksums,
    read_model_stamp,
    read_stamp,
    verify_checksums,
)
from serving.inference.version_loader import InProcessLoader, VersionLoader
from serving.inference.warmup import WARMUP_FILE
from serving.quoting import hide_paths, printable

logger = logging.getLogger(__name__)

_WAIT_S = 0.2  # between polls while versions are verified


@dataclass(frozen=True)
class _LoadedVersion:
    """A loaded version, and the stamps of the files that may change after loading."""

    path: Path
    predictor: Predictor  # not wrapped
    unbatched: Collection[str]
    model_stamp: Stamp
    info_stamp: Stamp
    warmup_stamp: Stamp


class LocalRepository(ModelRepository):
    """Loads the versions that the model configs select from the folders (hot reload).

    A version that cannot be loaded is reported with the reason and does not replace a loaded one. It is retried when
    its files change, and with exponential backoff. A faulty model does not affect other models. Versions stay loaded
    if their folder becomes unreadable.

    Args:
        configs: returns the models to serve; called at every poll.
        required: see `ModelRepository`.
        loader: loads versions; by default in this process, with SavedModelPredictor.
        wrap_predictor: wraps the warmed-up predictor for requests, for example in a `Batcher`. Its arguments are the
            model's name, the predictor, and the signatures whose requests must not be batched.
        verify_signature: verifies the signature of a version's folder before anything of it is loaded; raises
            `ModelLoadError`. Without it, checksums are verified, where a version has them.
    """

    def __init__(
        self,
        configs: Callable[[], Sequence[ModelConfig]],
        *,
        required: Sequence[str] = (),
        loader: VersionLoader | None = None,
        wrap_predictor: Callable[[str, Predictor, Collection[str]], Predictor] = lambda _, predictor, __: predictor,
        verify_signature: Callable[[Path], None] | None = None,
    ) -> None:
        super().__init__((), required=required)
        self._list_configs = configs
        self._loader = loader or InProcessLoader()
        self._wrap_predictor = wrap_predictor
        self._verify_signature = verify_signature
        self._volumes = Volumes()
        self._retries = Retries()
        self._loaded_versions: dict[tuple[str, int], _LoadedVersion] = {}
        self._verifications: dict[tuple[str, int], Verification] = {}
        self._unloaded: frozenset[str] = frozenset()  # models that `unload_model` took out of service
        self._unverified: set[tuple[str, int]] = set()  # that the last poll did not load yet
        for config, found in self._list_models() or ():
            for version in config.policy.candidates(found or ())[:1]:
                self._set_status(VersionStatus(config.name, version))

    @override
    def load(self) -> None:
        """Load the models for the first time.

        Raises:
            StartupError: a label names a version that is not selected for serving.
        """
        self._poll_until_verified()
        super().load()
        if problem := self._find_label_problem(of_failed=False):
            raise StartupError(problem)

    @override
    def reload(self, configs: Sequence[ModelConfig]) -> None:
        self._list_configs = lambda: configs
        self._unloaded = frozenset()
        self._poll_until_verified()
        if missing := [config.name for config in configs if config.name not in self._available]:
            reasons = "; ".join(f"{name}: {self.problem(name)}" for name in missing)
            raise ModelFailed(f"Some models did not become available: {reasons}", code="UNKNOWN")
        if problem := self._find_label_problem():
            raise ModelFailed(problem, code="FAILED_PRECONDITION")

    @override
    def load_model(self, name: str) -> None:
        if name not in self._names:
            self.poll()  # its folder may be new
        if name not in self._names:
            raise self._unknown_model(name)
        with self._update_lock:
            self._unloaded -= {name}
            self._retries.forget_missing(name, set())  # try again now
        self._poll_until_verified()
        if name not in self._available:
            raise ModelFailed(f"model {name} could not be loaded: {self.problem(name)}", code="FAILED_PRECONDITION")

    @override
    def unload_model(self, name: str) -> None:
        if name not in self._names:
            raise self._unknown_model(name)
        with self._update_lock:
            self._unloaded |= {name}
            self._unload(name, keep=set())

    @override
    def problem(self, name: str) -> str:
        if name in self._unloaded:
            return "it was unloaded; load it to use it again"
        return super().problem(name)

    def _poll_until_verified(self) -> None:
        """Poll until every version was verified once; each is loaded as soon as its verification is done."""
        self.poll()
        verified: set[tuple[str, int]] = set()  # verified once: do not wait again for files that keep changing
        while waiting := self._unverified - verified:
            self._verifications[min(waiting)].wait(_WAIT_S)
            verified |= {key for key in waiting if self._verifications[key].done}
            self.poll()

    @override
    def _poll(self) -> None:
        self._unverified = set()
        models = self._list_models()
        if models is None:
            return
        for config, found in models:
            if found is None or config.name in self._unloaded:
                continue
            try:
                self._update_model(config, found)
            except Exception:  # a faulty model must not affect others
                logger.exception("updating model %s failed", config.name)
        for name in self._available.keys() - set(self._names):
            self._unload(name, keep=set())
        self._labels = {config.name: dict(config.labels) for config, _ in models}

    def _list_models(self) -> list[tuple[ModelConfig, dict[int, Path] | None]] | None:
        """List the models to serve, each with its versions on disk, or None if its folder is unreadable.

        If the models folder itself is unreadable, the result is None: the served versions do not change.
        """
        try:
            configs = self._list_configs()
        except OSError as error:
            path = Path(error.filename or "the models folder")
            problem = describe_unreadable(path, error)
            self._set_folder_problems([FolderProblem(printable(str(path)), None, problem)])
            return None
        models: list[tuple[ModelConfig, dict[int, Path] | None]] = []
        problems = []
        for config in configs:
            path = config.base_path
            found: dict[int, Path] | None
            try:
                found = find_model_versions(config)
                self._volumes.check(path, is_empty=not found)
                found = found or self._find_loaded(config)
            except OSError as error:
                found = None
                problem = describe_unreadable(path, error)
                if isinstance(error, FileNotFoundError):
                    problem = f"no version to serve: {problem}"
                problems.append(FolderProblem(printable(str(path)), config.name, problem))
                if config.discovered and config.name not in self._names:
                    continue  # may not be a model
            models.append((config, found))
        self._set_folder_problems(problems)
        self._names = tuple(sorted(config.name for config, _ in models))
        return models

    def _find_loaded(self, config: ModelConfig) -> dict[int, Path]:
        """Return the version that was loaded from the model's folder itself: its files may be being replaced."""
        return {
            version: loaded.path
            for (name, version), loaded in self._loaded_versions.items()
            if config.may_be_version and name == config.name and loaded.path == config.base_path
        }

    def _is_replaced(self, config: ModelConfig, version: int, path: Path) -> bool:
        """Return True if the model's folder is itself the version, and its files are not those that were loaded."""
        loaded = self._loaded_versions[config.name, version]
        is_whole_folder = config.base_path in (path, loaded.path)
        return is_whole_folder and (path, read_model_stamp(path)) != (loaded.path, loaded.model_stamp)

    def _update_model(self, config: ModelConfig, found: dict[int, Path]) -> None:
        serving = set(self._available.get(config.name, ()))
        wanted: set[int] = set()
        self._retries.forget_missing(config.name, set(found))
        unverified = 0
        for version in config.policy.candidates(found):
            if len(wanted) + unverified == config.policy.latest:
                break
            if version in serving and not self._is_replaced(config, version, found[version]):
                self._refresh_assets(config.name, version)
                wanted.add(version)
            elif not self._is_verified(config.name, version, found[version]):
                unverified += 1
            elif self._load_version(config.name, version, found[version]):
                wanted.add(version)
        # A version that failed to load, or is still being verified, does not replace a loaded one, even if the version
        # policy selects only the new one.
        present = serving & found.keys()
        self._unload(config.name, keep=wanted | present if unverified else wanted or present)

    def _is_verified(self, name: str, version: int, path: Path) -> bool:
        """Return True if a version's verification is done or not needed; otherwise start it."""
        key, stamp = (name, version), read_stamp(path)
        if not self._retries.is_due(key, stamp) or not self._needs_verification(path):
            return True
        verification = self._verifications.get(key)
        if verification is None or (verification.done and verification.stamp != stamp):
            verification = Verification(
                path, stamp, notify=lambda: self._released.put(None), verify=self._verify_signature
            )
            self._verifications[key] = verification
            if self._statuses.get(name, {}).get(version) is None:
                self._set_status(VersionStatus(name, version))
        if verification.done and verification.stamp == stamp:
            return True
        self._unverified.add(key)
        return False

    def _needs_verification(self, path: Path) -> bool:
        return self._verify_signature is not None or has_checksums(path)

    @override
    def _unload(self, name: str, *, keep: set[int]) -> None:
        super()._unload(name, keep=keep)
        for key in [key for key in self._loaded_versions if key[0] == name and key[1] not in keep]:
            del self._loaded_versions[key]

    def _load_version(self, name: str, version: int, path: Path) -> bool:
        stamp = read_stamp(path)
        if not self._retries.is_due((name, version), stamp):
            return False
        verification = self._verifications.pop((name, version), None)
        if self._needs_verification(path) and (verification is None or verification.stamp != stamp):
            return False  # its files changed, or it became due, since `_is_verified`
        started_s = time.perf_counter()
        counts = self._load_counts.get(name, LoadCounts())
        before = self._statuses.get(name, {}).get(version)
        logger.info("loading %s version %d from %s", name, version, printable(str(path)))
        if version not in self._available.get(name, {}):  # otherwise its files were replaced
            self._set_status(VersionStatus(name, version, state="LOADING"))
        try:
            if verification is not None and verification.error is not None:
                raise verification.error
            records = self._load_files(name, version, path, stamp)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a faulty model must not affect others
            self._load_counts[name] = replace(counts, failed=counts.failed + 1)
            self._retries.record_failure((name, version), stamp)
            self._report_failure(name, version, error, path, before)
            return False
        self._load_counts[name] = replace(counts, loaded=counts.loaded + 1)
        self._retries.forget((name, version))
        logger.info(
            "%s version %d is available after %.1f s, %s",
            name,
            version,
            time.perf_counter() - started_s,
            f"{records} warm-up records replayed" if records else "without warm-up records",
        )
        return True

    def _load_files(self, name: str, version: int, path: Path, stamp: Stamp) -> int:
        """Load, warm up and serve a version with this stamp; returns the number of warm-up records replayed."""
        if printable(str(path)) != str(path):
            raise ModelLoadError(f"{path}: the name is not valid UTF-8; rename the folder", code="INVALID_ARGUMENT")
        model_stamp, info_stamp = read_model_stamp(path), read_stamp(path / INFO_FILE)
        warmup_stamp = read_stamp(path / WARMUP_FILE)
        loaded = self._loader.load(path)
        status = VersionStatus(
            name,
            version,
            state="AVAILABLE",
            warmup_records=loaded.warmup.records,
            load_s=loaded.load_s,
            warmup_s=loaded.warmup_s,
        )
        unbatched = loaded.warmup.unbatched
        stamped = _LoadedVersion(path, loaded.predictor, unbatched, model_stamp, info_stamp, warmup_stamp)
        self._publish(status, stamped, verified=stamp)
        return loaded.warmup.records

    def _publish(
        self,
        status: VersionStatus,
        loaded: _LoadedVersion,
        *,
        info_problem: str = "",
        warmup_problem: str = "",
        verified: Stamp | None = None,
    ) -> None:
        """Make a loaded version available with its model info, and report its limitations.

        Args:
            status: of the version.
            loaded: the version.
            info_problem: of its model info.
            warmup_problem: of its warm-up records.
            verified: the stamp of its files when they were verified, for a version that was loaded now.

        Raises:
            ModelLoadError: the version is signed, and its files no longer have that stamp.
        """
        current = self._available.get(status.name, {}).get(status.version)
        if self._verify_signature is not None and verified is None and current is not None:
            info, problem = current.info, ""
        else:
            info, problem = read_model_info(loaded.path)
        if self._verify_signature is not None and verified is not None and read_stamp(loaded.path) != verified:
            raise ModelLoadError(f"{loaded.path} changed while it was loaded; it will be verified again")
        if not info.class_names:
            info = replace(info, class_names=self._loader.read_label_names(loaded.predictor))
        warnings = {"model_info": info_problem or problem, "warmup": warmup_problem, "dependent_rows": ""}
        if loaded.unbatched:
            warnings["dependent_rows"] = (
                f"rows of a batch influence each other in {', '.join(sorted(loaded.unbatched))}, so its requests are "
                "never batched"
            )
        warnings = {kind: warning for kind, warning in warnings.items() if warning}
        before = self._loaded_versions.get((status.name, status.version))
        if (
            current is None
            or before is None
            or before.predictor is not loaded.predictor
            or set(before.unbatched) != set(loaded.unbatched)
        ):
            statistics = Statistics()
            counted = CountedPredictor(loaded.predictor, statistics)
            wrapped = self._wrap_predictor(status.name, counted, loaded.unbatched)
            self._serve(ModelVersion(status.name, status.version, wrapped, info, statistics))
        else:
            self._replace(replace(current, info=info))
        self._loaded_versions[status.name, status.version] = loaded
        message = _hide_folder("; ".join(warnings.values()), status, loaded.path)
        self._set_status(replace(status, error_message=message, warnings=tuple(warnings)))
        for warning in warnings.values():
            logger.warning("%s version %d: %s", status.name, status.version, printable(warning))

    def _refresh_assets(self, name: str, version: int) -> None:
        """Read the model info and replay the warm-up records again if they changed after the version was loaded."""
        loaded = self._loaded_versions[name, version]
        info_stamp, warmup_stamp = read_stamp(loaded.path / INFO_FILE), read_stamp(loaded.path / WARMUP_FILE)
        status = self._statuses[name][version]
        is_unchanged = (info_stamp, warmup_stamp) == (loaded.info_stamp, loaded.warmup_stamp)
        if is_unchanged and "files" not in status.warnings:  # with it, files that could not be loaded are gone again
            return
        if self._verify_signature is not None and not is_unchanged:
            loaded = replace(loaded, info_stamp=info_stamp, warmup_stamp=warmup_stamp)
            self._report_unsigned_change(status, loaded)
            return
        info_problem = _find_checksum_error(loaded.path, INFO_FILE)
        unbatched, problem = loaded.unbatched, ""
        if warmup_stamp != loaded.warmup_stamp:
            try:
                verify_checksums(loaded.path, only=[WARMUP_FILE])
                warmup = self._loader.warm_up(loaded.path, loaded.predictor)
            except Exception as error:  # the version stays available
                problem = f"{error}"
            else:
                unbatched = warmup.unbatched
                status = replace(status, warmup_records=warmup.records)
                logger.info("%s version %d: %d warm-up records replayed", name, version, warmup.records)
        elif "warmup" in status.warnings:
            problem = f"{loaded.path / WARMUP_FILE} cannot be replayed"
        refreshed = replace(loaded, unbatched=unbatched, info_stamp=info_stamp, warmup_stamp=warmup_stamp)
        self._publish(status, refreshed, info_problem=info_problem, warmup_problem=problem)

    def _report_unsigned_change(self, status: VersionStatus, loaded: _LoadedVersion) -> None:
        """Report that model info or warm-up records of a signed version have changed, and leave them unread."""
        self._loaded_versions[status.name, status.version] = loaded
        warning = (
            f"{INFO_FILE} or {WARMUP_FILE} changed after the signature was verified, and the change is ignored; "
            "publish it as a new version"
        )
        if "signature" not in status.warnings:
            message = "; ".join(filter(None, (status.error_message, warning)))
            self._set_status(replace(status, error_message=message, warnings=(*status.warnings, "signature")))
        logger.warning("%s version %d: %s", status.name, status.version, warning)

    def _report_failure(
        self, name: str, version: int, error: BaseException, path: Path, before: VersionStatus | None
    ) -> None:
        """Set the status of a version that cannot be loaded, and log each new reason once."""
        is_expected = isinstance(error, ModelLoadError)
        code = error.code if isinstance(error, ModelLoadError) else "INTERNAL"
        message = str(error) if is_expected else f"cannot load {path}: {type(error).__name__}: {error}"
        if isinstance(error, MemoryError):
            code = "RESOURCE_EXHAUSTED"
        status = VersionStatus(name, version, state="END", error_code=code)
        if before is not None and version in self._available.get(name, {}):
            message = f"its files have changed and cannot be loaded, so it stays as it was: {message}"
            status = replace(before, warnings=(*(set(before.warnings) - {"files"}), "files"))
        self._set_status(replace(status, error_message=_hide_folder(message, status, path)))
        shown = self._statuses[name][version].error_message
        if before is None or before.error_message != shown:
            logger.error(
                "%s version %d%s: %s",
                name,
                version,
                " is not served" if status.state == "END" else "",
                printable(message)[:MAX_MESSAGE],
                exc_info=None if is_expected else error,
            )

    def _find_label_problem(self, *, of_failed: bool = True) -> str | None:
        """Return an error for a label of a version that is not available; `of_failed` includes versions that failed."""
        for name, labels in self._labels.items():
            for label, version in labels.items():
                failed = version in self._statuses.get(name, {}) or self._folder_problem(name) is not None
                if version not in self._available.get(name, {}) and (of_failed or not failed):
                    return (
                        f"Request to assign label {label} to version {version} of model {name}, which is not currently "
                        "available for inference"
                    )
        return None


def _hide_folder(message: str, status: VersionStatus, path: Path) -> str:
    """Replace the path of a version's folder by the model's name and the version, that of the model's by the name."""
    path = Path(printable(str(path)))
    return hide_paths(printable(message), {path: f"{status.name}/{status.version}", path.parent: status.name})


def _find_checksum_error(path: Path, file: Path) -> str:
    """Return an error if a file of a version differs from its checksum, otherwise an empty string."""
    try:
        verify_checksums(path, only=[file])
    except ModelLoadError as error:
        return str(error)
    return ""
