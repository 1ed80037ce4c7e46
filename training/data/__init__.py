"""Datasets and the input pipeline. Importing this package does not import TensorFlow."""

from __future__ import annotations

from typing import TYPE_CHECKING

from training.data.cifar10 import load_cifar10
from training.data.dataset import Dataset, Split
from training.data.image_folder import load_image_folder
from training.data.image_reading import DEFAULT_SIZE
from training.data.shapes import load_shapes
from training.data.shards import is_shard_folder, load_shards
from training.errors import DatasetError

if TYPE_CHECKING:
    from training.config import TrainingConfig

__all__ = ["Dataset", "Split", "load_dataset"]


def load_dataset(config: TrainingConfig) -> Dataset:
    """Load the dataset that a config names.

    "cifar10" is searched in the usual places unless `config.data` names one, "shapes" is drawn, and "folder" is a
    folder of images by class or of shards.

    Raises:
        DatasetError: the data is missing, damaged or unusable.
    """
    if config.dataset == "folder":
        if config.data is None:
            raise DatasetError(
                "a folder of images must be named: --data FOLDER (make train DATASET=folder DATA=FOLDER)"
            )
        if is_shard_folder(config.data):
            return load_shards(config.data, image_size=config.image_size, stream=config.stream)
        default_size = config.recipe.default_image_size or DEFAULT_SIZE
        return load_image_folder(
            config.data,
            image_size=config.image_size,
            seed=config.seed,
            default_size=default_size,
            stream=config.stream,
        )
    if config.image_size is not None:
        raise DatasetError(f"--image-size is for --dataset folder: the images of {config.dataset} are 32x32")
    if config.dataset == "cifar10":
        return load_cifar10(config.data, seed=config.seed)
    if config.data is not None:
        raise DatasetError(f"--data {config.data} cannot be used with --dataset shapes, which draws its images")
    return load_shapes(seed=config.seed)
