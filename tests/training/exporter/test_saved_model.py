import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorflow as tf
from tensorflow_serving.apis import prediction_log_pb2

from training.config import TrainingConfig
from training.data import Split
from training.errors import ExportError
from training.evaluation.typicality import fit_guard
from training.exporter.publish import publish_model
from training.exporter.saved_model import write_saved_model
from training.exporter.versions import next_version
from training.models import RECIPES, build_model
from training.models.folding import compute_logits
from training.models.guard import Guard
from training.models.inference_graph import InferenceGraph

# `transfer` trains a part of its network: tests/training/test_transfer.py.
TRAINED_WHOLE = [variant for variant, recipe in RECIPES.items() if not recipe.backbones]
CLASSES = ("cat", "dog", "größe")  # labels are text, not ASCII


def publish(models_dir, *, variant="sequential", model=None, name="pets", graph=None, expected=None, **options):
    model = model or build_model(variant, (24, 32, 3), classes=3, conv_activation="relu")
    config = TrainingConfig.fill_in(variant=variant)
    return publish_model(
        graph or config.recipe.fold(model, config, temperature=1.0),
        expected or (lambda images: compute_logits(model, tf.constant(images)).numpy()),
        models_dir=models_dir,
        name=name,
        class_names=CLASSES,
        input_shape=(24, 32, 3),
        # These fields of the metadata are replaced.
        metadata={"seed": 7, "class_names": ["a"], "version": 99, "input_shape": [1, 1, 1]},
        **options,
    )


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return publish(tmp_path_factory.mktemp("models"), explain=True)


@pytest.fixture(scope="module")
def exported_probabilities(tmp_path_factory):
    """Like `exported`, with `default_outputs="probabilities"` and without heat maps."""
    return publish(tmp_path_factory.mktemp("models"), default_outputs="probabilities")


@pytest.fixture(scope="module")
def guardable():
    """A model, its guard, and images that are as typical as those that the guard was fitted on."""
    model = build_model("sequential", (24, 32, 3), classes=3, conv_activation="relu")
    rng = np.random.default_rng(0)
    images = (rng.integers(0, 256, (60, 24, 32, 3)) * rng.random((60, 1, 1, 1))).astype(np.uint8)
    graph = TrainingConfig().recipe.fold(model, TrainingConfig(), temperature=1.0)
    return model, fit_guard(graph, Split(images[:40], rng.integers(0, 3, 40))), images[40:]


@pytest.fixture(scope="module")
def exported_with_guard(guardable, tmp_path_factory):
    model, guard, _ = guardable
    return publish(tmp_path_factory.mktemp("guarded"), model=model, guard=guard)


@pytest.mark.parametrize("variant", TRAINED_WHOLE)
def test_export_gives_the_outputs_of_the_model(variant, tmp_path):
    model = build_model(variant, (24, 32, 3), classes=3, conv_activation="relu")
    loaded = tf.saved_model.load(str(publish(tmp_path, variant=variant, model=model)))
    images = np.random.default_rng(0).integers(0, 256, (5, 24, 32, 3), dtype=np.uint8)
    expected = model(images).numpy()
    files = [tf.io.encode_png(image).numpy() for image in images]
    for outputs in (
        loaded.signatures["serving_default"](images=tf.constant(images)),
        loaded.signatures["image_bytes"](image_bytes=tf.constant(files)),
    ):
        np.testing.assert_allclose(outputs["probabilities"], expected, atol=1e-5)
        assert outputs["class_id"].dtype == tf.int64
        assert outputs["class_id"].numpy().tolist() == expected.argmax(axis=1).tolist()
        assert [label.decode() for label in outputs["label"].numpy()] == [CLASSES[i] for i in expected.argmax(axis=1)]
    alone = loaded.signatures["probabilities"](images=tf.constant(images))
    np.testing.assert_allclose(alone["probabilities"], expected, atol=1e-5)


PREDICTION = {
    "probabilities": (tf.float32, [None, 3]),
    "class_id": (tf.int64, [None]),
    "label": (tf.string, [None]),
}
ALONE = {"probabilities": PREDICTION["probabilities"]}


def described(version):
    """Return the outputs of every signature of a version; checks their inputs."""
    signatures = tf.saved_model.load(str(version)).signatures
    inputs = {"image_bytes": ("image_bytes", tf.string, [None]), "labels": ("class_id", tf.int64, [None])}
    for name, signature in signatures.items():
        input_name, dtype, shape = inputs.get(name, ("images", tf.uint8, [None, 24, 32, 3]))
        spec = signature.structured_input_signature[1][input_name]
        assert (spec.dtype, spec.shape.as_list()) == (dtype, shape)
    return {
        name: {key: (spec.dtype, spec.shape.as_list()) for key, spec in signature.structured_outputs.items()}
        for name, signature in signatures.items()
    }


def test_signatures_have_the_documented_inputs_and_outputs(exported, exported_probabilities):
    common = {"image_bytes": PREDICTION, "probabilities": ALONE, "labels": {"label": PREDICTION["label"]}}
    explained = {"heat_map": (tf.float32, [None, 24, 32]), "class_id": (tf.int64, [None])}
    assert described(exported) == {**common, "serving_default": PREDICTION, "explain": explained}
    assert described(exported_probabilities) == {**common, "serving_default": ALONE}


def test_unknown_default_outputs_are_rejected(tmp_path):
    with pytest.raises(ValueError, match="default_outputs must be all or probabilities, not 'label'"):
        publish(tmp_path, default_outputs="label")
    assert not list(tmp_path.iterdir())


def test_the_weights_are_stored_once_for_all_signatures(tmp_path):
    model = build_model("sequential", (24, 32, 3), classes=3, conv_activation="relu")
    graph = TrainingConfig().recipe.fold(model, TrainingConfig(), temperature=1.0)
    write_saved_model(graph, tmp_path, class_names=CLASSES, input_shape=(24, 32, 3), explain=True)
    content = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    kernel = model.layers[4].kernel.numpy()
    assert kernel.shape == (3, 3, 64, 64)
    assert content.count(kernel.tobytes()) == 1


GUARD_OUTPUTS = {
    "typicality": (tf.float32, [None]),
    "is_typical": (tf.bool, [None]),
    "label_set": (tf.bool, [None, 3]),
}


def test_guarded_signatures_have_the_inputs_and_outputs_of_the_others_and_more(exported_with_guard):
    signatures = tf.saved_model.load(str(exported_with_guard)).signatures
    assert set(signatures) == {"serving_default", "image_bytes", "probabilities", "labels", "guarded", "guarded_bytes"}
    for guarded, plain in (("guarded", "serving_default"), ("guarded_bytes", "image_bytes")):
        ours, others = signatures[guarded], signatures[plain]
        assert ours.structured_input_signature == others.structured_input_signature
        specs = (
            {name: (o.dtype, o.shape.as_list()) for name, o in f.structured_outputs.items()} for f in (ours, others)
        )
        found, expected = specs
        assert found == expected | GUARD_OUTPUTS


def test_guarded_signatures_return_what_the_guard_says(guardable, exported_with_guard):
    model, guard, images = guardable
    signatures = tf.saved_model.load(str(exported_with_guard)).signatures
    files = [tf.io.encode_png(image).numpy() for image in images]
    graph = TrainingConfig().recipe.fold(model, TrainingConfig(), temperature=1.0)
    features = graph.features(tf.constant(images))
    expected = guard.outputs(features, graph.head(features), model(images))
    assert 0 < np.mean(expected["typicality"]) < 1
    plain = signatures["serving_default"](images=tf.constant(images))
    for outputs in (
        signatures["guarded"](images=tf.constant(images)),
        signatures["guarded_bytes"](image_bytes=tf.constant(files)),
    ):
        np.testing.assert_allclose(outputs["typicality"], expected["typicality"], atol=1e-3)
        for name in ("is_typical", "label_set"):
            np.testing.assert_array_equal(outputs[name], expected[name])
        np.testing.assert_allclose(outputs["probabilities"], plain["probabilities"], atol=1e-6)
        np.testing.assert_array_equal(outputs["label"], plain["label"])


def test_a_guard_of_another_model_is_not_published(guardable, tmp_path):
    model, guard, _ = guardable
    values = {**vars(guard), "example_typicality": guard.example_typicality[::-1]}
    with pytest.raises(ExportError, match=r"guarded, loaded by tf.saved_model.load.* fitted guard: its typicality by"):
        publish(tmp_path, model=model, guard=Guard(**values))
    assert not list(tmp_path.glob("pets/[0-9]*"))


@pytest.mark.parametrize(
    ("output", "wrong", "message"),
    [
        ("typicality", lambda value: value * np.nan, "a typicality that is not from 0 to 1"),
        ("label_set", tf.logical_not, "is_typical or label_set that do not match"),
    ],
)
def test_inconsistent_guarded_outputs_are_not_published(guardable, tmp_path, monkeypatch, output, wrong, message):
    model, guard, _ = guardable
    right = Guard.outputs
    monkeypatch.setattr(Guard, "outputs", lambda *given: (found := right(*given)) | {output: wrong(found[output])})
    with pytest.raises(ExportError, match=message):
        publish(tmp_path, model=model, guard=guard)


def test_the_labels_can_be_looked_up(exported):
    labels = tf.saved_model.load(str(exported)).signatures["labels"]
    outputs = labels(class_id=tf.constant([2, 0, 1, 2], tf.int64))
    assert [label.decode() for label in outputs["label"].numpy()] == ["größe", "cat", "dog", "größe"]
    with pytest.raises(tf.errors.InvalidArgumentError):
        labels(class_id=tf.constant([3], tf.int64))
    with pytest.raises(tf.errors.InvalidArgumentError):
        labels(class_id=tf.constant([], tf.int64))


# Run as a program of its own: what is tested is that the process survives.
_ASK = """
import sys
import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf import config_pb2

with tf.Graph().as_default(), tf.compat.v1.Session() as session:
    graph = tf.compat.v1.saved_model.load(session, ["serve"], sys.argv[1])
    def ask(signature, batch):
        definition = graph.signature_def[signature]
        (given,) = definition.inputs.values()
        # Without the static check of Session.run, as a server in C++ calls it.
        call = session._make_callable_from_options(config_pb2.CallableOptions(
            feed=[given.name], fetch=[output.name for output in definition.outputs.values()]))
        try:
            call(batch)
            print("ok")
        except tf.errors.InvalidArgumentError as error:
            print(str(error).splitlines()[0])
    wrong = [(3,), (2, 2), (0,), (1, 31, 32, 3), (1, 24, 32, 1), (24, 32, 3), (1, 1, 24, 32, 3)]
    for signature in ["serving_default", "probabilities", "explain"]:
        for shape in [*wrong, (0, 24, 32, 3), (2, 24, 32, 3)]:
            ask(signature, np.zeros(shape, np.uint8))
    for files in [[], [[b"a"]], b"a", [b"a"]]:
        ask("image_bytes", np.array(files, object))
"""


def test_wrong_shapes_and_empty_batches_are_rejected_in_the_graph(exported):
    done = subprocess.run(
        [sys.executable, "-c", _ASK, str(exported)],
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    *pixels, no_files, nested_files, scalar, no_image = done.stdout.splitlines()
    assert len(pixels) == 3 * 9
    for *wrong_shapes, no_rows, two_images in (pixels[:9], pixels[9:18], pixels[18:]):
        for line in wrong_shapes:
            assert re.match(r"Shape of tensor .* is not compatible with expected shape \[\?,24,32,3\]", line)
        assert "images must hold at least one row; got a batch of 0" in no_rows
        assert two_images == "ok"
    assert "image_bytes must hold at least one row; got a batch of 0" in no_files
    for line in (nested_files, scalar):
        assert re.match(r"Shape of tensor .* is not compatible with expected shape \[\?\]", line)
    assert "image_bytes must hold JPEG or PNG files" in no_image


def test_model_json_contains_the_metadata(exported):
    metadata = json.loads((exported / "assets.extra" / "model.json").read_text())
    assert (metadata["name"], metadata["version"], metadata["seed"]) == ("pets", 1, 7)
    assert metadata["created"].endswith("+00:00")
    assert metadata["class_names"] == list(CLASSES)
    assert metadata["input_shape"] == [24, 32, 3]


def test_warmup_records_are_valid_requests(exported, exported_probabilities, exported_with_guard):
    often = [(name, size) for name in ("image_bytes", "serving_default") for size in (1, 8, 64)]
    guarded = [(name, size) for name in ("guarded", "guarded_bytes") for size in (1, 8, 64)]
    for version, others in (
        (exported, [("explain", 1)]),
        (exported_probabilities, []),
        (exported_with_guard, guarded),
    ):
        signatures = tf.saved_model.load(str(version)).signatures
        records = tf.data.TFRecordDataset(str(version / "assets.extra" / "tf_serving_warmup_requests"))
        requests = []
        for record in records.as_numpy_iterator():
            request = prediction_log_pb2.PredictionLog.FromString(record).predict_log.request
            assert request.model_spec.name == "pets"
            ((name, proto),) = request.inputs.items()
            batch = tf.constant(tf.make_ndarray(proto))
            signatures[request.model_spec.signature_name](**{name: batch})
            requests.append((request.model_spec.signature_name, len(batch)))
        assert sorted(requests) == sorted([*often, ("probabilities", 1), *others])


def test_versions_only_grow(tmp_path):
    assert publish(tmp_path).name == "1"
    with next_version(tmp_path / "pets") as (second, partial):
        partial.mkdir()
    assert second == 2
    (tmp_path / "pets" / "2").rmdir()
    with next_version(tmp_path / "pets") as (third, partial):
        partial.mkdir()
    assert third == 3
    (tmp_path / "pets" / "0041").mkdir()
    assert publish(tmp_path).name == "42"


@pytest.mark.parametrize(
    ("folders", "remembered", "version"),
    [
        (["7", "99999999999999999999", "9223372036854775808"], "", 8),
        ([], "99999999999999999999", 1),
        (["2"], "\0\0", 3),
        (["9223372036854775806"], "4", 2**63 - 1),
    ],
)
def test_invalid_version_numbers_are_ignored(tmp_path, folders, remembered, version):
    for name in folders:
        (tmp_path / name).mkdir()
    (tmp_path / ".last_version").write_text(remembered)
    with next_version(tmp_path) as (number, partial):
        partial.mkdir()
    assert number == version
    assert (tmp_path / str(version)).is_dir()
    assert (tmp_path / ".last_version").read_text() == f"{version}\n"


def test_largest_version_number_is_an_error(tmp_path):
    (tmp_path / "9223372036854775807").mkdir()
    with pytest.raises(ExportError, match="the largest possible, so no newer one can"), next_version(tmp_path):
        pass


def test_export_with_different_outputs_is_not_published(tmp_path):
    """The outputs change with each call, so no export can be verified."""

    def logits(images):
        return tf.random.uniform((tf.shape(images)[0], 3)) + tf.reduce_mean(tf.cast(images, tf.float32))

    with pytest.raises(ExportError, match=r"the exported graph, at batch size 1, differs from the trained model"):
        publish(tmp_path, graph=InferenceGraph(logits, tf.identity), expected=lambda images: logits(images).numpy())
    assert not (tmp_path / "pets").exists()


def test_a_saved_model_with_other_outputs_than_the_graph_is_not_published(tmp_path, monkeypatch):
    def write_other(graph, *arguments, **options):
        write_saved_model(
            InferenceGraph(graph.features, lambda features: 1.1 * graph.head(features)), *arguments, **options
        )

    monkeypatch.setattr("training.exporter.publish.write_saved_model", write_other)
    with pytest.raises(ExportError, match=r"serving_default.*at batch size 1 differs from the trained model"):
        publish(tmp_path)
    assert [path.name for path in (tmp_path / "pets").iterdir()] == [".last_version"]


def test_heat_maps_that_differ_from_the_graph_s_are_not_published(tmp_path, monkeypatch):
    def write_other(graph, *arguments, **options):
        """The same logits, and features from right to left."""

        def flip(tensor):
            return tf.reverse(tensor, [2])

        flipped = InferenceGraph(lambda images: flip(graph.features(images)), lambda maps: graph.head(flip(maps)))
        write_saved_model(flipped, *arguments, **options)

    monkeypatch.setattr("training.exporter.publish.write_saved_model", write_other)
    with pytest.raises(ExportError, match=r"signature explain.* differs from the exported graph: its heat maps by"):
        publish(tmp_path, explain=True)
    assert [path.name for path in (tmp_path / "pets").iterdir()] == [".last_version"]


def test_a_saved_model_with_other_default_outputs_is_not_published(tmp_path, monkeypatch):
    def write_all(*arguments, **options):
        write_saved_model(*arguments, **{**options, "default_outputs": "all"})

    monkeypatch.setattr("training.exporter.publish.write_saved_model", write_all)
    with pytest.raises(
        ExportError, match=r"serving_default.* returns class_id, label, probabilities, not probabilities$"
    ):
        publish(tmp_path, default_outputs="probabilities")
    assert [path.name for path in (tmp_path / "pets").iterdir()] == [".last_version"]


def channel_logits(images, more=0.0):
    """Large logits that are close to each other: of images of noise, three times the means of the colours."""
    return 3 * tf.reduce_mean(tf.cast(images, tf.float32), axis=(1, 2)) + [0, more, 0]


@pytest.mark.parametrize(("difference", "is_rounding"), [(0.02, True), (0.2, False)])
def test_rounding_differences_of_large_logits_are_accepted(tmp_path, difference, is_rounding):
    images = np.random.default_rng(0).integers(0, 256, (64, 24, 32, 3), dtype=np.uint8)
    exact, rounded = (tf.nn.softmax(channel_logits(images, more)).numpy() for more in (0, difference))
    assert np.abs(exact - rounded).max() > 1e-3  # of the probabilities; the logits are about 400
    expected = {
        "expected": lambda images: channel_logits(images).numpy(),
        "graph": InferenceGraph(lambda images: channel_logits(images, difference), tf.identity),
    }
    if is_rounding:
        publish(tmp_path, **expected)
    else:
        with pytest.raises(ExportError, match="differs from the trained model"):
            publish(tmp_path, **expected)


@pytest.mark.parametrize("name", ["", ".hidden", "a/b", "..", "a b", "a:predict"])
def test_invalid_model_names_are_rejected(tmp_path, name):
    with pytest.raises(ExportError, match="is not a valid model name"):
        publish(tmp_path, name=name)
    assert not list(tmp_path.iterdir())


_EXPORT_FOREVER = """
import sys
from pathlib import Path
from tests.training.exporter.test_saved_model import publish
from training.models import build_model

model = build_model("sequential", (24, 32, 3), classes=3, conv_activation="relu")
publish(Path(sys.argv[1]), model=model)
print("ready", flush=True)
while True:
    publish(Path(sys.argv[1]), model=model)
"""


def test_killed_export_leaves_no_incomplete_version(tmp_path):
    files = {"saved_model.pb", "variables", "fingerprint.pb", "assets", "assets.extra"}
    rng = np.random.default_rng()
    loaded = set()  # those of an earlier round, which no later one changes
    for _ in range(3):
        with subprocess.Popen(
            [sys.executable, "-c", _EXPORT_FOREVER, str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        ) as process:
            assert process.stdout
            assert process.stdout.readline()
            time.sleep(rng.uniform(0.5, 4))
            process.send_signal(signal.SIGKILL)
        for version in (tmp_path / "pets").iterdir():
            if version.name.isdigit():
                assert {path.name for path in version.iterdir()} == files
                if version not in loaded:
                    signatures = tf.saved_model.load(str(version)).signatures
                    assert set(signatures) == {"serving_default", "image_bytes", "probabilities", "labels"}
                    loaded.add(version)
    publish(tmp_path)
    assert not list((tmp_path / "pets").glob(".*.partial"))
