"""The models on disk: followed, loaded, warmed up, and tried again when a broken one is mended."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from serving.errors import ModelFailed, ModelLoadError, StartupError
from serving.model_config import ModelConfig, find_versions
from serving.predictor import Predictor, SavedModelPredictor
from serving.repository import ModelRepository, ModelVersion, VersionStatus
from serving.warmup import replay_warmup_records

logger = logging.getLogger(__name__)


class LocalRepository(ModelRepository):
    """Keeps the versions loaded that the configuration and the folders call for.

    A version that cannot be loaded is shown with the reason, replaces none that can, and is tried again when its
    files change.

    Args:
        configs: lists the models that are to be served, anew at each look.
        load_predictor: makes a predictor of a version's folder, or raises `ModelLoadError`.
        wrap_predictor: what requests go through instead of the predictor itself, once it is warmed up. It is
            given the model's name.
    """

    def __init__(
        self,
        configs: Callable[[], Sequence[ModelConfig]],
        *,
        load_predictor: Callable[[Path], Predictor] = SavedModelPredictor,
        wrap_predictor: Callable[[str, Predictor], Predictor] = lambda _, predictor: predictor,
    ) -> None:
        first = configs()
        super().__init__(config.name for config in first)
        self._list_configs = configs
        self._load_predictor = load_predictor
        self._wrap_predictor = wrap_predictor
        self._failed: dict[tuple[str, int], _Stamp] = {}
        for config in first:
            for version in config.policy.candidates(find_versions(config.base_path))[:1]:
                self._show(VersionStatus(config.name, version))

    def load(self) -> None:
        """As `ModelRepository.load`; also a label for a version that is not served is a StartupError."""
        super().load()
        if problem := self._find_label_problem():
            raise StartupError(problem)

    def reload(self, configs: Sequence[ModelConfig]) -> None:
        """As `ModelRepository.reload`."""
        self._list_configs = lambda: configs
        self.update()
        if missing := [config.name for config in configs if config.name not in self._available]:
            reasons = "; ".join(f"{name}: {self._problem(name)}" for name in missing)
            raise ModelFailed(f"Some models did not become available: {reasons}", code="UNKNOWN")
        if problem := self._find_label_problem():
            raise ModelFailed(problem, code="FAILED_PRECONDITION")

    def _look(self) -> None:
        try:
            configs = self._list_configs()
        except OSError as error:
            logger.warning("the models cannot be looked at, so they stay as they are: %s", error)
            return
        self._names = tuple(sorted(config.name for config in configs))
        for config in configs:
            try:
                found = find_versions(config.base_path)
            except OSError as error:
                logger.warning("model %s cannot be looked at, so it stays as it is: %s", config.name, error)
            else:
                self._update_model(config, found)
        for name in self._available.keys() - set(self._names):
            self._unload(name, keep=set())
        self._labels = {config.name: dict(config.labels) for config in configs}

    def _update_model(self, config: ModelConfig, found: dict[int, Path]) -> None:
        serving = set(self._available.get(config.name, ()))
        wanted: set[int] = set()
        for version in config.policy.candidates(found):
            if len(wanted) == config.policy.latest:
                break
            if version in serving or self._load_version(config.name, version, found[version]):
                wanted.add(version)
        # A version that cannot be loaded replaces none that can, not even where the policy asks for it alone.
        self._unload(config.name, keep=wanted or serving & found.keys())

    def _load_version(self, name: str, version: int, path: Path) -> bool:
        stamp = _read_stamp(path)
        if self._failed.get((name, version)) == stamp:
            return False
        started_s = time.perf_counter()
        logger.info("loading %s version %d from %s", name, version, path)
        status = VersionStatus(name, version)
        self._show(replace(status, state="LOADING"))
        try:
            predictor = self._load_predictor(path)
            records = replay_warmup_records(path, predictor)
        except ModelLoadError as error:
            self._failed[name, version] = stamp
            self._show(replace(status, state="END", error_code=error.code, error_message=str(error)))
            logger.error("%s version %d is not served: %s", name, version, error)
            return False
        self._failed.pop((name, version), None)
        self._show(replace(status, state="AVAILABLE", warmup_records=records))
        self._serve(ModelVersion(name, version, self._wrap_predictor(name, predictor), read_card(path)))
        logger.info(
            "%s version %d is available after %.1f s, %s",
            name,
            version,
            time.perf_counter() - started_s,
            f"{records} warm-up records replayed" if records else "no warm-up records to replay",
        )
        return True

    def _find_label_problem(self) -> str | None:
        for name, labels in self._labels.items():
            for label, version in labels.items():
                if version not in self._available.get(name, {}):
                    return (
                        f"Request to assign label {label} to version {version} of model {name}, which is not currently "
                        "available for inference"
                    )
        return None


_Stamp = frozenset[tuple[str, int, int]]


def _read_stamp(path: Path) -> _Stamp:
    """Return what changes when a file under `path` does: the name, size and time of each."""
    stamp = set()
    for file in path.rglob("*"):
        try:
            status = file.stat()
        except OSError:  # gone meanwhile, or not for us to see
            continue
        stamp.add((str(file), status.st_size, status.st_mtime_ns))
    return frozenset(stamp)


def read_card(path: Path) -> dict[str, Any] | None:
    """Read `assets.extra/model.json` of a version; None where there is none that can be read."""
    file = path / "assets.extra" / "model.json"
    try:
        card = json.loads(file.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        logger.warning("%s cannot be read, so the model is shown without it: %s", file, error)
        return None
    return card if isinstance(card, dict) else None
