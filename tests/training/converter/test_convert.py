"""Converted models, run as their users run them, against the exported models they come from."""

import errno
import importlib.util
import json
import os
import shutil
import zipfile
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from tests.training.test_commands import call
from training.config import TrainingConfig
from training.converter import pixel_signature
from training.converter.convert import FORMATS, convert_model
from training.errors import ExportError, StorageFullError
from training.exporter.saved_model import write_extra_assets, write_saved_model
from training.exporter.versions import find_version
from training.models import build_model
from training.models.inference_graph import InferenceGraph

CLASSES = ("cat", "dog", "größe")  # labels are text, not ASCII
SHAPE = (24, 32, 3)


def find_missing(to):
    return [name for name in FORMATS[to].packages if importlib.util.find_spec(name) is None]


@pytest.fixture(params=FORMATS)
def to(request):
    if missing := find_missing(request.param):
        pytest.skip(f"needs {', '.join(missing)}, of the extra [convert]")
    return request.param


def mean_logits(images):
    return tf.reduce_mean(tf.cast(images, tf.float32), axis=(1, 2)) / 255


HEADS = {
    "igamma": lambda features: tf.math.igamma(2.0, features),  # has no equivalent
    "silu": lambda features: tf.nn.silu(features),  # defines its own gradient
}


def build_graph(name):
    if head := HEADS.get(name):
        return InferenceGraph(mean_logits, head)
    variant, _, flips = name.partition("-")
    model = build_model(variant, SHAPE, classes=len(CLASSES))
    config = TrainingConfig.fill_in(variant=variant)
    # Without training, airbench's logits are of the order of 100: probabilities would be 0 and 1, or amplify rounding.
    graph = config.recipe.fold(model, config, temperature=100.0 if variant == "airbench" else 1.0)
    return graph.average_flips() if flips else graph


@dataclass
class Models:
    """Exported networks with random weights, made when they are first asked for."""

    folder: Path

    def version(self, name):
        path = self.folder / name / "1"
        if not path.exists():
            write_saved_model(build_graph(name), path, class_names=CLASSES, input_shape=SHAPE)
            metadata = {"name": name, "class_names": CLASSES}
            write_extra_assets(path, name=name, input_shape=SHAPE, metadata=metadata, signatures=["serving_default"])
        return path


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return Models(tmp_path_factory.mktemp("models"))


def run_onnx(path):
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path))
    (images,) = session.get_inputs()
    assert (images.name, images.type, images.shape) == ("images", "tensor(uint8)", ["n", *SHAPE])
    shapes = {output.name: (output.type, output.shape) for output in session.get_outputs()}
    assert shapes == {"probabilities": ("tensor(float)", ["n", len(CLASSES)]), "class_id": ("tensor(int64)", ["n"])}
    info = json.loads(session.get_modelmeta().custom_metadata_map["model.json"])
    return info, lambda batch: dict(zip(shapes, session.run(list(shapes), {"images": batch}), strict=True))


def run_litert(path):
    from ai_edge_litert.interpreter import Interpreter

    runner = Interpreter(str(path)).get_signature_runner("serving_default")
    details = runner.get_input_details()["images"]
    assert (details["dtype"], details["shape_signature"].tolist()) == (np.uint8, [-1, *SHAPE])
    assert set(runner.get_output_details()) == {"probabilities", "class_id"}
    info = json.loads(zipfile.ZipFile(path).read("model.json"))
    return info, lambda batch: runner(images=batch)


RUN = {"onnx": run_onnx, "litert": run_litert}


@pytest.mark.parametrize("name", ["sequential", "subclass", "airbench", "airbench-flips", "silu"])
def test_a_converted_model_has_the_outputs_of_the_exported_one(name, to, models, tmp_path):
    version = models.version(name)
    path = convert_model(version, to=to, output=tmp_path / "new folder" / "model")
    assert [each.name for each in path.parent.iterdir()] == ["model"]
    info, run = RUN[to](path)
    assert info == json.loads((version / "assets.extra" / "model.json").read_text())
    assert tuple(info["class_names"]) == CLASSES
    exported = tf.saved_model.load(str(version)).signatures["serving_default"]
    for count in (1, 5, 2):
        images = np.random.default_rng(count).integers(0, 256, (count, *SHAPE), dtype=np.uint8)
        outputs, expected = run(images), exported(images=tf.constant(images))
        assert np.min(expected["probabilities"]) > 0.01  # saturated ones would hide a difference of the logits
        np.testing.assert_allclose(outputs["probabilities"], expected["probabilities"], atol=1e-6)
        assert outputs["class_id"].tolist() == expected["class_id"].numpy().tolist()
        assert outputs["class_id"].dtype == np.int64


def test_the_command_converts_the_newest_version_and_prints_only_the_file(to, models, tmp_path, capfd):
    shutil.copytree(models.version("sequential"), tmp_path / "pets" / "10")
    (tmp_path / "pets" / "9").mkdir()
    assert call("convert", tmp_path / "pets", "--to", to) == 0
    path = tmp_path / "pets" / f"pets-10{FORMATS[to].suffix}"
    assert capfd.readouterr() == (f"converted      {path}\n", "")
    assert RUN[to](path)[0]["name"] == "sequential"


def test_versions_are_found_by_number(tmp_path):
    for number in ("9", "10", "latest"):
        (tmp_path / number).mkdir()
        (tmp_path / number / "saved_model.pb").touch()
    assert find_version(tmp_path) == tmp_path / "10"
    assert find_version(tmp_path / "9") == tmp_path / "9"
    with pytest.raises(ExportError, match="it does not exist"):
        find_version(tmp_path / "11")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ExportError, match="neither it nor a version in it has a saved_model"):
        find_version(tmp_path / "empty")


def test_an_operation_without_equivalent_is_named_before_anything_is_written(to, models, tmp_path, capfd):
    version = shutil.copytree(models.version("igamma"), tmp_path / "igamma" / "1")
    before = sorted(tmp_path.rglob("*"))
    assert call("convert", version, "--to", to) == 1
    error = capfd.readouterr().err
    assert error.startswith(f"error: {version} cannot be converted to {FORMATS[to].title}: ")
    assert error.endswith("has no equivalent of Igamma. Serve it as it is, or change the network\n")
    assert error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_converted_model_with_other_outputs_is_not_written(to, models, tmp_path, monkeypatch):
    def change(graph):
        real(graph)
        bias = next(node for node in graph.node if node.op == "Const" and "BiasAdd" in node.name)
        changed = tf.make_ndarray(bias.attr["value"].tensor) + 0.01
        bias.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(changed.astype(np.float32)))

    real = pixel_signature.use_common_operations
    monkeypatch.setattr(pixel_signature, "use_common_operations", change)
    path = tmp_path / "model"
    path.write_bytes(b"an earlier conversion")
    where = f"the converted {FORMATS[to].title} model, at batch size 1, differs from the trained model"
    with pytest.raises(ExportError, match=where):
        convert_model(models.version("sequential"), to=to, output=path)
    assert {each.name: each.read_bytes() for each in tmp_path.iterdir()} == {"model": b"an earlier conversion"}


def test_a_full_disk_leaves_the_earlier_file(to, models, tmp_path, monkeypatch):
    path = tmp_path / "model"
    path.write_bytes(b"an earlier conversion")

    def fail(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StorageFullError, match=f"disk full: cannot write {path}"):
        convert_model(models.version("sequential"), to=to, output=path)
    assert {each.name: each.read_bytes() for each in tmp_path.iterdir()} == {"model": b"an earlier conversion"}


def save_foreign(folder, function, spec):
    """Write a SavedModel that this project has not exported, with the model.json of one that it has."""
    signature = tf.function(function).get_concrete_function(spec)
    tf.saved_model.save(tf.Module(), str(folder), {"serving_default": signature})
    (folder / "assets.extra").mkdir()
    (folder / "assets.extra" / "model.json").write_text(json.dumps({"class_names": ["a", "b", "c"]}))
    return folder


IMAGES = tf.TensorSpec((None, *SHAPE), tf.uint8, "images")


def test_a_signature_of_probabilities_only_is_converted(to, tmp_path):
    version = save_foreign(tmp_path / "1", lambda images: {"probabilities": tf.nn.softmax(mean_logits(images))}, IMAGES)
    path = convert_model(version, to=to)
    outputs = import_module(FORMATS[to].module).load(path.read_bytes())(np.full((2, *SHAPE), 255, np.uint8))
    assert set(outputs) == {"probabilities"}
    np.testing.assert_allclose(outputs["probabilities"], np.full((2, 3), 1 / 3), atol=1e-6)


@pytest.mark.parametrize(
    ("function", "spec", "message"),
    [
        (
            lambda image_bytes: {"probabilities": tf.zeros((tf.size(image_bytes), 3))},
            tf.TensorSpec((None,), tf.string, "image_bytes"),
            "found serving_default from image_bytes string (None,) to probabilities",
        ),
        (
            lambda images: {"scores": mean_logits(images)},
            IMAGES,
            "found serving_default from images uint8 (None, 24, 32, 3) to scores",
        ),
        (
            lambda images: {"probabilities": tf.nn.sigmoid(mean_logits(images))},
            IMAGES,
            "its probabilities are computed by Sigmoid, not by Softmax",
        ),
    ],
)
def test_other_signatures_are_rejected(function, spec, message, tmp_path):
    version = save_foreign(tmp_path / "model" / "1", function, spec)
    with pytest.raises(ExportError) as error:
        pixel_signature.read_pixel_signature(version)
    assert message in str(error.value)


def test_a_model_without_class_names_is_rejected(models, tmp_path, capfd):
    version = shutil.copytree(models.version("sequential"), tmp_path / "1")
    (version / "assets.extra" / "model.json").unlink()
    assert call("convert", version, "--to", "onnx") == 1
    error = capfd.readouterr().err
    assert f"{version} cannot be converted: its class names cannot be read from " in error
    assert "Convert a version that this program has exported" in error


@pytest.mark.parametrize("to", FORMATS)
def test_missing_packages_are_named_with_the_command_that_installs_them(to, models, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ExportError) as error:
        convert_model(models.version("sequential"), to=to)
    assert f"not installed: {', '.join(FORMATS[to].packages)}" in str(error.value)
    assert str(error.value).endswith("-m pip install '.[convert]'")
