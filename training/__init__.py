"""Train image classifiers in Keras, evaluate them, and export them as SavedModels.

Importing this package does not import TensorFlow; the first use of `train`, `evaluate` or `export` does.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from image_formats import __version__

if TYPE_CHECKING:
    from training.api import evaluate, export, train
    from training.config import TrainingConfig
    from training.data import Dataset, Split

__all__ = ["Dataset", "Split", "TrainingConfig", "__version__", "evaluate", "export", "train"]

_MODULES = {"Dataset": "data", "Split": "data", "TrainingConfig": "config"} | dict.fromkeys(
    ("evaluate", "export", "train"), "api"
)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
