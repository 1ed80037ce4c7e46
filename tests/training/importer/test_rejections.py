"""Models that are rejected, each with the message that its user sees: what was found, and how to fix it."""

import json
import re
import zipfile
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from tests.training.importer.networks import Subclassed, convolutional, read, subclassed
from training.errors import ExportError, ModelError

INPUT = (12, 14, 3)


def rejection(given, **options):
    """Return the message of the rejection, on one line."""
    options.setdefault("input_scale", "0..1")
    with pytest.raises(ModelError) as caught:
        read(given, **options)
    return str(caught.value)


def broken_weights():
    model = convolutional()
    model.layers[-1].bias.assign([0, np.nan, 0])
    return model


def two_inputs():
    inputs = [keras.Input(INPUT, name="left"), keras.Input(INPUT, name="right")]
    return keras.Model(inputs, convolutional()(layers.Add()(inputs)))


def two_outputs():
    inputs = keras.Input(INPUT)
    features = layers.Flatten()(inputs)
    return keras.Model(inputs, {"kind": layers.Dense(3)(features), "age": layers.Dense(1)(features)})


def python_step():
    def classify(images):
        return tf.ensure_shape(
            tf.numpy_function(lambda batch: batch.mean(axis=(1, 2)), [images], tf.float32), (None, 3)
        )

    return classify


def average(images):
    return tf.reduce_mean(images, axis=(1, 2))


def multiply(images):
    return images @ tf.zeros((5, 3))


@pytest.mark.parametrize(
    ("build", "options", "messages"),
    [
        (
            convolutional,
            {"input_scale": None},
            [
                "does not show which pixel values it was trained on",
                "--input-scale 0..255, 0..1, -1..1, imagenet-caffe or imagenet-torch; or labelled images that show it,",
                "--data FOLDER",
            ],
        ),
        (
            lambda: convolutional(shape=(12, 14, 1)),
            {"input_scale": "imagenet-torch"},
            ["takes 12x14 grey, float32 (n, 12, 14, 1), so --input-scale can be 0..255, 0..1, -1..1; got imagenet-"],
        ),
        (
            convolutional,
            {"input_scale": "imagenet-caffe", "color": "bgr"},
            ["--input-scale imagenet-caffe reverses RGB to BGR itself: leave out --color bgr"],
        ),
        (
            lambda: convolutional(last=layers.Dense(3, activation="sigmoid")),
            {},
            [
                r"returns (n, 3) of values from 0 to 1 whose rows sum to ",
                "3 independent probabilities, as of several sigmoids",
                "model.layers[-1].activation = keras.activations.softmax",
            ],
        ),
        (
            lambda: convolutional(last=layers.Dense(3, activation=lambda x: keras.ops.sigmoid(x) / 7)),
            {},
            ["of values from 0 to 1 whose rows sum to 0.", "not to 1"],
        ),
        (
            lambda: convolutional(last=layers.Dense(1, activation="softmax")),
            {},
            ["a softmax of one value, which is always 1. Use a sigmoid, and train it again"],
        ),
        (
            broken_weights,
            {},
            [
                "returns NaN or infinite values for 8 of 8 images",
                "/bias contain NaN or infinite values: the training diverged. Save an earlier checkpoint",
            ],
        ),
        (
            convolutional,
            {"labels": "cat,dog"},
            ["has 3 classes (softmax of 3 classes), and --labels has 2: cat, dog. Give one label for each class"],
        ),
        (
            lambda: convolutional(last=layers.Dense(1, activation="sigmoid")),
            {"labels": "a,b,c"},
            ["has 2 classes (one sigmoid, the probability of the second of two classes), and --labels has 3"],
        ),
        (convolutional, {"labels": None}, ["has 3 classes, and a model has no names for them", "--labels cat,dog"]),
        (
            two_inputs,
            {},
            ["has 2 inputs, left (n, 12, 14, 3), right (n, 12, 14, 3); one batch of images is served", "Wrap it"],
        ),
        (two_outputs, {}, ["has 2 outputs: ", "kind (n, 3)", "age (n, 1)", "--output NAME"]),
        (two_outputs, {"output": "sort"}, ["has no output 'sort'; its outputs are: "]),
        (
            lambda: subclassed(batch_statistics=True),
            {},
            [
                "returns other values for an image alone than in a batch",
                "(its layers batch_normalization",
                "the rows influence each other, as by batch statistics at inference",
                "training=False",
            ],
        ),
        (
            lambda: subclassed(dropout=True),
            {},
            [
                "returns other values for the same images",
                "(its layers dropout",
                "dropout or noise is active at inference. Do not call them with training=True",
            ],
        ),
        (Subclassed, {}, ["was never built, so it has no weights. Call it once on a batch of images"]),
        (
            lambda: keras.Sequential([keras.Input((784,)), layers.Dense(3)]),
            {},
            ["takes float32 (n, 784); expected images, (n, height, width, 1 or 3)", "reshape or flatten the images"],
        ),
        (
            lambda: convolutional(shape=(12, 14, 4)),
            {},
            ["takes float32 (n, 12, 14, 4): 4 channels. Images have 3, or 1 in grey"],
        ),
        (
            lambda: keras.Sequential([keras.Input(batch_shape=(8, *INPUT)), layers.Flatten(), layers.Dense(3)]),
            {},
            ["takes float32 (8, 12, 14, 3): its batch size is fixed", "None instead of 8"],
        ),
        (
            lambda: convolutional(shape=(None, None, 3)),
            {},
            ["takes float32 (n, any, any, 3): the image size is open", "--image-size HEIGHTxWIDTH"],
        ),
        (
            convolutional,
            {"image_size": (32, 32)},
            ["takes float32 (n, 12, 14, 3), and --image-size is 32x32. Leave out --image-size"],
        ),
        (
            convolutional,
            {"color": "grey"},
            ["3 channels, and --color is grey. Give --color rgb or bgr, or leave it out"],
        ),
        (
            lambda: tf.function(average),
            {"image_size": (12, 14)},
            ["the number of channels is open. Give --color rgb, bgr or grey"],
        ),
        (
            lambda: keras.Sequential([keras.Input(INPUT), layers.Conv2D(8, 3)]),
            {},
            ["returns (n, 10, 12, 8); expected one row for each image, (n, classes)", "include_top=False"],
        ),
        (
            python_step,
            {"image_size": (12, 14), "color": "rgb"},
            ["runs Python code for each batch (py_function or numpy_function", "which no server has"],
        ),
        (
            lambda: multiply,
            {"image_size": (12, 14), "color": "rgb"},
            [
                "the function multiply fails on a batch of 12x14 colour, float32 (n, 12, 14, 3): ValueError: ",
                "Dimensions must be equal, but are 3 and 5",
            ],
        ),
        (convolutional, {"color": "RGB"}, ["the colours can be rgb, bgr, grey; got 'RGB'"]),
        (lambda: 3, {}, ["expected a model, its path, or a function of a batch of images; got int"]),
    ],
)
def test_rejected_models(build, options, messages):
    message = rejection(build(), **options)
    for part in messages:
        assert part in message


def test_an_invalid_name_is_rejected_before_the_model_is_read():
    with pytest.raises(ExportError, match=r"'my pets' is not a valid model name.* --name my-pets"):
        read(convolutional(), name="my pets")


CUSTOM = """
import keras

print("executed")

class Scale(keras.layers.Layer):
    def call(self, images):
        return images * 2
"""


@pytest.fixture(scope="module")
def custom(tmp_path_factory):
    """A model with a class of its own in a module beside it."""
    folder = tmp_path_factory.mktemp("custom")
    (folder / "own.py").write_text(CUSTOM)
    namespace: dict[str, Any] = {"__name__": "own"}
    exec(CUSTOM, namespace)
    convolutional(namespace["Scale"]()).save(folder / "pets.keras")
    convolutional(namespace["Scale"]()).save(folder / "pets.h5")
    return folder


@pytest.mark.parametrize("file", ["pets.keras", "pets.h5"])
def test_a_custom_layer_needs_its_code(custom, file, capsys):
    message = rejection(custom / file)
    assert f"{file} uses 'Scale', and its code is not in the file" in message
    assert "Give the Python file that defines it with --custom module.py; the file is executed" in message
    capsys.readouterr()
    assert read(custom / file, custom=custom / "own.py", input_scale="0..1").class_names
    assert capsys.readouterr().out.startswith("executed\n")


def test_code_that_does_not_help_is_named(custom, tmp_path):
    (tmp_path / "other.py").write_text("x = 1\n")
    assert "other.py does not define it" in rejection(custom / "pets.keras", custom=tmp_path / "other.py")
    (tmp_path / "other.py").write_text("1 / 0\n")
    assert "other.py fails: ZeroDivisionError: division by zero" in rejection("x.keras", custom=tmp_path / "other.py")
    assert "--custom none.py is not a file" in rejection("x.keras", custom=type(tmp_path)("none.py"))


@pytest.mark.parametrize("file", ["pets.keras", "pets.h5"])
def test_a_lambda_layer_is_not_executed(tmp_path, file):
    convolutional(layers.Lambda(lambda images: images / 255)).save(tmp_path / file)
    message = rejection(tmp_path / file)
    assert "contains a Lambda layer, which is Python code inside the file" in message
    assert "Write a layer class instead" in message


def test_a_tfsm_layer_in_a_file_is_not_loaded(tmp_path):
    convolutional().export(tmp_path / "inner", verbose=False)
    inner = layers.TFSMLayer(str(tmp_path / "inner"), call_endpoint="serve")
    keras.Sequential([keras.Input(INPUT), inner]).save(tmp_path / "outer.keras")
    message = rejection(tmp_path / "outer.keras")
    assert "outer.keras contains a TFSMLayer, which loads another SavedModel, and that may contain code" in message
    assert "Import the folder of the SavedModel itself" in message


def test_files_that_are_no_models(tmp_path):
    assert f"{tmp_path / 'a.keras'} does not exist. Give a .keras or .h5 file" in rejection(tmp_path / "a.keras")
    (tmp_path / "notes.keras").write_text("a plain file")
    assert "neither a zip archive nor an HDF5 file" in rejection(tmp_path / "notes.keras")
    model = convolutional()
    model.save(tmp_path / "pets.h5")
    (tmp_path / "pets.h5").rename(tmp_path / "pets.keras")
    assert "has the content of a .h5 file: rename it to pets.h5" in rejection(tmp_path / "pets.keras")
    model.save_weights(tmp_path / "pets.weights.h5")
    assert "has weights without a model: save the whole model" in rejection(tmp_path / "pets.weights.h5")
    (tmp_path / "versions" / "1").mkdir(parents=True)
    (tmp_path / "versions" / "1" / "saved_model.pb").touch()
    message = rejection(tmp_path / "versions")
    assert "a folder without saved_model.pb. It contains the SavedModels 1: name one of them" in message
    assert "cannot be loaded as a SavedModel: " in rejection(tmp_path / "versions" / "1")


def test_a_file_of_another_keras_says_which(tmp_path):
    with zipfile.ZipFile(tmp_path / "new.keras", "w") as archive:
        archive.writestr("metadata.json", json.dumps({"keras_version": "99.1"}))
        archive.writestr(
            "config.json", json.dumps({"module": "keras", "class_name": "Sequential", "config": {"layers": 3}})
        )
    message = rejection(tmp_path / "new.keras")
    assert re.search(r"cannot be loaded by Keras 3\.[\d.]+; Keras 99.1 wrote it: ", message)


def test_a_saved_model_without_a_known_signature(tmp_path):
    module = tf.Module()
    spec = tf.TensorSpec((None, 4), tf.float32)
    functions = {name: tf.function(tf.nn.relu).get_concrete_function(spec) for name in ("encode", "decode")}
    tf.saved_model.save(module, str(tmp_path / "coder"), functions)
    message = rejection(tmp_path / "coder")
    assert "has the signatures " in message
    assert "expected serving_default or serve, which model.export writes" in message
