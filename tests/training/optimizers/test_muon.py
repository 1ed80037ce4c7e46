import keras
import numpy as np
import pytest
import tensorflow as tf

from training.models.losses import LABEL_SMOOTHING, SmoothedCrossentropy
from training.optimizers.muon import Muon, orthogonalize
from training.optimizers.schedules import LinearDecay


@pytest.mark.parametrize("shape", [(3, 3, 24, 32), (3, 3, 2, 40)])
def test_filter_updates_are_orthogonal(shape):
    kernel = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    step = orthogonalize(tf.constant(kernel)).numpy().reshape(-1, shape[-1])
    before = np.linalg.svd(kernel.reshape(step.shape), compute_uv=False)
    after = np.linalg.svd(step, compute_uv=False)
    assert before.max() / before.min() > 1.2
    assert after.min() > 0.5
    assert after.max() < 1.4
    # The direction of each is kept.
    assert (step * kernel.reshape(step.shape)).sum() > 0.5 * np.linalg.norm(step) * np.linalg.norm(kernel)


def test_filters_keep_their_norm_and_other_variables_use_nesterov():
    rng = np.random.default_rng(0)
    filters, bias = (keras.Variable(np.float32(value)) for value in (rng.normal(size=(3, 3, 4, 8)), np.ones(5)))
    optimizer = Muon(0.24, decay=0.0)
    optimizer.build([filters, bias])
    gradients = [tf.constant(rng.normal(size=v.shape), tf.float32) for v in (filters, bias)]
    for _ in range(3):
        optimizer.apply(gradients, [filters, bias])
    assert 0.5 < np.linalg.norm(filters) / np.sqrt(8) < 1.5
    reference = keras.Variable(np.ones(5, np.float32))
    sgd = keras.optimizers.SGD(0.24 * Muon.BIAS_RATE, momentum=Muon.MOMENTUM, nesterov=True)
    for _ in range(3):
        sgd.apply([gradients[1]], [reference])
    np.testing.assert_allclose(bias, reference, rtol=1e-5)


def test_weight_decay_reduces_biases():
    bias = keras.Variable(np.ones(5, np.float32))
    optimizer = Muon(0.24, decay=0.01)
    optimizer.build([bias])
    for _ in range(10):
        optimizer.apply([tf.zeros(5)], [bias])
    assert 0.5 < bias.numpy().max() < 0.95


def test_learning_rate_decays_linearly_to_0():
    schedule = LinearDecay(0.2, steps=10)
    assert [pytest.approx(float(schedule(step))) for step in (0, 5, 10, 11)] == [0.2, 0.1, 0, 0]
    assert LinearDecay.from_config(schedule.get_config())(5) == schedule(5)


def test_smoothed_loss_matches_keras_for_one_hot_labels():
    probabilities = tf.nn.softmax(np.random.default_rng(0).normal(size=(8, 10)).astype(np.float32))
    labels = np.arange(8)
    expected = keras.losses.CategoricalCrossentropy(label_smoothing=LABEL_SMOOTHING)(
        keras.ops.one_hot(labels, 10), probabilities
    )
    assert float(SmoothedCrossentropy()(labels, probabilities)) == pytest.approx(float(expected), rel=1e-5)
    assert np.isfinite(float(SmoothedCrossentropy()(np.array([0]), tf.constant([[0.0, 1.0]]))))
