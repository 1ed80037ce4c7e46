import dataclasses
import json

import numpy as np
import pytest
import tensorflow as tf

from training.data import Split
from training.evaluation.roc import area_under_roc
from training.evaluation.typicality import evaluate_guard, fit_guard
from training.models.guard import MIN_TYPICALITY, Guard
from training.models.inference_graph import InferenceGraph


def draw_spots(count, *, seed):
    """Grey 32x32 images with a spot of one of three colours, the class."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, count)
    images = rng.normal(90, 12, (count, 32, 32, 3))
    rows, columns = np.mgrid[:32, :32]
    for image, label in zip(images, labels, strict=True):
        (x, y), radius = rng.uniform(8, 24, 2), rng.uniform(3, 7)
        image[(rows - y) ** 2 + (columns - x) ** 2 < radius**2, label] += rng.uniform(60, 160)
    return Split(images.clip(0, 255).astype(np.uint8), labels.astype(np.int64))


def blocks(images):
    """The features: how much each 4x4 block exceeds grey, by colour."""
    return tf.nn.relu(tf.nn.avg_pool2d(tf.cast(images, tf.float32), 4, 4, "VALID") - 95)


SPOTS = InferenceGraph(blocks, lambda features: tf.reduce_max(features, axis=(1, 2)) / 12)
WITHOUT_MAP = InferenceGraph(lambda images: tf.reduce_max(blocks(images), axis=(1, 2)), lambda features: features / 12)
CONSTANT = InferenceGraph(lambda images: 0 * blocks(images), lambda features: tf.reduce_sum(features, axis=(1, 2)))
HELD_OUT, TEST = draw_spots(2000, seed=0), draw_spots(2000, seed=1)
GRAPHS = {"feature map": SPOTS, "no feature map": WITHOUT_MAP, "mirrored": SPOTS.average_flips()}


@pytest.fixture(scope="module", params=GRAPHS)
def fitted(request):
    graph = GRAPHS[request.param]
    guard = fit_guard(graph, HELD_OUT)
    return graph, guard, evaluate_guard(graph, guard, TEST, dataset_name="spots")


def call(graph, guard, images):
    features = graph.features(tf.constant(images))
    logits = graph.head(features)
    outputs = guard.outputs(features, logits, tf.nn.softmax(logits))
    return {name: output.numpy() for name, output in outputs.items()}


def test_typicality_is_the_share_of_images_that_are_less_typical(fitted):
    _, _, evaluation = fitted
    for share in (0.01, MIN_TYPICALITY, 0.25, 0.5, 0.9):
        assert np.mean(evaluation.typicality < share) == pytest.approx(share, abs=0.05)
    assert evaluation.flagged == np.mean(evaluation.typicality < MIN_TYPICALITY)


def test_outputs_agree_with_each_other_and_with_the_examples(fitted):
    graph, guard, evaluation = fitted
    outputs = call(graph, guard, TEST.images[:50])
    np.testing.assert_allclose(outputs["typicality"], evaluation.typicality[:50], atol=1e-3)
    assert outputs["is_typical"].tolist() == (outputs["typicality"] >= np.float32(MIN_TYPICALITY)).tolist()
    probabilities = tf.nn.softmax(graph.logits(tf.constant(TEST.images[:50]))).numpy()
    assert outputs["label_set"].tolist() == (probabilities >= np.float32(guard.set_threshold)).tolist()
    assert (outputs["typicality"].dtype, outputs["is_typical"].dtype) == (np.float32, bool)
    np.testing.assert_allclose(call(graph, guard, guard.examples)["typicality"], guard.example_typicality, atol=1e-3)
    assert guard.example_typicality[0] < 0.01
    assert guard.example_typicality[-1] > 0.99
    assert (np.diff(guard.example_typicality) > 0.05).all()


def test_images_without_a_spot_are_less_typical(fitted):
    graph, guard, evaluation = fitted
    grey = np.random.default_rng(2).normal(90, 12, (200, 32, 32, 3)).clip(0, 255).astype(np.uint8)
    assert area_under_roc(evaluation.typicality, call(graph, guard, grey)["typicality"]) > 0.75


def test_variation_tells_what_the_energy_does_not():
    """Flat colours excite a class as much as a spot does, everywhere."""
    flat = draw_spots(1, seed=0).images * 0 + np.array([200, 95, 95], np.uint8)
    with_map, without = (call(graph, fit_guard(graph, HELD_OUT), flat) for graph in (SPOTS, WITHOUT_MAP))
    assert with_map["typicality"] == 0
    assert not with_map["is_typical"]
    assert without["is_typical"]


def test_sets_cover_the_wanted_share(fitted):
    *_, evaluation = fitted
    assert 0.87 <= evaluation.sets.coverage <= 0.93


@pytest.mark.parametrize("count", [1, 2, 20])
@pytest.mark.parametrize("graph", [SPOTS, CONSTANT], ids=["spots", "constant"])
def test_few_images_or_a_constant_classifier_give_a_guard(graph, count):
    few = draw_spots(count, seed=3)
    guard = fit_guard(graph, few)
    outputs = call(graph, guard, few.images)
    assert ((outputs["typicality"] >= 0) & (outputs["typicality"] <= 1)).all()
    if graph is CONSTANT or count == 1:
        assert outputs["is_typical"].all()
        assert outputs["label_set"].all()


def test_drawn_shapes_are_no_outliers_for_themselves():
    guard = fit_guard(SPOTS, HELD_OUT)
    few = Split(TEST.images[:20], TEST.labels[:20])
    names = [set(evaluate_guard(SPOTS, guard, few, dataset_name=name).outliers) for name in ("shapes", "spots")]
    assert names[1] - names[0] == {"shapes"}
    assert len(names[0]) == 4


def test_evaluation_is_json(fitted):
    _, guard, evaluation = fitted
    values = json.loads(json.dumps(evaluation.to_json()))
    assert values["typicality"]["auroc"] == evaluation.auroc
    assert values["typicality"]["threshold"] == MIN_TYPICALITY
    assert values["prediction_sets"]["threshold"] == guard.set_threshold


def test_guard_is_stored_and_read(tmp_path):
    guard = fit_guard(SPOTS, HELD_OUT)
    path = tmp_path / "guard.npz"
    guard.save(path)
    assert list(tmp_path.iterdir()) == [path]
    loaded = Guard.load(path)
    for field in dataclasses.fields(Guard):
        value, expected = getattr(loaded, field.name), getattr(guard, field.name)
        assert type(value) is type(expected)
        np.testing.assert_array_equal(value, expected)
    whole = path.read_bytes()
    for damaged in (b"", whole[:100], whole[:-100], b"no archive"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"guard\.npz is damaged"):
            Guard.load(path)
    with pytest.raises(FileNotFoundError):
        Guard.load(tmp_path / "none.npz")
