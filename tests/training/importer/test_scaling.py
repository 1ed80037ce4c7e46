"""Input scales are those of keras.applications, and the graph computes what NumPy and Pillow compute."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from tests.training.importer.networks import make_images
from training.importer.preprocessing import Preprocessing
from training.importer.scaling import SCALES, plausible_scales

PIXELS = make_images(5, 7).astype(np.float32)


@pytest.mark.parametrize(
    ("scale", "module"),
    [
        ("-1..1", keras.applications.mobilenet_v2),
        ("imagenet-caffe", keras.applications.resnet50),
        ("imagenet-torch", keras.applications.densenet),
    ],
)
def test_scales_are_those_of_keras_applications(scale, module):
    expected = module.preprocess_input(PIXELS.copy())
    np.testing.assert_array_equal(SCALES[scale](PIXELS), expected)
    np.testing.assert_array_equal(SCALES[scale](tf.constant(PIXELS)), expected)


def test_grey_is_pillows_for_every_rounding():
    # All sums of the weighted channels near a half, and the extremes.
    levels = range(0, 256, 5)
    colours = np.array(list(itertools.product(levels, levels, levels)), np.uint8)[np.newaxis, np.newaxis]
    grey = Preprocessing("0..255", "grey", "nhwc", "float32").apply(tf.constant(colours)).numpy()
    np.testing.assert_array_equal(grey[0, ..., 0], np.asarray(Image.fromarray(colours[0]).convert("L")))


@pytest.mark.parametrize("layout", ["nhwc", "nchw"])
@pytest.mark.parametrize("color", ["rgb", "bgr", "grey"])
def test_the_graph_computes_what_numpy_computes(layout, color):
    images = make_images(5, 7)
    for scale in plausible_scales(channels=1 if color == "grey" else 3, is_float=True):
        preprocessing = Preprocessing(scale, color, layout, "float32")
        expected = preprocessing.apply_numpy(images)
        assert expected.shape == {"nhwc": (5, 5, 7, -1), "nchw": (5, -1, 5, 7)}[layout][:1] + expected.shape[1:]
        np.testing.assert_allclose(preprocessing.apply(tf.constant(images)), expected, rtol=1e-6, atol=1e-6)


def test_whole_numbers_have_one_scale():
    assert plausible_scales(channels=3, is_float=False) == ("0..255",)
    assert "imagenet-caffe" not in plausible_scales(channels=1, is_float=True)
