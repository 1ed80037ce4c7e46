"""Heat maps, compared with Grad-CAM by a GradientTape on the Keras models, and of graphs whose answer is known."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from training.config import VARIANTS, TrainingConfig
from training.errors import ExportError
from training.exporter.grad_cam import SMALLEST_EVIDENCE, explain
from training.exporter.publish import publish_model
from training.exporter.saved_model import write_saved_model
from training.models import build_model
from training.models.airbench import HEAD_SCALE, crop_to_odd
from training.models.inference_graph import InferenceGraph

SIZE = (40, 48, 3)
TEMPERATURE = 1.7  # divides gradients too, which the normalization undoes


def features_and_logits(model, images):
    """Return the last feature map of a Keras model and the function from it to the logits."""
    if model.name == "airbench":
        maps = model.block3(model.block2(model.block1(model.whitening(crop_to_odd(images)))))
        return maps, lambda maps: HEAD_SCALE * model.head(tf.reduce_max(maps, axis=(1, 2)))
    if model.name == "transfer":
        output = model.probabilities
        standardize = model.standardization
        maps = model.backbone(model.enlarge(images), training=False)
        return maps, lambda maps: standardize(tf.reduce_mean(maps, axis=(1, 2))) @ output.kernel + output.bias
    if hasattr(model, "features"):
        return model.features(images), model.head.logits
    *convolutions, flatten, hidden, output = model.layers
    maps = images
    for layer in convolutions:
        maps = layer(maps)
    return maps, lambda maps: tf.matmul(hidden(flatten(maps)), output.kernel) + output.bias


def grad_cam(model, image, *, mirror):
    """Grad-CAM of one image uint8 (height, width, 3), as in the paper; returns the heat map and the class."""
    views = [image, image[:, ::-1]] if mirror else [image]
    maps, head = features_and_logits(model, tf.constant(np.stack(views)))
    with tf.GradientTape() as tape:
        tape.watch(maps)
        logits = tf.reduce_mean(head(maps), axis=0) / TEMPERATURE
        class_id = int(tf.argmax(logits))
        score = logits[class_id]
    gradients = tape.gradient(score, maps).numpy()
    evidence = [gradient.mean(axis=(0, 1)) * each for gradient, each in zip(gradients, maps.numpy(), strict=True)]
    if mirror:
        evidence[1] = evidence[1][:, ::-1]
    coarse = np.maximum(sum(each.sum(axis=2) for each in evidence), 0)
    heat = tf.image.resize(coarse[..., None], image.shape[:2]).numpy()[..., 0]
    if heat.max() <= SMALLEST_EVIDENCE * sum(np.abs(each).sum(axis=2) for each in evidence).max():
        return np.zeros_like(heat), class_id
    return heat / heat.max(), class_id


def compute(graph, images):
    outputs = tf.function(lambda images: explain(graph, images))(tf.constant(images))
    return outputs["heat_map"].numpy(), outputs["class_id"].numpy()


def make_graph(variant, *, mirror):
    """Return a model with random weights, and the graph that is exported."""
    keras.utils.set_random_seed(0)
    model = build_model(variant, SIZE, classes=3, conv_activation="relu")
    if variant == "transfer":  # as before its training, so that its random backbone makes a difference
        model.standardization.adapt(model.pooled_features(draw_images(8)).numpy())
    config = TrainingConfig.fill_in(variant=variant)
    graph = config.recipe.fold(model, config, temperature=TEMPERATURE)
    return model, graph.average_flips() if mirror else graph


def check_heat_maps(model, images, heat_maps, class_ids, *, mirror):
    assert (heat_maps.dtype, heat_maps.shape) == (np.float32, images.shape[:3])
    for image, heat_map, class_id in zip(images, heat_maps, class_ids, strict=True):
        expected, expected_class = grad_cam(model, image, mirror=mirror)
        assert class_id == expected_class
        np.testing.assert_allclose(heat_map, expected, atol=1e-3)
    assert set(heat_maps.max(axis=(1, 2))) <= {0, 1}
    assert (heat_maps.std(axis=(1, 2)) > 0.01).sum() >= 2  # not uniform, so that the comparison says something


def draw_images(count):
    images = np.random.default_rng(0).integers(0, 256, (count, *SIZE), dtype=np.uint8)
    images[:, 10:30, 5:25] //= 8
    return images


@pytest.mark.parametrize(("variant", "mirror"), [*((variant, False) for variant in VARIANTS), ("sequential", True)])
def test_heat_maps_are_those_of_the_paper(variant, mirror):
    model, graph = make_graph(variant, mirror=mirror)
    images = draw_images(5)
    heat_maps, class_ids = compute(graph, images)
    check_heat_maps(model, images, heat_maps, class_ids, mirror=mirror)
    alone = [compute(graph, images[row : row + 1])[0][0] for row in range(2)]
    np.testing.assert_allclose(heat_maps[:2], alone, atol=1e-3)


def test_exported_heat_maps_are_computed_in_a_session_as_in_a_server(tmp_path):
    model, graph = make_graph("airbench", mirror=True)
    write_saved_model(graph, tmp_path, class_names=("cat", "dog", "fox"), input_shape=SIZE, explain=True)
    images = draw_images(3)
    tf_graph = tf.Graph()
    with tf.compat.v1.Session(graph=tf_graph) as session, tf_graph.as_default():
        loaded = tf.compat.v1.saved_model.load(session, ["serve"], str(tmp_path))
        definition = loaded.signature_def["explain"]
        fetches = {name: output.name for name, output in definition.outputs.items()}
        outputs = session.run(fetches, {definition.inputs["images"].name: images})
    check_heat_maps(model, images, outputs["heat_map"], outputs["class_id"], mirror=True)


# Classifies by colour: the features are the mean colours of 8x8 squares, the logits those of the whole image.
COLOURS = InferenceGraph(
    lambda images: tf.nn.avg_pool2d(tf.cast(images, tf.float32), 8, 8, "VALID"),
    lambda maps: tf.reduce_mean(maps, axis=(1, 2)),
)


@pytest.mark.parametrize("graph", [COLOURS, COLOURS.average_flips()], ids=["plain", "mirror"])
def test_the_object_of_the_predicted_class_lights_up_wherever_it_is(graph):
    places = [(row, column) for row in range(0, 32, 8) for column in range(0, 48, 8)]
    images = np.full((len(places), 32, 48, 3), 20, np.uint8)
    for image, (row, column) in zip(images, places, strict=True):
        image[row : row + 8, column : column + 8] = (20, 20, 250)  # blue: the class
        image[31 - row - 7 : 32 - row, 47 - column - 7 : 48 - column, 0] = 200  # red, of another class
    heat_maps, class_ids = compute(graph, images)
    assert class_ids.tolist() == [2] * len(places)
    for heat_map, (row, column) in zip(heat_maps, places, strict=True):
        assert heat_map.max() == 1
        brightest = np.argwhere(heat_map > 0.99)
        assert ((brightest >= (row, column)) & (brightest < (row + 8, column + 8))).all()
        other = heat_map[31 - row - 4, 47 - column - 4]  # the middle of the red square
        assert other == pytest.approx(20 / 250, abs=0.02)


def test_regions_that_lower_the_logit_stay_dark():
    """The logit of class 0 is what is bright on the left, less what is bright on the right."""
    sides = tf.concat([tf.ones((1, 1, 2, 1)), -tf.ones((1, 1, 2, 1))], axis=2)
    graph = InferenceGraph(
        lambda images: tf.nn.avg_pool2d(tf.cast(images[..., :1], tf.float32), 8, 8, "VALID") * sides,
        lambda maps: tf.stack([tf.reduce_sum(maps, axis=(1, 2, 3)), tf.zeros(tf.shape(maps)[0])], axis=1),
    )
    image = np.full((1, 32, 32, 3), 100, np.uint8)
    image[:, 8:16, 0:8] = 250
    (heat_map,), class_ids = compute(graph, image)
    assert class_ids.tolist() == [0]
    row, column = np.unravel_index(heat_map.argmax(), heat_map.shape)
    assert 8 <= row < 16
    assert 0 <= column < 8
    assert not heat_map[:, 24:].any()


def test_without_evidence_for_the_class_the_heat_map_is_0():
    """Two channels that cancel out to rounding."""
    graph = InferenceGraph(
        lambda images: tf.concat([maps := COLOURS.features(images)[..., :1], -maps * (1 - 1e-6)], axis=3),
        lambda maps: tf.reshape(tf.reduce_mean(maps, axis=(1, 2, 3)), (-1, 1)),
    )
    heat_maps, _ = compute(graph, np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8))
    assert not heat_maps.any()


@pytest.mark.parametrize(
    ("features", "head", "message"),
    [
        (
            lambda images: tf.reduce_mean(tf.cast(images, tf.float32), axis=(1, 2)),
            tf.identity,
            r"need a feature map \(n, rows, columns, channels\) before the head; this model's features are \(n, 3\)\.",
        ),
        (
            lambda images: tf.reduce_mean(tf.cast(images, tf.float32), axis=(1, 2), keepdims=True),
            COLOURS.head,
            "need a feature map of several pixels; this model's has one",
        ),
        (
            COLOURS.features,
            lambda maps: tf.one_hot(tf.argmax(COLOURS.head(maps), axis=1), 3),
            "its logits do not depend on the features through differentiable operations",
        ),
        (
            COLOURS.features,
            lambda maps: COLOURS.head(tf.raw_ops.AdjustHue(images=maps, delta=0.1)),
            "need the gradient of the head, and one of its operations has none .*AdjustHue",
        ),
    ],
)
def test_a_classifier_without_heat_maps_is_rejected_before_writing(tmp_path, features, head, message):
    graph = InferenceGraph(features, head)
    with pytest.raises(ExportError, match=rf"{message}.*eave out --explain"):
        publish_model(
            graph,
            lambda images: graph.logits(tf.constant(images)).numpy(),
            models_dir=tmp_path,
            name="pets",
            class_names=("cat", "dog", "fox"),
            input_shape=(32, 32, 3),
            metadata={},
            explain=True,
        )
    assert not list(tmp_path.iterdir())
