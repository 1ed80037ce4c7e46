"""The datasets: everything that knows where images come from. Imports no TensorFlow.

`cifar10` is looked for in the usual places, `shapes` is drawn, `folder` is any folder of images by class.
"""

from __future__ import annotations

from pathlib import Path

from training.data.cifar10 import load_cifar10
from training.data.dataset import Dataset, Split
from training.data.image_folder import load_image_folder
from training.data.shapes import load_shapes
from training.errors import DatasetError

__all__ = ["Dataset", "Split", "load_dataset"]


def load_dataset(name: str, *, data: Path | None, image_size: tuple[int, int] | None, seed: int) -> Dataset:
    """Load a dataset by name, and only that one: nothing is ever put in its place.

    Args:
        name: "cifar10", "shapes" or "folder".
        data: where it lies; "cifar10" has usual places to look if this is `None`, "folder" has none.
        image_size: (height, width) in pixels to resize to; `None` keeps the images as they are.
        seed: of what is drawn, and of the test split of a folder that has none.

    Raises:
        DatasetError: the data is missing, damaged or unusable.
        ValueError: there is no dataset of this name.
    """
    if name not in ("cifar10", "shapes", "folder"):
        raise ValueError(f'the datasets are "cifar10", "shapes" and "folder"; got {name!r}')
    if name == "folder":
        if data is None:
            raise DatasetError(
                "a folder of images has to be named: --data FOLDER (make train DATASET=folder DATA=FOLDER)"
            )
        return load_image_folder(data, image_size=image_size, seed=seed)
    if image_size is not None:
        raise DatasetError(f"--image-size is for --dataset folder: the images of {name} are 32x32")
    if name == "cifar10":
        return load_cifar10(data, seed=seed)
    if data is not None:
        raise DatasetError(f"--data {data} cannot be used with --dataset shapes, which draws its images")
    return load_shapes(seed=seed)
