"""Versions that are copied into place file by file, slower than the poll interval."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

import httpx
import numpy as np
import pytest
import tensorflow as tf

from serving.app import make_app
from serving.inference.batcher import Batcher
from serving.inference.local import LocalRepository
from serving.inference.model_config import ModelsFolder
from serving.inference.repository import ModelRepository
from serving.inference.saved_model import SavedModelPredictor
from serving.inference.version_loader import InProcessLoader
from serving.settings import Settings
from tests.serving.conftest import Server
from tests.serving.saved_models import write_warmup_records

INFO = {"class_names": ["red", "green", "blue"]}


@pytest.fixture
def version(models_dir: Path) -> Path:
    """The empty folder of version 11."""
    path = models_dir / "colours" / "11"
    path.mkdir()
    return path


def test_a_version_becomes_available_once_its_copy_is_complete(models_dir: Path, version: Path, colours: Path) -> None:
    repository = LocalRepository(ModelsFolder(models_dir))
    repository.load()

    def poll() -> tuple[int, str, int]:
        repository.poll()
        status = repository.versions("colours")[0]
        assert status.version == 11
        return repository.resolve("colours").version, status.state, status.warmup_records

    assert poll() == (10, "END", 0)
    pb = (colours / "saved_model.pb").read_bytes()
    for part in (0, 1, len(pb) // 2, len(pb) - 1):
        (version / "saved_model.pb").write_bytes(pb[:part])
        assert poll() == (10, "END", 0)
    shutil.copy(colours / "saved_model.pb", version)
    assert poll() == (10, "END", 0)
    (version / "variables").mkdir()
    assert poll() == (10, "END", 0)
    shutil.copy(colours / "variables" / "variables.index", version / "variables")
    assert poll() == (10, "END", 0)
    data = (colours / "variables" / "variables.data-00000-of-00001").read_bytes()
    (version / "variables" / "variables.data-00000-of-00001").write_bytes(data[: len(data) // 2])
    assert poll() == (10, "END", 0)
    (version / "variables" / "variables.data-00000-of-00001").write_bytes(data)
    assert poll() == (11, "AVAILABLE", 0)
    assert repository.resolve("colours").info.class_names == ()

    held = repository.resolve("colours").predictor
    (version / "assets.extra").mkdir()
    assert poll() == (11, "AVAILABLE", 0)
    info = version / "assets.extra" / "model.json"
    info.write_text('{"class_names": ["red",')
    assert poll() == (11, "AVAILABLE", 0)
    assert "not valid JSON" in repository.versions("colours")[0].error_message
    info.write_text(json.dumps(INFO))
    assert poll() == (11, "AVAILABLE", 0)
    assert repository.resolve("colours").info.class_names == ("red", "green", "blue")
    assert repository.versions("colours")[0].error_message == ""
    warmup = "assets.extra/tf_serving_warmup_requests"
    (version / warmup).write_bytes((colours / warmup).read_bytes()[:-5])
    assert poll() == (11, "AVAILABLE", 0)
    assert "damaged" in repository.versions("colours")[0].error_message
    assert repository.versions("colours")[0].warnings == ("warmup",)
    info.write_text(json.dumps({"class_names": ["a", "b", "c"]}))
    assert poll() == (11, "AVAILABLE", 0)
    assert repository.versions("colours")[0].warnings == ("warmup",)  # another file does not clear the warning
    shutil.copy(colours / warmup, version / warmup)
    assert poll() == (11, "AVAILABLE", 2)
    assert repository.versions("colours")[0].error_message == ""
    assert repository.resolve("colours").info.class_names == ("a", "b", "c")
    assert repository.resolve("colours").predictor is held


def test_warmup_records_are_replayed_once_when_they_arrive(models_dir: Path, colours: Path) -> None:
    calls: list[int] = []

    class Counted(SavedModelPredictor):
        def predict(
            self, signature: str, inputs: Mapping[str, np.ndarray], *, deadline_s: float | None = None
        ) -> dict[str, np.ndarray]:
            calls.append(len(inputs["images"]))
            return super().predict(signature, inputs, deadline_s=deadline_s)

    extra = models_dir / "colours" / "10" / "assets.extra"
    shutil.rmtree(extra)
    repository = LocalRepository(ModelsFolder(models_dir), loader=InProcessLoader(Counted))
    repository.load()
    assert calls == []
    shutil.copytree(colours / "assets.extra", extra)
    for _ in range(3):
        repository.poll()
    assert calls == [1, 3]
    assert repository.versions("colours")[0].warmup_records == 2


def batched(repository: ModelRepository) -> set[str]:
    return cast(Batcher, repository.resolve("coupled").predictor)._batched


def test_late_warmup_records_disable_batching_of_dependent_rows(tmp_path: Path) -> None:
    """The model refuses synthetic rows, so only the warm-up records reveal the dependency."""

    @tf.function(input_signature=[tf.TensorSpec((None,), tf.string, "images")])
    def parse(images: tf.Tensor) -> dict[str, tf.Tensor]:
        values = tf.io.parse_example(images, {"v": tf.io.FixedLenFeature([1], tf.float32)})["v"]
        return {"y": values - tf.reduce_mean(values)}

    version = tmp_path / "coupled" / "1"
    tf.saved_model.save(tf.Module(), str(version), signatures=parse)
    app = make_app(Settings(models_dir=tmp_path))
    repository = app.inference.repository
    repository.load()
    assert repository.versions("coupled")[0].warnings == ()
    assert "serving_default" in batched(repository)
    values = [tf.train.Feature(float_list={"value": [float(i)]}) for i in range(3)]
    examples = [tf.train.Example(features=tf.train.Features(feature={"v": value})) for value in values]
    write_warmup_records(version, [tf.constant([example.SerializeToString() for example in examples])])
    repository.poll()
    assert repository.versions("coupled")[0].warnings == ("dependent_rows",)
    assert batched(repository) == set()
    assert repository.versions("coupled")[0].state == "AVAILABLE"


def save_labelled(path: Path, labels: list[str]) -> None:
    class Labelled(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec((None, 4, 4, 3), tf.uint8, "images")])
        def classify(self, images: tf.Tensor) -> dict[str, tf.Tensor]:
            rows = tf.shape(images)[0]
            return {
                "probabilities": tf.ensure_shape(tf.tile([[0.75, 0.25]], [rows, 1]), (None, 2)),
                "class_id": tf.zeros([rows], tf.int64),
                "label": tf.fill([rows], "ham"),
            }

        @tf.function(input_signature=[tf.TensorSpec((None,), tf.int64, "class_id")])
        def labels(self, class_id: tf.Tensor) -> dict[str, tf.Tensor]:
            return {"label": tf.gather(tf.constant(labels), class_id)}

    model = Labelled()
    tf.saved_model.save(model, str(path), signatures={"serving_default": model.classify, "labels": model.labels})


def test_class_names_fall_back_to_the_labels_signature(tmp_path: Path) -> None:
    version = tmp_path / "food" / "1"
    save_labelled(version, ["ham", "eggs"])
    app = make_app(Settings(models_dir=tmp_path))
    repository = app.inference.repository
    repository.load()

    def class_names() -> list[str]:
        (model,) = app.test_client().get("/models.json").json or []
        return list(model["class_names"])

    assert class_names() == ["ham", "eggs"]
    (version / "assets.extra").mkdir()
    info = version / "assets.extra" / "model.json"
    for text, names in (
        ('{"class_names": ["Schinken", "Eier"]}', ["Schinken", "Eier"]),
        ('{"dataset": {"name": "food"}}', ["ham", "eggs"]),
        ('{"class_names": [{}]}', ["ham", "eggs"]),
        ("[" * 100_000, ["ham", "eggs"]),
    ):
        info.write_text(text)
        repository.poll()
        assert class_names() == names


@pytest.mark.parametrize("labels", [["ham"], ["ham", "ham"], ["\x00", ""]])
def test_an_invalid_labels_signature_is_ignored(tmp_path: Path, labels: list[str]) -> None:
    save_labelled(tmp_path / "food" / "1", labels)
    app = make_app(Settings(models_dir=tmp_path))
    app.inference.repository.load()
    assert app.inference.repository.ready
    (model,) = app.test_client().get("/models.json").json or []
    assert len(model["class_names"]) == 2
    assert app.test_client().get("/").status_code == 200


def test_model_info_that_arrives_late_is_shown(
    models_dir: Path, version: Path, colours: Path, start_server: Callable[..., Server]
) -> None:
    server = start_server(models_dir, "--poll-interval-s", "0.05")
    server.wait_for("/readyz")
    for name in ("saved_model.pb", "variables", "assets.extra"):
        server.wait_until(lambda: "version 11" in server.log)
        if (colours / name).is_dir():
            shutil.copytree(colours / name, version / name)
        else:
            shutil.copy(colours / name, version)

    def described() -> tuple[int, list[str]]:
        (model,) = httpx.get(server.url + "/models.json").json()
        return model["version"], model["class_names"]

    server.wait_until(lambda: described() == (11, INFO["class_names"]))
    server.wait_until(lambda: httpx.get(server.url + "/readyz").json()["models"][0]["warmup_records"] == 2)
    assert server.stop() == 0
