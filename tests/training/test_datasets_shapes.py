import numpy as np

from training.datasets import load_dataset
from training.datasets.samples import write_samples
from training.datasets.shapes import CLASS_NAMES, draw_shapes


def test_a_picture_is_a_function_of_the_seed():
    first, again, other = (draw_shapes(40, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.images, again.images)
    np.testing.assert_array_equal(first.labels, again.labels)
    assert (first.images != other.images).any(axis=(1, 2, 3)).all()


def test_the_classes_are_balanced_and_named():
    drawn = draw_shapes(100, seed=0)
    assert np.bincount(drawn.labels).tolist() == [10] * 10
    assert set(CLASS_NAMES) >= {"circle", "ring", "square", "triangle", "star"}
    assert drawn.images.shape == (100, 32, 32, 3)
    assert drawn.images.dtype == np.uint8
    assert drawn.labels.dtype == np.int64


def test_every_picture_shows_something():
    images = draw_shapes(200, seed=3).images.astype(float)
    # A shape stands out: the middle half of the pixels differs from the rest by more than noise does.
    spread = np.percentile(images, 98, axis=(1, 2)) - np.percentile(images, 2, axis=(1, 2))
    assert (spread.max(axis=1) > 60).all()


def test_the_test_images_are_drawn_apart_from_the_training_images():
    dataset = load_dataset("shapes", data=None, image_size=None, seed=0)
    assert dataset.train.images.shape == (8000, 32, 32, 3)
    assert dataset.test.images.shape == (1000, 32, 32, 3)
    train = {image.tobytes() for image in dataset.train.images}
    assert not train & {image.tobytes() for image in dataset.test.images}
    assert dataset.content_hash == load_dataset("shapes", data=None, image_size=None, seed=0).content_hash


def test_samples_are_files_named_by_their_class(tmp_path):
    dataset = load_dataset("shapes", data=None, image_size=None, seed=0)
    paths = write_samples(dataset, tmp_path / "pictures", per_class=2)
    assert len(paths) == len(list((tmp_path / "pictures").iterdir())) == 20
    assert (tmp_path / "pictures" / "star-2.png").is_file()
