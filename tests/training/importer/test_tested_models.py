"""Each kind of model: what is served equals what Keras computes with the model's own preprocessing."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from PIL import Image

from tests.training.importer.networks import (
    LABELS,
    adapt,
    convolutional,
    make_images,
    probabilities,
    read,
    softmax,
    subclassed,
)

IMAGES = make_images(12, 14)
UNIT = IMAGES.astype(np.float32) / 255


def test_a_functional_model_on_0_to_1_with_logits():
    inputs = keras.Input((12, 14, 3))
    features = layers.MaxPooling2D()(layers.Conv2D(4, 3)(inputs))
    model = keras.Model(inputs, layers.Dense(3)(layers.Flatten()(features)))
    told: dict[str, str] = {}
    imported = read(model, input_scale="0..1", told=told)
    np.testing.assert_allclose(probabilities(imported, IMAGES), softmax(model.predict(UNIT)), atol=1e-5)
    np.testing.assert_allclose(imported.graph.logits(tf.constant(IMAGES)), model.predict(UNIT), rtol=1e-4, atol=1e-5)
    assert told["outputs"] == "logits of 3 classes"
    assert told["input"] == "12x14 colour, float32 (n, 12, 14, 3)"
    assert told["input scale"] == "0..1, as given; colour rgb"


@pytest.mark.parametrize(
    ("build", "options", "module", "scale"),
    [
        (keras.applications.MobileNetV2, {"alpha": 0.35}, keras.applications.mobilenet_v2, "-1..1"),
        (keras.applications.EfficientNetV2B0, {}, keras.applications.efficientnet_v2, None),
        (keras.applications.ResNet50, {}, keras.applications.resnet50, "imagenet-caffe"),
    ],
    ids=["MobileNetV2", "EfficientNetV2B0", "ResNet50"],
)
def test_models_of_keras_applications_with_their_own_preprocessing(build, options, module, scale):
    keras.utils.set_random_seed(0)
    images = make_images(32, 32, count=48)
    inputs = module.preprocess_input(images.astype(np.float32))
    model = adapt(build(weights=None, classes=3, input_shape=(32, 32, 3), **options), inputs)
    images = images[:6]
    expected = model.predict(inputs[:6], verbose=0)
    told: dict[str, str] = {}
    imported = read(model, input_scale=scale, told=told)
    # Fifty layers with random weights amplify the rounding of float32.
    np.testing.assert_allclose(probabilities(imported, images), expected, atol=1e-3)
    raw = model.predict(images.astype(np.float32) / 99, verbose=0)
    assert np.abs(raw - expected).max() > 1e-2  # another scale gives other probabilities
    if scale is None:
        assert told["input scale"].startswith("0..255: the model rescales it to ")
    features = imported.graph.features(tf.constant(images))
    assert features.shape == (6, 1, 1, model.get_layer(index=-3).output.shape[-1])  # before the global pooling


def test_a_grey_28x28_model():
    model = convolutional(shape=(28, 28, 1))
    images = make_images(28, 28)
    grey = np.stack([np.asarray(Image.fromarray(image).convert("L")) for image in images])[..., None]
    told: dict[str, str] = {}
    imported = read(model, input_scale="0..1", told=told)
    expected = model.predict(grey.astype(np.float32) / 255, verbose=0)
    np.testing.assert_allclose(probabilities(imported, images), expected, atol=1e-5)
    assert imported.input_shape == (28, 28, 3)
    assert told["input"] == "28x28 grey, float32 (n, 28, 28, 1)"


def test_a_grey_model_without_an_axis_for_the_channel():
    model = keras.Sequential([keras.Input((12, 14)), layers.Flatten(), layers.Dense(3)])
    grey = np.stack([np.asarray(Image.fromarray(image).convert("L")) for image in IMAGES])
    expected = softmax(model.predict(grey.astype(np.float32) / 255, verbose=0))
    imported = read(model, input_scale="0..1")
    np.testing.assert_allclose(probabilities(imported, IMAGES), expected, atol=1e-5)
    assert imported.graph.features(tf.constant(IMAGES)).shape == (5, 3)  # no convolution: the logits


def test_a_subclassed_model():
    model = subclassed()
    expected = softmax(model.predict(UNIT, verbose=0))
    imported = read(model, input_scale="0..1")
    np.testing.assert_allclose(probabilities(imported, IMAGES), expected, atol=1e-5)
    assert imported.graph.features(tf.constant(IMAGES)).shape == (5, 10, 12, 4)


def test_a_single_sigmoid_for_two_classes():
    model = convolutional(last=layers.Dense(1, activation="sigmoid"))
    second = model.predict(UNIT, verbose=0)
    told: dict[str, str] = {}
    imported = read(model, labels="cat,dog", input_scale="0..1", told=told)
    expected = np.concatenate([1 - second, second], axis=1)
    np.testing.assert_allclose(probabilities(imported, IMAGES), expected, atol=1e-6)
    assert imported.class_names == ("cat", "dog")
    assert told["outputs"] == "one sigmoid, the probability of the second of two classes"


def test_a_single_logit_for_two_classes():
    model = convolutional(last=layers.Dense(1))
    second = 1 / (1 + np.exp(-model.predict(UNIT, verbose=0)))
    imported = read(model, labels="cat,dog", input_scale="0..1")
    np.testing.assert_allclose(probabilities(imported, IMAGES)[:, 1:], second, atol=1e-6)


def test_a_mixed_float16_model_is_exported_in_float32_and_stays_as_it_was():
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = convolutional()
    finally:
        keras.config.set_dtype_policy(policy)
    single = convolutional()
    single.set_weights(model.get_weights())
    told: dict[str, str] = {}
    imported = read(model, input_scale="0..1", told=told)
    expected = single.predict(UNIT, verbose=0)
    np.testing.assert_allclose(probabilities(imported, IMAGES), expected, atol=1e-5)
    assert np.abs(model.predict(UNIT, verbose=0) - expected).max() > 1e-5  # half precision is another result
    assert told["input"].endswith(", computed in float32")
    assert {layer.dtype_policy.name for layer in model.layers} == {"mixed_float16"}


def test_batch_normalisation_uses_its_own_statistics():
    model = adapt(convolutional(layers.Conv2D(5, 1), layers.BatchNormalization()), UNIT)
    imported = read(model, input_scale="0..1")
    np.testing.assert_allclose(probabilities(imported, IMAGES), model.predict(UNIT, verbose=0), atol=1e-5)


@pytest.mark.parametrize(
    ("first", "scale", "becomes"),
    [
        (lambda: [layers.Rescaling(1 / 255)], "0..255", "0..1"),
        (lambda: [layers.Rescaling(1 / 127.5, offset=-1)], "0..255", "-1..1"),
        (lambda: [layers.Rescaling(2.0, offset=-1)], "0..1", "-1..1"),
        (lambda: [layers.Rescaling(127.5, offset=127.5)], "-1..1", "0..255"),
        (lambda: [layers.Normalization(mean=[120, 115, 104], variance=[63**2, 62**2, 66**2])], "0..255", "-1.9"),
        (lambda: [layers.Normalization(mean=[0.48, 0.46, 0.41], variance=[0.05] * 3)], "0..1", "-2.147"),
        (lambda: [layers.Resizing(10, 10), layers.RandomFlip(), layers.Rescaling(1 / 255)], "0..255", "0..1"),
        (lambda: [layers.Rescaling(1 / 255), layers.ZeroPadding2D(3)], "0..255", "0..1"),
        (lambda: [layers.Lambda(keras.applications.mobilenet_v2.preprocess_input)], "0..255", "-1..1"),
        (lambda: [layers.Lambda(keras.applications.resnet50.preprocess_input)], "0..255", "-123.7..151.1"),
        (lambda: [layers.Lambda(keras.applications.densenet.preprocess_input)], "0..255", "-2.118..2.64"),
    ],
    ids=[
        "rescaling to 0..1", "to -1..1", "from 0..1", "from -1..1", "normalization of pixels", "of 0..1",
        "with resizing and augmentation", "with padding", "preprocess_input tf", "caffe", "torch",
    ],
)  # fmt: skip
def test_preprocessing_layers_inside_show_the_input_scale(first, scale, becomes):
    model = convolutional(*first())
    told: dict[str, str] = {}
    imported = read(model, told=told)
    assert told["input scale"].startswith(f"{scale}: the model rescales it to {becomes}")
    own = {"0..255": lambda x: x, "0..1": lambda x: x / 255, "-1..1": lambda x: x / 127.5 - 1}[scale]
    expected = model.predict(own(IMAGES.astype(np.float32)), verbose=0)
    np.testing.assert_allclose(probabilities(imported, IMAGES), expected, atol=1e-5)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A SavedModel that Keras exported, and its model."""
    folder = tmp_path_factory.mktemp("saved") / "pets"
    model = convolutional()
    model.export(folder, verbose=False)
    return folder, model


@pytest.mark.parametrize(
    "load",
    [
        str,
        lambda folder: keras.layers.TFSMLayer(folder, call_endpoint="serve"),
        lambda folder: keras.layers.TFSMLayer(folder, call_endpoint="serving_default"),
        lambda folder: keras.Sequential([keras.Input((12, 14, 3)), keras.layers.TFSMLayer(folder, "serve")]),
    ],
    ids=["folder", "TFSMLayer serve", "TFSMLayer serving_default", "TFSMLayer in a model"],
)
def test_a_saved_model_and_a_tfsm_layer(saved, load):
    folder, model = saved
    imported = read(load(str(folder)), input_scale="imagenet-torch")
    pixels = keras.applications.densenet.preprocess_input(IMAGES.astype(np.float32))
    np.testing.assert_allclose(probabilities(imported, IMAGES), model.predict(pixels, verbose=0), atol=1e-5)
    assert imported.graph.features(tf.constant(IMAGES)).shape == (5, 10, 12, 4)


@pytest.mark.parametrize("suffix", [".keras", ".h5", ".hdf5"])
def test_files(tmp_path, suffix):
    model = convolutional()
    path = tmp_path / f"pets{'.h5' if suffix == '.hdf5' else suffix}"
    model.save(path)
    path = path.rename(path.with_suffix(suffix))
    imported = read(path, input_scale="0..1")
    np.testing.assert_allclose(probabilities(imported, IMAGES), model.predict(UNIT, verbose=0), atol=1e-5)
    assert imported.name == "pets"


def test_a_model_with_the_channels_first():
    first = layers.Permute((2, 3, 1))  # convolutions with the channels first need a GPU
    model = convolutional(first, shape=(3, 12, 14))
    told: dict[str, str] = {}
    imported = read(model, input_scale="0..1", told=told)
    expected = model.predict(UNIT.transpose(0, 3, 1, 2), verbose=0)
    np.testing.assert_allclose(probabilities(imported, IMAGES), expected, atol=1e-5)
    assert told["input"] == "12x14 colour, float32 (n, 3, 12, 14)"


def test_a_function():
    kernel = np.random.default_rng(0).normal(size=(3, 3)).astype(np.float32)

    def classify(images):
        return tf.nn.softmax(tf.linalg.matmul(tf.reduce_mean(images, axis=(1, 2)), kernel))

    imported = read(classify, input_scale="0..1", image_size=(12, 14), color="bgr")
    expected = softmax(UNIT[..., ::-1].mean(axis=(1, 2)) @ kernel)
    np.testing.assert_allclose(probabilities(imported, IMAGES), expected, atol=1e-5)
    assert imported.name == "classify"


def test_whole_numbers_are_pixels():
    inputs = keras.Input((12, 14, 3), dtype="uint8")
    model = keras.Model(inputs, convolutional()(layers.Rescaling(1 / 99)(inputs)))
    told: dict[str, str] = {}
    imported = read(model, told=told)
    np.testing.assert_allclose(probabilities(imported, IMAGES), model.predict(IMAGES, verbose=0), atol=1e-5)
    assert told["input scale"] == "0..255: the model takes uint8; colour rgb"


def test_the_named_output_of_several():
    inputs = keras.Input((12, 14, 3))
    features = layers.GlobalAveragePooling2D()(layers.Conv2D(4, 3)(inputs))
    heads = {"kind": layers.Dense(3)(features), "age": layers.Dense(1)(features)}
    model = keras.Model(inputs, heads)
    told: dict[str, str] = {}
    imported = read(model, output="kind", input_scale="0..1", told=told)
    expected = softmax(model.predict(UNIT, verbose=0)["kind"])
    np.testing.assert_allclose(probabilities(imported, IMAGES), expected, atol=1e-5)
    assert told["outputs"] == "logits of 3 classes, of the output 'kind'"


def test_the_features_are_the_last_map_before_the_head_of_a_nested_network():
    base = convolutional(layers.Conv2D(6, 3, padding="same"), last=layers.Activation("linear"))
    outputs = layers.Dense(3, activation="softmax")(layers.Dropout(0.5)(base(keras.Input((12, 14, 3)))))
    model = keras.Sequential([base, layers.Dropout(0.5), layers.Dense(3, activation="softmax")])
    assert outputs.shape == (None, 3)
    imported = read(model, input_scale="0..1")
    features = imported.graph.features(tf.constant(IMAGES))
    assert features.shape == (5, 10, 12, 4)
    np.testing.assert_allclose(
        softmax(imported.graph.head(features).numpy()), model.predict(UNIT, verbose=0), atol=1e-5
    )


def test_a_global_pooling_that_keeps_its_axes_is_no_feature_map():
    inputs = keras.Input((12, 14, 3))
    pooled = layers.GlobalAveragePooling2D(keepdims=True)(layers.Conv2D(4, 3)(inputs))
    model = keras.Model(inputs, layers.Softmax()(layers.Flatten()(layers.Conv2D(3, 1)(pooled))))
    imported = read(model, input_scale="0..1")
    assert imported.graph.features(tf.constant(IMAGES)).shape == (5, 10, 12, 4)
    np.testing.assert_allclose(probabilities(imported, IMAGES), model.predict(UNIT, verbose=0), atol=1e-5)


def test_two_branches_are_cut_where_they_begin():
    inputs = keras.Input((12, 14, 3))
    common = layers.Conv2D(4, 3)(inputs)
    pooled = [layers.GlobalAveragePooling2D()(common), layers.GlobalMaxPooling2D()(common)]
    model = keras.Model(inputs, layers.Dense(3)(layers.Concatenate()(pooled)))
    imported = read(model, input_scale="0..1")
    assert imported.graph.features(tf.constant(IMAGES)).shape == (5, 10, 12, 4)
    np.testing.assert_allclose(probabilities(imported, IMAGES), softmax(model.predict(UNIT, verbose=0)), atol=1e-5)


def test_labels_are_in_the_order_of_the_outputs():
    imported = read(convolutional(), input_scale="0..1")
    assert imported.class_names == LABELS
