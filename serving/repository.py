"""The models on disk and what became of each: `models/<name>/<version>/` with an integer version."""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serving.errors import ModelLoadError, ModelNotFound, NotReady, StartupError
from serving.predictor import Predictor, SavedModelPredictor
from serving.warmup import replay_warmup_records

logger = logging.getLogger(__name__)

MAX_VERSION = 2**63 - 1  # an int64 in TensorFlow Serving's protocol


@dataclass
class ModelVersion:
    """One version folder and its state, in the words of TensorFlow Serving's status API."""

    name: str
    version: int
    path: Path
    state: str = "START"  # START, LOADING, AVAILABLE, UNLOADING or END
    error_code: str = "OK"
    error_message: str = ""
    predictor: Predictor | None = None
    card: dict[str, Any] | None = None  # assets.extra/model.json, shown where it exists, never needed
    warmup_records: int = 0

    def __str__(self) -> str:
        return f"{self.name} version {self.version}"


class ModelRepository:
    """Finds the models under a folder, loads the newest version of each and hands them out.

    Args:
        models_dir: the folder of the models.
        load_predictor: makes a predictor of a version's folder, or raises `ModelLoadError`.
        wrap_predictor: what requests go through instead of the predictor itself, once it is warmed up.

    Raises:
        StartupError: there is no such folder, or no model in it.
    """

    def __init__(
        self,
        models_dir: Path,
        *,
        load_predictor: Callable[[Path], Predictor] = SavedModelPredictor,
        wrap_predictor: Callable[[ModelVersion, Predictor], Predictor] = lambda _, predictor: predictor,
    ) -> None:
        self._load_predictor = load_predictor
        self._wrap_predictor = wrap_predictor
        self._models = find_models(models_dir)
        self._available: dict[str, dict[int, ModelVersion]] = {}  # replaced whole, so read without the lock
        self._lock = threading.Lock()
        self._loaded = False

    def names(self) -> list[str]:
        """List the models that have a version to answer with, in alphabetical order."""
        return sorted(self._available)

    def all_names(self) -> list[str]:
        """List every model found on disk, those that could not be loaded included."""
        return sorted(self._models)

    def resolve(self, name: str, *, version: int | None = None) -> ModelVersion:
        """Return the newest version of a model that can answer, or the version asked for.

        Raises:
            NotReady: the model exists and is still being loaded.
            ModelNotFound: there is nothing of that name and version to answer with.
        """
        available = self._available.get(name, {})
        if version is None and available:
            return available[max(available)]
        if version is not None and version in available:
            return available[version]
        if not self._loaded and not available and name in self._models:
            raise NotReady(f"model {name} is still being loaded; try again in a few seconds")
        wanted = f"Latest({name})" if version is None else f"Specific({name}, {version})"
        raise ModelNotFound(f"Servable not found for request: {wanted}")

    def versions(self, name: str) -> list[ModelVersion]:
        """List the versions of a model that were tried or wait to be, newest first.

        Raises:
            ModelNotFound: there is no model of that name.
        """
        found = self._models.get(name)
        if not found:
            raise ModelNotFound(f"Could not find any versions of model {name}")
        # Older versions that were never needed stay out, as TensorFlow Serving's default policy has it.
        return [version for version in found if version.state != "START" or version is found[0]]

    @property
    def ready(self) -> bool:
        """Whether every model found on disk has a version that is loaded and warmed up."""
        return self.not_ready_because is None

    @property
    def not_ready_because(self) -> str | None:
        """Why the repository is not ready, in a sentence; None when it is."""
        missing = [name for name in self.all_names() if name not in self._available]
        if not self._loaded:
            return f"loading {', '.join(missing)}" if missing else "loading"
        if missing:
            return "; ".join(f"{name}: {self._models[name][0].error_message}" for name in missing)
        return None

    def load(self) -> None:
        """Load the newest version of every model, or of those that load the newest.

        Raises:
            StartupError: not one model could be loaded.
        """
        for name in self.all_names():
            for version in self._models[name]:
                if self._load_version(version):
                    break
        self._loaded = True
        if not self._available:
            raise StartupError(f"no model could be loaded: {self.not_ready_because}")

    def _load_version(self, version: ModelVersion) -> bool:
        logger.info("loading %s from %s", version, version.path)
        started = time.perf_counter()
        version.state = "LOADING"
        try:
            predictor = self._load_predictor(version.path)
            version.warmup_records = replay_warmup_records(version.path, predictor)
        except ModelLoadError as error:
            version.state, version.error_code, version.error_message = "END", error.code, str(error)
            logger.error("%s is not served: %s", version, error)
            return False
        version.predictor = self._wrap_predictor(version, predictor)
        version.card = read_card(version.path)
        version.state = "AVAILABLE"
        with self._lock:
            versions = {**self._available.get(version.name, {}), version.version: version}
            self._available = {**self._available, version.name: versions}
        warmup = (
            f"{version.warmup_records} warm-up records replayed"
            if version.warmup_records
            else "no warm-up records to replay"
        )
        logger.info("%s is available after %.1f s, %s", version, time.perf_counter() - started, warmup)
        return True


def find_models(models_dir: Path) -> dict[str, list[ModelVersion]]:
    """List the models under a folder, each with its versions, newest first.

    Raises:
        StartupError: there is no such folder, or no model in it.
    """
    if not models_dir.is_dir():
        raise StartupError(
            f"there is no models folder {models_dir}; train and export a model first, "
            "or name another folder with --models-dir"
        )
    models = {path.name: list(_find_versions(path)) for path in _visible_folders(models_dir)}
    for name in [name for name, versions in models.items() if not versions]:
        del models[name]
    if not models:
        alone = any(_version_number(path.name) is not None for path in _visible_folders(models_dir))
        raise StartupError(
            f"{models_dir} looks like one model, with its versions; name the folder above it"
            if alone
            else f"no model in {models_dir}: expected <name>/<version>/saved_model.pb, the version a number"
        )
    return models


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


def _find_versions(model_dir: Path) -> Iterator[ModelVersion]:
    found: dict[int, ModelVersion] = {}
    for path in _visible_folders(model_dir):
        number = _version_number(path.name)
        if number is None:
            continue
        if number in found:
            logger.warning("%s and %s are the same version; the first is served", found[number].path, path)
            continue
        found[number] = ModelVersion(name=model_dir.name, version=number, path=path)
    for number in sorted(found, reverse=True):
        yield found[number]


def _version_number(name: str) -> int | None:
    number = int(name) if re.fullmatch(r"[0-9]{1,30}", name) else None
    return number if number is not None and number <= MAX_VERSION else None


def _visible_folders(path: Path) -> list[Path]:
    return sorted(child for child in path.iterdir() if child.is_dir() and not child.name.startswith("."))
