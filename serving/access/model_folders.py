"""The folders that a reloaded configuration may name, so that a caller cannot load just any file of the server."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

from serving.errors import InvalidRequest
from serving.inference.model_config import ModelConfig

logger = logging.getLogger(__name__)


class ModelFolders:
    """Allows the models below some `folders`, and those in some folders of their own, `models`."""

    def __init__(self, folders: Iterable[Path], models: Iterable[Path] = ()) -> None:
        self._folders = list(folders)
        self._models = list(models)

    def check(self, configs: Sequence[ModelConfig]) -> None:
        """Check the base paths of a new configuration, with all symbolic links followed.

        Raises:
            InvalidRequest: a base path is not below an allowed folder.
        """
        folders = [folder.resolve() for folder in self._folders]
        models = [path.resolve() for path in self._models]
        for config in configs:
            path = config.base_path.resolve()
            if path not in models and not any(path != folder and path.is_relative_to(folder) for folder in folders):
                logger.error("refused to load %s, which is not below %s", path, " or ".join(map(str, folders)))
                raise InvalidRequest(
                    f"model {config.name}: its base_path must be below the folder of the server's --models-dir, or "
                    "below a folder that holds a model of its --model-config-file, or the folder of a --model"
                )
