"""The `transfer` variant, from a file of weights to an exported model."""

import dataclasses
import logging
import shutil

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf
from keras.src.legacy.saving import legacy_h5_format

from tests.training.test_commands import call
from training import trainer
from training.api import train
from training.config import TrainingConfig
from training.data import Dataset, Split
from training.data.input_pipeline import LoopData, evaluation_batches, training_batches
from training.data.streamed_images import ImageSource, StreamedImages
from training.errors import WeightsError
from training.exporter.publish import export_run
from training.loops import TRAIN_FUNCTIONS
from training.models import RECIPES, feature_cache
from training.models.backbones import BACKBONES, build_backbone, enlarged_size, hash_file, load_weights
from training.models.feature_cache import compute_features
from training.run_dir import RunDir
from training.trainer import load_best_model, train_and_evaluate

OFFICIAL = "weights_mobilenet_v3_small_224_1.0_float_no_top_v2.h5"
EPOCHS = 4

pytestmark = pytest.mark.usefixtures("blank_plots")


def draw_noise(count, *, seed):
    """Noise of four colours, one for each class: random features tell them apart."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count, dtype=np.int64) % 4
    colours = np.array([(180, 0, 0), (0, 180, 0), (0, 0, 180), (150, 150, 150)])
    noise = rng.integers(0, 70, (count, 8, 8, 3)).repeat(4, axis=1).repeat(4, axis=2)
    return Split((noise + colours[labels, None, None]).astype(np.uint8), labels)


@pytest.fixture(scope="module")
def dataset():
    return Dataset("noise", "drawn", ("red", "green", "blue", "grey"), draw_noise(240, seed=0), draw_noise(60, seed=1))


@pytest.fixture(scope="module")
def backbone(dataset):
    """A backbone with random kernels; its batch norms are fitted, so that its features tell images apart."""
    keras.utils.set_random_seed(0)
    network = keras.applications.MobileNetV3Small(weights=None, include_top=False, input_shape=(96, 96, 3))
    for layer in network.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.0
    network(tf.image.resize(dataset.train.images[:64], (96, 96)), training=True)
    return network


@pytest.fixture(scope="module")
def weights(backbone, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "small.weights.h5"
    backbone.save_weights(path)
    return path


@pytest.fixture(scope="module")
def config(weights):
    return TrainingConfig.fill_in(variant="transfer", weights=weights, epochs=EPOCHS, batch_size=50, learning_rate=3e-3)


@pytest.fixture(scope="module")
def result(config, dataset, tmp_path_factory):
    return train(config, dataset, run_dir=tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def network():
    """A backbone to load weights into."""
    return build_backbone("MobileNetV3Small", height=96, width=96)


@pytest.fixture
def copied(result, tmp_path):
    shutil.copytree(result.run.path, tmp_path / "run")
    return RunDir.open(tmp_path / "run")


def test_only_the_head_is_trained(result, backbone, weights):
    model = result.best.model
    for ours, given in zip(model.backbone.get_weights(), backbone.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, given)
    assert [tuple(weight.shape) for weight in model.trainable_variables] == [(576, 4), (4,)]
    history = result.run.read_history()
    assert len(history) == EPOCHS
    assert history[-1].loss < 0.7 * history[0].loss
    assert result.evaluation.accuracy > 0.8
    assert result.best.config.weights_sha256 == hash_file(weights)


def test_a_run_is_resumed_and_loaded_without_the_file_of_weights(result, copied, dataset, weights, caplog, monkeypatch):
    """What is needed is in the checkpoint and in the features kept: nothing is loaded or computed again."""
    # The evaluation takes seconds, and needs no more than the model.
    monkeypatch.setattr(trainer, "_evaluate_best", lambda *_, **__: None)
    away = weights.rename(weights.with_name("away"))
    try:
        with caplog.at_level(logging.INFO):
            config = dataclasses.replace(result.best.config, epochs=EPOCHS + 2)
            train_and_evaluate(copied, dataset, config=config)
        best = load_best_model(copied)
    finally:
        away.rename(weights)
    assert len(copied.read_history()) == EPOCHS + 2
    assert not [message for message in caplog.messages if "computing" in message]
    assert best.epoch.val_loss <= result.best.epoch.val_loss
    ours, before = (loaded.model.standardization.get_weights() for loaded in (best, result.best))
    for now, then in zip(ours, before, strict=True):
        np.testing.assert_array_equal(now, then)


def test_the_export_takes_raw_pixels_and_gives_the_calibrated_outputs_of_the_model(result, dataset, tmp_path):
    version = export_run(result.run, models_dir=tmp_path)
    signatures = tf.saved_model.load(str(version)).signatures
    images = dataset.test.images[:5]
    temperature = result.run.read_evaluation()["test"]["temperature"]
    expected = tf.nn.softmax(result.best.model.logits(images) / temperature).numpy()
    files = tf.constant([tf.io.encode_png(image).numpy() for image in images])
    for outputs in (
        signatures["serving_default"](images=tf.constant(images)),
        signatures["image_bytes"](image_bytes=files),
    ):
        np.testing.assert_allclose(outputs["probabilities"], expected, atol=1e-4)


def test_the_inference_graph_is_cut_at_the_last_feature_map(result, dataset):
    graph = RECIPES["transfer"].fold(result.best.model, result.best.config, temperature=2.0)
    images = tf.constant(dataset.test.images[:3])
    features = graph.features(images)
    assert features.shape == (3, 3, 3, 576)
    pooled = result.best.model.pooled_features(images)
    np.testing.assert_allclose(tf.reduce_mean(features, axis=(1, 2)), pooled, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(graph.head(features), result.best.model.logits(images) / 2, rtol=1e-3, atol=1e-3)


def test_both_loops_train_the_head_the_same(result, dataset):
    model = result.best.model
    features = compute_features(model, dataset.train.images[:100], cache=result.run.path / "other", batch_size=50)
    split = dataclasses.replace(dataset.train, images=dataset.train.images[:100], labels=dataset.train.labels[:100])
    trained = {}
    for loop, function in TRAIN_FUNCTIONS.items():
        keras.utils.set_random_seed(0)
        head = keras.models.clone_model(model.head)
        optimizer = keras.optimizers.Adam(0.01)
        optimizer.build(head.trainable_variables)
        data = LoopData(
            train=training_batches(split, inputs=features, batch_size=40, seed=0, first_epoch=0),
            validation=evaluation_batches(split, inputs=features, batch_size=40),
            steps_per_epoch=3,
            images_per_epoch=100,
            batch_size=40,
        )
        loss = keras.losses.SparseCategoricalCrossentropy()
        results = function(head, optimizer, loss, data, epochs=range(1, 3), callback=Silent())
        trained[loop] = [*head.get_weights(), np.array([[row.loss, row.val_loss] for row in results])]
    for ours, expected in zip(trained["custom"], trained["fit"], strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


class Silent:
    def on_epoch_begin(self, epoch):
        pass

    def on_batch_end(self, step, *, loss, accuracy):
        pass

    def on_validation_batch_end(self):
        pass

    def on_epoch_end(self, result):
        pass


def test_features_are_read_again_and_only_what_is_missing_is_computed(result, dataset, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(feature_cache, "PART_IMAGES", 20)
    model, images = result.best.model, dataset.train.images[:50]
    caplog.set_level(logging.INFO)

    def compute(images):
        return compute_features(model, images, cache=tmp_path / "features", batch_size=8)

    first = compute(images)
    np.testing.assert_allclose(first, model.pooled_features(images), rtol=1e-4, atol=1e-5)
    parts = sorted((tmp_path / "features").iterdir(), key=lambda path: path.stat().st_size)
    assert len(parts) == 3
    np.testing.assert_array_equal(compute(images), first)
    assert caplog.messages == ["computing the features of 50 images with MobileNetV3Small"]

    parts[0].unlink()  # of the last 10
    parts[1].write_bytes(parts[1].read_bytes()[:-100])
    np.testing.assert_array_equal(compute(images), first)
    assert caplog.messages[1:] == ["computing the features of 30 images with MobileNetV3Small"]

    changed = images.copy()
    changed[0] = 255 - changed[0]
    assert (compute(changed)[0] != first[0]).any()
    assert caplog.messages[2:] == ["computing the features of 20 images with MobileNetV3Small"]


def test_features_of_streamed_images_are_those_of_the_images_in_memory(result, dataset, tmp_path, caplog):
    images = dataset.train.images[:50]
    streamed = StreamedImages(ImageSource(images.shape[1:3], images.__getitem__), np.arange(50))
    model = result.best.model
    caplog.set_level(logging.INFO)
    features = compute_features(model, streamed, cache=tmp_path / "features", batch_size=8)
    again = compute_features(model, images, cache=tmp_path / "features", batch_size=8)
    np.testing.assert_array_equal(again, features)
    assert len(caplog.messages) == 1, "the second time, they are read from the same files"
    fresh = compute_features(model, images, cache=tmp_path / "fresh", batch_size=8)
    np.testing.assert_array_equal(features, fresh)


def test_weights_of_keras_2_are_loaded_from_keras_s_cache(backbone, network, tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    (tmp_path / "models").mkdir()
    with h5py.File(tmp_path / "models" / OFFICIAL, "w") as file:  # the format of the official files
        legacy_h5_format.save_weights_to_hdf5_group(file, backbone)
    config = RECIPES["transfer"].complete(TrainingConfig.fill_in(variant="transfer"))
    assert config.weights == tmp_path / "models" / OFFICIAL
    assert config.weights
    load_weights(network, "MobileNetV3Small", config.weights, sha256=config.weights_sha256)
    for ours, given in zip(network.get_weights(), backbone.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, given)


def test_without_weights_training_ends_at_once_and_says_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    monkeypatch.chdir(tmp_path)
    assert call("train", "--variant", "transfer", "--dataset", "folder", "--data", "not-read") == 1
    assert capsys.readouterr().err == (
        "error: the weights of MobileNetV3Small are not here, and are never downloaded silently: name their file with "
        f"--weights PATH (make: WEIGHTS=PATH), or put {OFFICIAL} into {tmp_path / 'keras' / 'models'}. Keras downloads "
        'it there with: python -c "import keras; keras.applications.MobileNetV3Small(include_top=False)"\n'
    )
    assert not list(tmp_path.iterdir())
    assert call("train", "--weights", "small.h5") == 2
    assert "weights must be left out for the variant sequential" in capsys.readouterr().err
    for name, kind in (("absent.h5", "missing"), (".", "a folder")):
        assert call("train", "--variant", "transfer", "--weights", name) == 1
        assert f"{name} with the weights of MobileNetV3Small is {kind}: " in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["another network", "text", "truncated", "renamed", "NaN"])
def test_an_unusable_file_of_weights_is_rejected(kind, network, weights, tmp_path):
    path = tmp_path / "bad.weights.h5"
    shutil.copy(weights, path)
    expected = r"does not have the 939,120 weights of keras.applications.MobileNetV3Small\(include_top=False\): "
    if kind == "another network":
        keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(16, 3)]).save_weights(path)
        expected += rf".* Expected {OFFICIAL}, .* --backbone MobileNetV3Large or --backbone EfficientNetV2B0"
    elif kind == "text":
        path.write_text("<html>404</html>")
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[:100_000])
        expected += ".*truncated file"
    elif kind == "renamed":
        path = path.rename(tmp_path / "bad.h5")
        expected += r".*ends in \.weights\.h5"
    else:
        with h5py.File(path, "r+") as file:
            file["layers/conv2d/vars/0"][0, 0, 0, 0] = np.nan
        expected = r"bad.weights.h5 has weights that are NaN or infinite"
    with pytest.raises(WeightsError, match=expected):
        load_weights(network, "MobileNetV3Small", path, sha256=None)


def test_a_file_that_changed_since_the_run_began_is_rejected(config, dataset, weights, tmp_path):
    """The run was stopped before its first checkpoint, so it needs the file again."""
    other = tmp_path / "other.weights.h5"
    shutil.copy(weights, other)
    complete = RECIPES["transfer"].complete(dataclasses.replace(config, weights=other))
    run = RunDir.create(tmp_path / "run", complete)
    with h5py.File(other, "r+") as file:
        file["layers/conv2d/vars/0"][0, 0, 0, 0] = 7
    with pytest.raises(WeightsError, match=r"other.weights.h5 has changed: its SHA-256 is .* Restore the file, or"):
        train_and_evaluate(run, dataset)


@pytest.mark.parametrize("name", BACKBONES)
def test_the_table_of_backbones_matches_the_networks(name):
    known, network = BACKBONES[name], build_backbone(name, height=64, width=64)
    assert network.count_params() == known.weights
    assert network.output_shape == (None, 2, 2, known.channels)
    largest = max(np.prod(layer.output.shape[1:]) for layer in network.layers) / 64**2
    assert 3 * largest + 3 <= known.values_per_pixel  # input, output and a temporary of the largest layer, the image
    # Preprocessing is inside: the first layer scales pixels.
    assert isinstance(network.layers[1], keras.layers.Rescaling)


@pytest.mark.parametrize(
    ("size", "enlarged"),
    [((32, 32), (96, 96)), ((1, 1), (96, 96)), ((24, 32), (96, 128)), ((96, 97), (96, 97)), ((200, 90), (213, 96))],
)
def test_small_images_are_enlarged_to_96_pixels(size, enlarged):
    assert enlarged_size(*size) == enlarged
