import hashlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from training.config import TrainingConfig
from training.data import load_dataset
from training.data.dataset import write_samples
from training.data.shapes import CLASS_NAMES, draw_shapes


@pytest.fixture(scope="module")
def shapes():
    return load_dataset(TrainingConfig(dataset="shapes"))


def test_same_seed_gives_equal_images_in_every_process():
    code = (
        "import hashlib; from training.data.shapes import draw_shapes; "
        "print(hashlib.sha256(draw_shapes(60, seed=1).images.tobytes()).hexdigest())"
    )
    elsewhere = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert hashlib.sha256(draw_shapes(60, seed=1).images.tobytes()).hexdigest() == elsewhere.strip()


def test_another_seed_or_stream_gives_other_images():
    first, other_seed, other_stream = (
        draw_shapes(40, seed=1),
        draw_shapes(40, seed=2),
        draw_shapes(40, seed=1, stream=1),
    )
    drawn = [{image.tobytes() for image in split.images} for split in (first, other_seed, other_stream)]
    assert len(set.union(*drawn)) == 120


@pytest.mark.parametrize("count", [1, 7, 100])
def test_the_classes_are_balanced(count):
    drawn = draw_shapes(count, seed=0)
    assert drawn.images.shape == (count, 32, 32, 3)
    counts = np.bincount(drawn.labels, minlength=10)
    assert counts.max() - counts.min() <= 1


def test_class_names_are_sorted_like_those_of_a_folder():
    assert tuple(sorted(CLASS_NAMES)) == CLASS_NAMES
    assert len(CLASS_NAMES) == 10
    assert set(CLASS_NAMES) >= {"circle", "ring", "square", "triangle", "star"}


def test_dataset_has_the_documented_counts_without_duplicates(shapes):
    for split, count in ((shapes.train, 8000), (shapes.test, 1000)):
        assert split.images.shape == (count, 32, 32, 3)
        assert np.bincount(split.labels).tolist() == [count // 10] * 10
    pictures = {image.tobytes() for split in (shapes.train, shapes.test) for image in split.images}
    assert len(pictures) == 9000
    assert shapes.source == "drawn, seed 0"


def test_shapes_contrast_with_their_background(shapes):
    # The corners are background nearly always, so their median is; a shape covers at least a tenth of a picture.
    images = shapes.test.images.astype(int)
    corners = images[:, [0, 0, -1, -1], [0, -1, 0, -1]]
    difference = np.abs(images - np.median(corners, axis=1)[:, None, None]).max(axis=3)
    share = (difference > 50).mean(axis=(1, 2))
    assert np.mean(share > 0.05) > 0.99
    assert np.mean(share < 0.8) > 0.99


def test_colour_alone_does_not_predict_the_class(shapes):
    """A nearest-mean classifier on the mean colour does little better than chance: the shape is what matters."""
    train, test = (split.images.mean(axis=(1, 2)) for split in (shapes.train, shapes.test))
    means = np.stack([train[shapes.train.labels == class_id].mean(axis=0) for class_id in range(10)])
    nearest = np.linalg.norm(test[:, None] - means, axis=2).argmin(axis=1)
    assert (nearest == shapes.test.labels).mean() < 0.3


def test_samples_are_files_named_by_their_class(shapes, tmp_path):
    paths = write_samples(shapes, tmp_path / "new" / "pictures", per_class=2)
    assert [path.name for path in paths] == [f"{name}-{number}.png" for name in CLASS_NAMES for number in (1, 2)]
    stars = shapes.test.images[shapes.test.labels == CLASS_NAMES.index("star")]
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "new" / "pictures" / "star-2.png")), stars[1])
