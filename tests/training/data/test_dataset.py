import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from training.config import TrainingConfig
from training.data import Dataset, Split, load_dataset
from training.errors import DatasetError


def split(count=6, *, height=4, width=5, classes=3):
    images = np.arange(count * height * width * 3).astype(np.uint8).reshape(count, height, width, 3)
    return Split(images, np.arange(count) % classes)


def dataset(**changes):
    return dataclasses.replace(Dataset("pets", "here", ("ant", "bee", "cat"), split(), split(3)), **changes)


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (np.zeros((6, 4, 5, 3), np.float32), np.zeros(6, np.int64)),
        (np.zeros((6, 4, 5), np.uint8), np.zeros(6, np.int64)),
        (np.zeros((6, 4, 5, 4), np.uint8), np.zeros(6, np.int64)),
        (np.zeros((6, 4, 5, 3), np.uint8), np.zeros(5, np.int64)),
        (np.zeros((6, 4, 5, 3), np.uint8), np.zeros((6, 1), np.int64)),
        (np.zeros((6, 4, 5, 3), np.uint8), np.zeros(6, np.uint8)),
    ],
)
def test_split_validates_its_arrays(images, labels):
    with pytest.raises(ValueError, match=r"^(images|labels) must be"):
        Split(images, labels)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test": split(height=5)}, "must have the same"),
        ({"test": split(classes=4)}, "from 0 to 2"),
        ({"train": Split(split().images, np.full(6, -1))}, "from 0 to 2"),
        ({"class_names": ("ant", "bee", "bee")}, "must be unique"),
    ],
)
def test_dataset_validates_its_fields(changes, message):
    with pytest.raises(ValueError, match=message):
        dataset(**changes)


def test_content_hash_depends_on_pixels_labels_names_and_splits_only():
    reference = dataset()
    assert dataset(name="other", source="there").content_hash == reference.content_hash
    pixel = split()
    pixel.images[5, 3, 4, 2] ^= 1
    label = split()
    label.labels[0] = 2
    others = [
        dataset(train=pixel),
        dataset(test=label),
        dataset(class_names=("ant", "bee", "dog")),
        dataset(train=reference.test, test=reference.train),
    ]
    hashes = {reference.content_hash, *(other.content_hash for other in others)}
    assert len(hashes) == 5
    assert all(len(bytes.fromhex(digest)) == 32 for digest in hashes)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("folder", {}, "--data FOLDER"),
        ("shapes", {"data": Path("pictures")}, "--data pictures cannot be used with --dataset shapes"),
        ("shapes", {"image_size": (32, 32)}, "--image-size is for --dataset folder"),
        ("cifar10", {"image_size": (48, 48)}, "--image-size is for --dataset folder"),
    ],
)
def test_unsupported_options_of_a_dataset_are_rejected(name, options, message):
    with pytest.raises(DatasetError, match=message):
        load_dataset(TrainingConfig(dataset=name, **options))


def test_datasets_do_not_import_tensorflow():
    """Missing data is reported before TensorFlow is imported, which takes seconds."""
    code = (
        "import sys, training.data; print({'tensorflow', 'keras'} & {name.partition('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
