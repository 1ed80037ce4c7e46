"""Model configs: which models and versions are served, and from which folders.

See TensorFlow Serving's `config/model_server_config.proto` and
`sources/storage_path/file_system_storage_path_source.proto`.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from serving.errors import InvalidRequest, StartupError
from serving.quoting import printable

logger = logging.getLogger(__name__)

MAX_VERSION = 2**63 - 1  # an int64 in TensorFlow Serving's protocol
MAX_SHOWN = 40  # characters of an invalid version number in an error message


@dataclass(frozen=True)
class VersionPolicy:
    """Selects the versions to serve: the `latest` N, the `specific` ones, or all if both are None."""

    latest: int | None = 1
    specific: frozenset[int] | None = None

    def candidates(self, found: Iterable[int]) -> list[int]:
        """List the versions that may be served, newest first."""
        return sorted((n for n in found if self.specific is None or n in self.specific), reverse=True)


@dataclass(frozen=True)
class ModelConfig:
    """One model: name, folder of its versions, version policy, and the version of each label.

    A `discovered` model is a subfolder of the models folder, not an entry of a model config file. If it is unreadable,
    it may not be a model: `lost+found`, for example.

    With `may_be_version` the folder may itself be a version, with a SavedModel in it.
    """

    name: str
    base_path: Path
    policy: VersionPolicy = VersionPolicy()
    labels: Mapping[str, int] = field(default_factory=dict)
    discovered: bool = False
    may_be_version: bool = False


class Volumes:
    """Stores the device of each folder, to distinguish an unmounted volume from an emptied folder."""

    def __init__(self) -> None:
        self._devices: dict[Path, int] = {}

    def check(self, path: Path, *, is_empty: bool) -> None:
        """Compare a folder's device with the device that held its content.

        Raises:
            OSError: the folder is empty and on another device than before.
        """
        device = path.stat().st_dev
        if not is_empty:
            self._devices[path] = device
        elif self._devices.get(path, device) != device:
            raise OSError(errno.ENODEV, "it is empty, and its volume is no longer mounted", str(path))


class ModelsFolder:
    """Lists the models in a folder (`<name>/<version>/saved_model.pb`), each with its newest version.

    The folder may be empty or unreadable at startup.

    Raises:
        StartupError: the folder does not exist, or is the folder of one model.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._volumes = Volumes()
        try:
            if not stat.S_ISDIR(path.stat().st_mode):
                raise StartupError(f"{path} is not a folder; name the folder of the models with --models-dir")
            has_models = any(has_versions(config) for config in self())
            if not has_models and any(version_number(child.name) is not None for child in _visible_folders(path)):
                raise StartupError(f"{path} contains the versions of one model; name its parent folder")
        except (FileNotFoundError, NotADirectoryError) as error:
            raise StartupError(
                f"there is no models folder {path}; train and export a model first, "
                "or name another folder with --models-dir"
            ) from error
        except OSError as error:
            logger.warning("%s", describe_unreadable(path, error))

    def __call__(self) -> list[ModelConfig]:
        """List the current models, including unreadable subfolders, in alphabetical order.

        Raises:
            OSError: the folder does not exist, is unreadable, or its volume is no longer mounted.
        """
        folders = _visible_folders(self._path)
        self._volumes.check(self._path, is_empty=not folders)
        configs: dict[str, ModelConfig] = {}
        for folder in folders:
            if self._may_be_model(folder):
                name = printable(folder.name)
                configs.setdefault(name, ModelConfig(name=name, base_path=folder, discovered=True))
        return list(configs.values())

    def _may_be_model(self, folder: Path) -> bool:
        try:
            versions = find_versions(folder)
            self._volumes.check(folder, is_empty=not versions)
        except FileNotFoundError:
            return folder.is_symlink()  # its target may return; any other folder has just been deleted
        except OSError:
            return True
        return bool(versions)


def find_versions(base_path: Path) -> dict[int, Path]:
    """List the versions of a model: the subfolders whose names are numbers.

    Several folders may have the same number. The last by name is used, as in TensorFlow Serving: `1`, not `01`.

    Raises:
        OSError: the folder does not exist or cannot be read.
    """
    found: dict[int, list[Path]] = {}
    for path in _visible_folders(base_path):
        number = version_number(path.name)
        if number is not None:
            found.setdefault(number, []).append(path)
    for paths in found.values():
        if len(paths) > 1:
            _log_duplicates(tuple(paths))
    return {number: paths[-1] for number, paths in found.items()}


@lru_cache(maxsize=256)  # logs each group once, not at every poll
def _log_duplicates(paths: tuple[Path, ...]) -> None:
    logger.warning("%s are the same version; the last is served", " and ".join(map(str, paths)))


def has_versions(config: ModelConfig) -> bool:
    """Return True if a model's folder is readable and contains a version."""
    try:
        return bool(find_versions(config.base_path))
    except OSError:
        return False


def describe_unreadable(path: Path, error: OSError) -> str:
    """Return the reason why a folder cannot be read."""
    if isinstance(error, FileNotFoundError):
        return printable(f"{path} does not exist")
    return printable(f"{path} cannot be read: {error.strerror or error}")


def version_number(text: str) -> int | None:
    """Parse a version number: decimal digits, at most the largest int64; `007` is 7. None for any other text."""
    digits = text.lstrip("0")
    if not re.fullmatch("[0-9]+", text) or len(digits) > len(str(MAX_VERSION)):
        return None
    number = int(digits or "0")
    return number if number <= MAX_VERSION else None


def read_version_number(text: str) -> int:
    """Parse the version number of a request of any protocol.

    Raises:
        InvalidRequest: the text is not a version number.
    """
    number = version_number(text)
    if number is None:
        shown = text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."
        raise InvalidRequest(f"the version must be a whole number from 0 to {MAX_VERSION}, not {shown!r}")
    return number


def read_config_file(path: Path) -> list[ModelConfig]:
    """Read a `ModelServerConfig` in protocol buffer text format, as `tensorflow_model_server --model_config_file` does.

    Raises:
        StartupError: the file is unreadable or invalid.
    """
    from google.protobuf import text_format
    from tensorflow_serving.config import model_server_config_pb2

    try:
        config = text_format.Parse(path.read_text(), model_server_config_pb2.ModelServerConfig())
        return read_config(config)
    except OSError as error:
        raise StartupError(f"cannot read the model config {path}: {error.strerror}") from error
    except (text_format.ParseError, UnicodeDecodeError) as error:
        raise StartupError(f"{path} is not a ModelServerConfig in text format: {error}") from error
    except InvalidRequest as error:
        raise StartupError(f"{path}: {error}") from error


def read_config(config: Any) -> list[ModelConfig]:
    """Read a `ModelServerConfig` message.

    Raises:
        InvalidRequest: the message is not a list of models, or a model is invalid.
    """
    if config.WhichOneof("config") != "model_config_list":
        raise InvalidRequest(
            "ServerModelConfig type not supported by HandleReloadConfigRequest. Only ModelConfigList is currently "
            "supported"
        )
    models = [_read_model(model) for model in config.model_config_list.config]
    names = [model.name for model in models]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise InvalidRequest(f"model names must be unique; {', '.join(repeated)} is repeated")
    return models


def _read_model(model: Any) -> ModelConfig:
    if not model.name or re.search("[/:]", model.name):
        raise InvalidRequest(f"expected a model name without / and :, got {model.name!r}")
    if model.model_platform not in ("", "tensorflow"):
        raise InvalidRequest(f"model {model.name}: expected the platform 'tensorflow', got {model.model_platform!r}")
    path = Path(model.base_path)
    if not path.is_absolute():
        # A relative path would depend on the server's working directory, which clients do not know.
        raise InvalidRequest(f"model {model.name}: expected an absolute base_path, got {model.base_path!r}")
    labels = dict(model.version_labels)
    if "" in labels:
        raise InvalidRequest(f"model {model.name}: a version label must not be empty")
    return ModelConfig(name=model.name, base_path=path, policy=_read_policy(model), labels=labels)


def _read_policy(model: Any) -> VersionPolicy:
    policy = model.model_version_policy
    match policy.WhichOneof("policy_choice"):
        case "all":
            return VersionPolicy(latest=None)
        case "specific":
            versions: Sequence[int] = policy.specific.versions
            if not versions:
                raise InvalidRequest(f"model {model.name}: the version policy `specific` lists no versions")
            return VersionPolicy(latest=None, specific=frozenset(versions))
        case _:
            return VersionPolicy(latest=policy.latest.num_versions or 1)


def _visible_folders(path: Path) -> list[Path]:
    """List the subfolders, including broken symbolic links: their targets may return."""
    with os.scandir(path) as entries:
        return sorted(Path(entry) for entry in entries if not entry.name.startswith(".") and _may_be_folder(entry))


def _may_be_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return stat.S_ISDIR(entry.stat().st_mode)
    except OSError:
        return entry.is_symlink() or entry.is_dir(follow_symlinks=False)
