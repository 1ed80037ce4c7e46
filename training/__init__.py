"""Train image classifiers in Keras, evaluate them, export them as SavedModels, and predict many images.

Importing this package does not import TensorFlow; the first use of `train`, `evaluate`, `export` or `predict` does.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from image_formats import __version__

if TYPE_CHECKING:
    from training.api import evaluate, export, predict, train
    from training.config import TrainingConfig
    from training.data import Dataset, Split

__all__ = ["Dataset", "Split", "TrainingConfig", "__version__", "evaluate", "export", "predict", "train"]

_MODULES = {"Dataset": "data", "Split": "data", "TrainingConfig": "config"} | dict.fromkeys(
    ("evaluate", "export", "predict", "train"), "api"
)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
