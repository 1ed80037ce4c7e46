"""Models named with their folders (`--model NAME=PATH`): a folder of numbered versions, or one SavedModel."""

from __future__ import annotations

import logging
import stat
from collections.abc import Iterable
from pathlib import Path

from serving.errors import StartupError
from serving.inference.model_config import ModelConfig, describe_unreadable, find_versions, version_number

logger = logging.getLogger(__name__)

SAVED_MODEL_FILES = ("saved_model.pb", "saved_model.pbtxt")
KERAS_SUFFIXES = (".keras", ".h5", ".hdf5")


def read_model_folders(models: Iterable[tuple[str, Path]]) -> list[ModelConfig]:
    """Make the config of each model from its name and folder. A folder may be empty or unreadable at startup.

    Raises:
        StartupError: a folder does not exist, or contains something else than a model.
    """
    configs = [ModelConfig(name, path, may_be_version=True) for name, path in models]
    for config in configs:
        try:
            _check_folder(config)
        except OSError as error:
            logger.warning("%s", describe_unreadable(config.base_path, error))
    return configs


def find_model_versions(config: ModelConfig) -> dict[int, Path]:
    """List the versions of a model: its numbered subfolders, or its folder if that itself is a version.

    The latter has the number that is the folder's name, otherwise 1.

    Raises:
        OSError: the folder does not exist or cannot be read.
    """
    path = config.base_path
    if config.may_be_version and _has_saved_model(path):
        number = version_number(path.absolute().name)
        return {1 if number is None else number: path}
    return find_versions(path)


def _has_saved_model(path: Path) -> bool:
    return any((path / name).exists() for name in SAVED_MODEL_FILES)


def _check_folder(config: ModelConfig) -> None:
    name, path = config.name, config.base_path
    try:
        is_folder = stat.S_ISDIR(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError) as error:
        if path.is_symlink():  # its target may come later
            raise
        raise StartupError(f"--model {name}: there is no folder {path}") from error
    if not is_folder:
        raise StartupError(f"--model {name}: {path} is not a folder; name the folder that contains saved_model.pb")
    if find_model_versions(config):
        return
    content = sorted(path.iterdir())
    if models := [entry.name for entry in content if _is_model(entry)]:
        raise StartupError(
            f"--model {name}: {path} contains models ({', '.join(models)}), not the versions of one; "
            f"name one of them, such as {name}={path / models[0]}, or serve all with --models-dir {path}"
        )
    if keras := [entry.name for entry in content if entry.suffix in KERAS_SUFFIXES]:
        raise StartupError(
            f"--model {name}: {path} contains a Keras model ({', '.join(keras)}), not a SavedModel; "
            "export it first, with the command import of training"
        )
    logger.warning("%s has neither saved_model.pb nor a numbered version yet; waiting for model %s", path, name)


def _is_model(folder: Path) -> bool:
    try:
        return not folder.name.startswith(".") and (bool(find_versions(folder)) or _has_saved_model(folder))
    except OSError:
        return False
