import numpy as np
import pytest

from training.data.outliers import draw_outliers


@pytest.mark.parametrize(("height", "width"), [(32, 32), (24, 70), (150, 20)])
def test_outliers_have_the_size_of_the_images(height, width):
    sets = draw_outliers(3, height=height, width=width)
    assert list(sets) == ["shapes", "uniform noise", "smooth noise", "text", "flat colours"]
    for images in sets.values():
        assert images.dtype == np.uint8
        assert images.shape == (3, height, width, 3)


def test_outliers_are_of_their_kind():
    sets = draw_outliers(30, height=32, width=32)
    steps = {name: np.abs(np.diff(images.astype(int), axis=2)).mean() for name, images in sets.items()}
    assert steps["flat colours"] == 0 < steps["smooth noise"] < steps["uniform noise"] == pytest.approx(85, abs=2)
    spread = (sets["text"].max(axis=(1, 2)).astype(int) - sets["text"].min(axis=(1, 2))).max(axis=1)
    assert np.median(spread) > 80  # letters on paper


def test_outliers_are_the_same_for_the_same_seed():
    one, same, other = (draw_outliers(4, height=32, width=32, seed=seed) for seed in (1, 1, 2))
    for name, images in one.items():
        np.testing.assert_array_equal(images, same[name])
        assert not np.array_equal(images, other[name])
        assert len({image.tobytes() for image in images}) == 4
