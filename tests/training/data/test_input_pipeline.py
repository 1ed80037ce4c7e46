import itertools

import numpy as np
import pytest

from training.data import Split
from training.data.input_pipeline import (
    Parts,
    evaluation_batches,
    split_validation,
    steps_per_epoch,
    training_batches,
)
from training.errors import DatasetError
from training.models.presets import Augmentation


def numbered_images(count, classes=4):
    """Images whose first pixel tells which one they are."""
    images = np.zeros((count, 2, 2, 3), np.uint8)
    images[:, 0, 0, 0] = np.arange(count)
    return Split(images, np.arange(count, dtype=np.int64) % classes)


def numbers(batches):
    return [images.numpy()[:, 0, 0, 0].tolist() for images, _ in batches]


def epochs(split, count, *, seed=0, first_epoch=0, batch_size=16):
    steps = steps_per_epoch(split, batch_size)
    batches = training_batches(split, batch_size=batch_size, seed=seed, first_epoch=first_epoch)
    rows = numbers(itertools.islice(batches, count * steps))
    return [rows[epoch * steps : (epoch + 1) * steps] for epoch in range(count)]


def test_validation_split_is_a_disjoint_tenth_of_each_class():
    train = numbered_images(200)
    kept, validation = split_validation(train, seed=3)
    assert np.bincount(validation.labels).tolist() == [5, 5, 5, 5]
    assert np.bincount(kept.labels).tolist() == [45, 45, 45, 45]
    seen = np.concatenate([kept.images[:, 0, 0, 0], validation.images[:, 0, 0, 0]])
    assert sorted(seen) == list(range(200))
    for split in (kept, validation):
        assert (split.images[:, 0, 0, 0] % 4 == split.labels).all()


def test_validation_split_is_a_function_of_the_seed():
    train = numbered_images(200)
    first, again, other = (split_validation(train, seed=seed)[1].images for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_small_classes_have_an_image_in_each_split():
    kept, validation = split_validation(numbered_images(8), seed=0)
    assert np.bincount(kept.labels).tolist() == [1, 1, 1, 1]
    assert np.bincount(validation.labels).tolist() == [1, 1, 1, 1]
    with pytest.raises(DatasetError, match="class 0 has one training image"):
        split_validation(numbered_images(4), seed=0)


def test_every_image_occurs_once_per_epoch():
    first, second = epochs(numbered_images(50), 2)
    for epoch in (first, second):
        assert [len(batch) for batch in epoch] == [16, 16, 16, 2]
        assert sorted(itertools.chain(*epoch)) == list(range(50))
    assert first != second
    assert list(itertools.chain(*first)) != list(range(50))


def test_shuffling_keeps_images_and_labels_together():
    for images, labels in itertools.islice(
        training_batches(numbered_images(50), batch_size=16, seed=0, first_epoch=0), 8
    ):
        np.testing.assert_array_equal(images[:, 0, 0, 0] % 4, labels)


def test_the_order_is_a_function_of_seed_and_epoch():
    split = numbered_images(50)
    whole = epochs(split, 4)
    assert epochs(split, 2, first_epoch=2) == whole[2:]
    assert epochs(split, 4, seed=1) != whole


def test_evaluation_batches_contain_everything_once_in_order():
    batches = numbers(evaluation_batches(numbered_images(50), batch_size=16))
    assert [len(batch) for batch in batches] == [16, 16, 16, 2]
    assert list(itertools.chain(*batches)) == list(range(50))


@pytest.mark.parametrize("parts", [Parts(), Parts(4, range(1, 3))])
def test_the_number_of_evaluation_batches_is_known(parts):
    batches = evaluation_batches(numbered_images(50), batch_size=16, parts=parts)
    assert len(batches) == len(list(batches)) == 4 * len(parts.own)


def corner_images(count, size=20):
    """Images of which each has one bright pixel, in the left half and in the middle row, and its number in the blue."""
    images = np.zeros((count, size, size, 3), np.uint8)
    images[:, 10, 4, 0] = 255
    images[..., 2] = np.arange(count)[:, None, None]
    return Split(images, np.arange(count, dtype=np.int64))


def bright_pixels(images):
    return {int(image[0, 0, 2]): np.argwhere(image[..., 0] == 255)[0] for image in images.numpy()}


@pytest.mark.parametrize(("batch_size", "max_shift"), [(50, 2), (10, 2), (50, 3)])
def test_augmentation_shifts_and_alternates_flips(batch_size, max_shift):
    split = corner_images(100)
    batches = training_batches(
        split, batch_size=batch_size, seed=0, first_epoch=0, augmentation=Augmentation(max_shift)
    )
    steps = 100 // batch_size
    left = []
    for epoch in range(4):
        seen = {}
        for images, labels in itertools.islice(batches.skip(steps * epoch), steps):
            assert images.dtype == np.uint8
            np.testing.assert_array_equal(images[:, 0, 0, 2], labels)
            seen.update(bright_pixels(images))
        assert len(seen) == 100
        rows = np.array([seen[number][0] for number in range(100)])
        columns = np.array([seen[number][1] for number in range(100)])
        is_left = columns < 10
        # From its place, or from the one across, each is so many pixels away at most, in every way there is.
        shifts = set(range(-max_shift, max_shift + 1))
        assert set(rows - 10) == set(np.where(is_left, columns - 4, columns - 15)) == shifts
        left.append(is_left)
    assert 20 < left[0].sum() < 80
    for before, after in itertools.pairwise(left):
        np.testing.assert_array_equal(before, ~after)


def test_cutout_fills_a_square_with_the_mean_colour():
    pixels = np.zeros((200, 12, 16, 3), np.uint8)
    pixels[:100] = 200, 100, 50
    split = Split(pixels, np.arange(200, dtype=np.int64) % 2)
    augmentation = Augmentation(max_shift=1, cutout=5)
    batches = training_batches(split, batch_size=50, seed=0, first_epoch=0, augmentation=augmentation)
    images = np.concatenate([images.numpy() for images, _ in itertools.islice(batches, 4)])
    covered = (images == (100, 50, 25)).all(axis=-1)
    heights, widths = covered.any(axis=2).sum(axis=1), covered.any(axis=1).sum(axis=1)
    np.testing.assert_array_equal(covered.sum(axis=(1, 2)), heights * widths)
    # A square whose middle lies at the edge is cut there.
    assert set(heights) == set(widths) == {3, 4, 5}
    often = covered.mean(axis=0)
    assert often.min() > 0
    assert 2 / 3 < often[4:8, 4:12].mean() / (25 / (12 * 16)) < 3 / 2


@pytest.mark.parametrize("augmentation", [Augmentation(max_shift=2), Augmentation(max_shift=2, cutout=6)])
def test_augmentation_is_a_function_of_seed_and_epoch(augmentation):
    split = corner_images(60)

    def epoch(number, first):
        batches = training_batches(split, batch_size=25, seed=3, first_epoch=first, augmentation=augmentation)
        return [images.numpy() for images, _ in itertools.islice(batches.skip(3 * (number - first)), 3)]

    for ours, resumed in zip(epoch(2, 0), epoch(2, 2), strict=True):
        np.testing.assert_array_equal(ours, resumed)
