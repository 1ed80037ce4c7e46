"""The bfloat16 convolution has the outputs and gradients of TensorFlow's."""

import numpy as np
import pytest
import tensorflow as tf

from training.models import bf16_conv


@pytest.mark.parametrize("shape", [(5, 3, 3, 4), (3, 7, 7, 4), (2, 2, 9, 4), (1, 1, 1, 4)])
def test_outputs_and_gradients_match_tensorflow(shape):
    rng = np.random.default_rng(0)
    maps, kernel = tf.constant(rng.normal(size=shape)), tf.constant(rng.normal(size=(3, 3, 4, 6)))
    upstream = rng.normal(size=(*shape[:3], 6))
    results = []
    for convolve in (bf16_conv.convolve, lambda maps, kernel: tf.nn.conv2d(maps, kernel, 1, "SAME")):
        with tf.GradientTape() as tape:
            tape.watch((maps, kernel))
            outputs = convolve(maps, kernel)
        results.append((outputs, *tape.gradient(outputs, (maps, kernel), output_gradients=upstream)))
    for ours, tensorflow_s in zip(*results, strict=True):
        np.testing.assert_allclose(ours, tensorflow_s, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("shape", "dtype", "is_for"),
    [((8, 7, 7, 4), "bfloat16", True), ((8, 7, 8, 4), "bfloat16", False), ((8, 3, 3, 4), "float32", False)],
)
def test_it_applies_to_small_bfloat16_feature_maps(shape, dtype, is_for):
    assert bf16_conv.is_for(tf.zeros(shape, dtype)) == is_for
