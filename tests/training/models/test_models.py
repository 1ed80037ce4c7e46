import keras
import numpy as np
import pytest
import tensorflow as tf

from training.config import VARIANTS
from training.errors import DatasetError
from training.models import build_model

ARTICLE = ("sequential", "subclass")


def random_images(count=4, shape=(32, 32, 3)):
    return np.random.default_rng(0).integers(0, 256, (count, *shape), dtype=np.uint8)


@pytest.mark.parametrize("variant", ARTICLE)
def test_the_article_s_parameter_count(variant):
    model = build_model(variant, (32, 32, 3), classes=10, conv_activation="relu")
    assert model.count_params() == 109_834


@pytest.mark.parametrize("activation", ["relu", "linear"])
def test_sequential_and_subclass_are_the_same_network(activation):
    sequential, subclass = (
        build_model(variant, (32, 32, 3), classes=10, conv_activation=activation)
        for variant in ("sequential", "subclass")
    )
    images = random_images()
    assert np.abs(sequential(images) - subclass(images)).max() > 1e-6  # they start with weights of their own
    subclass.set_weights(sequential.get_weights())
    np.testing.assert_array_equal(sequential(images), subclass(images))


@pytest.mark.parametrize("shape", [(32, 32, 3), (31, 25, 3), (22, 36, 3)])
def test_cropped_pixels_do_not_influence_the_output(shape):
    model = build_model("sequential", shape, classes=10, conv_activation="relu")
    layers = [layer for layer in model.layers if not isinstance(layer, keras.layers.Cropping2D)]
    assert len(layers) == len(model.layers) - 1
    copies = [type(layer).from_config(layer.get_config()) for layer in layers]
    whole = keras.Sequential([keras.Input(shape, dtype="uint8"), *copies])
    whole.set_weights(model.get_weights())
    images, labels = tf.constant(random_images(shape=shape)), tf.constant([1, 2, 3, 4])
    results = []
    for network in (model, whole):
        with tf.GradientTape() as tape:
            loss = keras.losses.sparse_categorical_crossentropy(labels, network(images))
        results.append([loss, *tape.gradient(loss, network.trainable_variables)])
    for ours, expected in zip(*results, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-6)


def test_the_activation_is_applied():
    relu, linear = (
        build_model("subclass", (32, 32, 3), classes=10, conv_activation=activation)
        for activation in ("relu", "linear")
    )
    linear.set_weights(relu.get_weights())
    assert np.abs(relu(random_images()) - linear(random_images())).max() > 1e-6


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", [(22, 22, 3), (40, 64, 3)])
def test_other_image_sizes_and_class_counts_work(variant, shape):
    model = build_model(variant, shape, classes=3, conv_activation="relu")
    probabilities = model(random_images(shape=shape)).numpy()
    assert probabilities.shape == (4, 3)
    assert probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("variant", ARTICLE)
def test_raw_pixels_are_rescaled_inside(variant):
    model = build_model(variant, (32, 32, 3), classes=10, conv_activation="relu")
    rescaling = next(layer for layer in model.layers if isinstance(layer, keras.layers.Rescaling))
    np.testing.assert_allclose(rescaling(np.array([[0, 51, 255]], np.uint8)), np.array([[0, 0.2, 1]]), rtol=1e-6)


@pytest.mark.parametrize(("variant", "smallest"), [("sequential", 22), ("subclass", 22), ("airbench", 15)])
def test_too_small_images_are_rejected(variant, smallest):
    build_model(variant, (smallest, 40, 3), classes=10)
    with pytest.raises(DatasetError, match=rf"{smallest - 1}x40.*at least {smallest}x{smallest}.*--image-size"):
        build_model(variant, (smallest - 1, 40, 3), classes=10)


def test_subclass_model_is_restored_from_its_config(tmp_path):
    model = build_model("subclass", (32, 32, 3), classes=10, conv_activation="linear")
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(random_images()), model(random_images()))
