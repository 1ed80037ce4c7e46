import dataclasses
import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf

from training.config import TrainingConfig
from training.data.input_pipeline import LoopData, evaluation_batches, steps_per_epoch, training_batches
from training.data.shapes import draw_shapes
from training.errors import DivergedError
from training.loops import TRAIN_FUNCTIONS
from training.models import RECIPES, build_model
from training.models.losses import ClassWeightedLoss

# `transfer` trains a part of its network: tests/training/test_transfer.py.
TRAINED_WHOLE = [variant for variant, recipe in RECIPES.items() if not recipe.backbones]


class Recorder:
    """A callback that records its calls."""

    def __init__(self):
        self.started, self.steps, self.results = [], [], []
        self.validation_batches = 0

    def on_epoch_begin(self, epoch):
        self.started.append(epoch)

    def on_batch_end(self, step, *, loss, accuracy):
        self.steps.append((step, loss, accuracy))

    def on_validation_batch_end(self):
        self.validation_batches += 1

    def on_epoch_end(self, result):
        self.results.append(result)


@pytest.fixture(scope="module")
def shapes():
    return draw_shapes(200, seed=0), draw_shapes(70, seed=1)


def train(loop, variant, shapes, *, epochs=2, learning_rate=None, first_epoch=0, class_weights=None):
    train_split, validation = shapes
    keras.utils.set_random_seed(0)
    config = TrainingConfig.fill_in(variant=variant, epochs=epochs, learning_rate=learning_rate)
    model = build_model(variant, (32, 32, 3), classes=10)
    if variant == "airbench":
        model.adapt(train_split.images)
    optimizer = config.recipe.make_optimizer(config, steps_per_epoch=steps_per_epoch(train_split, 64))
    optimizer.build(model.trainable_variables)
    loss = config.recipe.make_loss()
    if class_weights is not None:
        loss = ClassWeightedLoss(loss, class_weights)
    recorder = Recorder()
    results = TRAIN_FUNCTIONS[loop](
        model,
        optimizer,
        loss,
        LoopData(
            train=training_batches(train_split, batch_size=64, seed=0, first_epoch=first_epoch),
            validation=evaluation_batches(validation, batch_size=64),
            steps_per_epoch=steps_per_epoch(train_split, 64),
            images_per_epoch=len(train_split.labels),
            batch_size=64,
        ),
        epochs=range(first_epoch + 1, epochs + 1),
        callback=recorder,
    )
    assert results == recorder.results
    return model, recorder


def metrics(results):
    names = ("epoch", "loss", "accuracy", "val_loss", "val_accuracy", "learning_rate")
    return np.array([[getattr(result, name) for name in names] for result in results])


@pytest.mark.parametrize("variant", TRAINED_WHOLE)
def test_both_loops_give_the_same_metrics_and_weights(variant, shapes):
    (fit_model, fit), (custom_model, custom) = (train(loop, variant, shapes) for loop in ("fit", "custom"))
    np.testing.assert_allclose(metrics(fit.results), metrics(custom.results), rtol=1e-4)
    np.testing.assert_allclose(fit.steps, custom.steps, rtol=1e-4)
    for ours, expected in zip(custom_model.get_weights(), fit_model.get_weights(), strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-4)


@pytest.mark.parametrize("loop", TRAIN_FUNCTIONS)
def test_the_callback_is_called_for_every_epoch_and_batch(loop, shapes):
    _, recorder = train(loop, "sequential", shapes, epochs=3, first_epoch=1)
    assert recorder.started == [2, 3]
    assert [result.epoch for result in recorder.results] == [2, 3]
    assert [step for step, _, _ in recorder.steps] == [1, 2, 3, 4] * 2
    assert recorder.validation_batches == 2 * 2  # 70 images in batches of 64
    for result in recorder.results:
        assert result.images_per_s > 0
        assert result.seconds > 0
        assert all(isinstance(value, (int, float)) for value in dataclasses.astuple(result))


@pytest.mark.parametrize("loop", TRAIN_FUNCTIONS)
def test_metrics_are_averaged_over_images_not_batches(loop, shapes):
    # 70 images in batches of 64 and 6: an average over batches would count each of the last 6 tenfold.
    model, recorder = train(loop, "sequential", shapes, epochs=1)
    validation = shapes[1]
    probabilities = model(validation.images).numpy()
    own = probabilities[np.arange(70), validation.labels]
    result = recorder.results[-1]
    assert result.val_loss == pytest.approx(-np.log(own).mean(), rel=1e-4)
    assert result.val_accuracy == pytest.approx((probabilities.argmax(axis=1) == validation.labels).mean())


@pytest.mark.parametrize(("loop", "variant"), [("fit", "sequential"), ("custom", "airbench")])
def test_class_weights_multiply_the_loss_of_each_image(loop, variant, shapes):
    weights = np.linspace(0.1, 3, 10)
    model, recorder = train(loop, variant, shapes, epochs=1, class_weights=weights)
    validation = shapes[1]
    loss = RECIPES[variant].make_loss()
    own = loss.call(tf.constant(validation.labels), model(validation.images)).numpy()
    expected = (weights[validation.labels] * own).mean()
    assert recorder.results[-1].val_loss == pytest.approx(expected, rel=1e-3)
    assert expected != pytest.approx(own.mean(), rel=1e-2)


def test_a_class_weighted_loss_has_the_gradients_of_repeated_images():
    """Weight 3 for a class is the same as each of its images three times."""
    labels = tf.constant([0, 1, 0, 1, 1, 1])
    logits = tf.Variable(np.random.default_rng(0).normal(size=(6, 2)).astype(np.float32))
    inner = RECIPES["sequential"].make_loss()
    rows = tf.constant([0, 0, 0, 1, 2, 2, 2, 3, 4, 5])
    with tf.GradientTape(persistent=True) as tape:
        probabilities = tf.nn.softmax(logits)
        weighted = 6 * ClassWeightedLoss(inner, np.array([3.0, 1.0]))(labels, probabilities)
        repeated = 10 * inner(tf.gather(labels, rows), tf.gather(probabilities, rows))
    np.testing.assert_allclose(weighted, repeated, rtol=1e-6)
    np.testing.assert_allclose(tape.gradient(weighted, logits), tape.gradient(repeated, logits), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("loop", TRAIN_FUNCTIONS)
def test_training_learns(loop, shapes):
    _, recorder = train(loop, "subclass", shapes, epochs=12)
    assert recorder.results[-1].loss < 0.8 * recorder.results[0].loss


@pytest.mark.parametrize("loop", TRAIN_FUNCTIONS)
def test_a_nan_loss_raises_diverged_error(loop, shapes):
    with pytest.raises(DivergedError, match=r"epoch 1, batch \d.*--learning-rate") as error:
        train(loop, "sequential", shapes, learning_rate=1e30)
    assert error.value.exit_code == 3


def test_training_batches_are_uint8_images_and_int64_labels(shapes):
    batch = next(iter(itertools.islice(training_batches(shapes[0], batch_size=64, seed=0, first_epoch=0), 1)))
    assert batch[0].dtype == tf.uint8
    assert batch[1].dtype == tf.int64
