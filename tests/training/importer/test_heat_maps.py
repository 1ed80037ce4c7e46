"""Heat maps of imported models, compared with Grad-CAM by a GradientTape on the Keras model."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from tests.training.importer.networks import adapt, convolutional, make_images, read
from training import export
from training.exporter.grad_cam import explain


def grad_cam(model, inputs, *, layer, sign=None):
    """Return heat maps by the output of a layer; of a single logit with `sign`, 1 for the second class and -1."""
    inner = keras.Model(model.inputs[0], [model.layers[layer].output, model.outputs[0]])
    with tf.GradientTape() as tape:
        maps, outputs = inner(inputs)
        scores = outputs[:, 0] * sign if sign is not None else tf.reduce_max(outputs, axis=1)
    weights = tf.reduce_mean(tape.gradient(scores, maps), axis=(1, 2), keepdims=True)
    heat = tf.image.resize(tf.nn.relu(tf.reduce_sum(weights * maps, axis=3, keepdims=True)), inputs.shape[1:3])
    heat = heat.numpy()[..., 0]
    return heat / np.maximum(heat.max(axis=(1, 2), keepdims=True), 1e-9)


def compute(imported, images):
    outputs = tf.function(lambda images: explain(imported.graph, images))(tf.constant(images))
    return outputs["heat_map"].numpy(), outputs["class_id"].numpy()


def test_a_network_of_keras_applications():
    keras.utils.set_random_seed(0)
    images = make_images(64, 64, count=4)
    inputs = keras.applications.mobilenet_v2.preprocess_input(images.astype(np.float32))
    options = {"alpha": 0.35, "weights": None, "classes": 3, "input_shape": (64, 64, 3)}
    model = adapt(keras.applications.MobileNetV2(**options, classifier_activation=None), inputs)
    heat_maps, class_ids = compute(read(model, input_scale="-1..1"), images)
    assert class_ids.tolist() == model.predict(inputs, verbose=0).argmax(axis=1).tolist()
    np.testing.assert_allclose(heat_maps, grad_cam(model, inputs, layer=-3), atol=2e-3)
    assert heat_maps.std(axis=(1, 2)).max() > 0.1


@pytest.mark.parametrize("bias", [-9, 9], ids=["first class", "second class"])
def test_both_classes_of_a_single_sigmoid(bias):
    """Of the first class, the heat map shows what lowers the value."""
    last = layers.Dense(1, activation="sigmoid", bias_initializer=keras.initializers.Constant(bias))
    model = convolutional(last=last)
    images = make_images(12, 14)
    heat_maps, class_ids = compute(read(model, labels="cat,dog", input_scale="0..1"), images)
    assert class_ids.tolist() == [int(bias > 0)] * len(images)
    logits = convolutional(last=layers.Dense(1))
    logits.set_weights(model.get_weights())
    expected = grad_cam(logits, images.astype(np.float32) / 255, layer=0, sign=np.sign(bias))
    np.testing.assert_allclose(heat_maps, expected, atol=2e-3)
    assert heat_maps.std(axis=(1, 2)).max() > 0.1


def test_an_import_with_heat_maps_and_probabilities_alone(tmp_path):
    images = make_images(12, 14)
    model = convolutional(last=layers.Dense(3))
    version = export(
        model,
        tmp_path,
        name="pets",
        labels="cat,dog,fox",
        input_scale="0..1",
        default_outputs="probabilities",
        explain=True,
    )
    loaded = tf.saved_model.load(str(version)).signatures
    assert set(loaded["serving_default"].structured_outputs) == {"probabilities"}
    expected = grad_cam(model, images.astype(np.float32) / 255, layer=0)
    np.testing.assert_allclose(loaded["explain"](images=tf.constant(images))["heat_map"], expected, atol=2e-3)
