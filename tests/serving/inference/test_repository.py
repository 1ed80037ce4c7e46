from __future__ import annotations

import json
import logging
import shutil
import threading
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serving.errors import ModelNotFound, NotReady, StartupError
from serving.inference.local import LocalRepository
from serving.inference.model_config import ModelsFolder, find_versions
from serving.inference.saved_model import SavedModelPredictor
from serving.inference.signatures import Predictor
from serving.inference.version_loader import InProcessLoader


def load(models_dir: Path) -> LocalRepository:
    repository = LocalRepository(ModelsFolder(models_dir))
    repository.load()
    return repository


def break_version(models_dir: Path, name: str, version: int) -> None:
    (models_dir / name / str(version) / "saved_model.pb").write_bytes(b"\xff garbage")


def test_only_folders_with_integer_names_are_versions(models_dir: Path) -> None:
    for name in ("007", ".11.partial", ".12", "13.tmp", "-1", "1e3", "²", str(2**63)):
        (models_dir / "colours" / name).mkdir()
    (models_dir / "colours" / "99").write_text("a file")
    (models_dir / "notes").mkdir()
    (models_dir / ".hidden" / "1").mkdir(parents=True)
    assert sorted(find_versions(models_dir / "colours")) == [2, 7, 10]
    assert [config.name for config in ModelsFolder(models_dir)()] == ["colours"]


def test_folders_with_the_same_number_are_logged_once_and_the_last_is_served(
    models_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("0010", "010"):  # empty, so they cannot be loaded
        (models_dir / "colours" / name).mkdir()
    repository = load(models_dir)
    for _ in range(3):
        repository.poll()
    assert repository.resolve("colours").version == 10
    assert find_versions(models_dir / "colours")[10].name == "10"
    assert caplog.text.count("are the same version") == 1
    assert "0010 and " in caplog.text


def test_the_newest_version_is_served(models_dir: Path) -> None:
    repository = load(models_dir)
    assert repository.ready
    assert repository.names() == ["colours"]
    served = repository.resolve("colours")
    assert served.version == 10
    assert repository.resolve("colours", version=10) is served
    assert served.info.class_names == ("red", "green", "blue")
    outputs = served.predictor.predict("serving_default", {"images": np.zeros((1, 32, 32, 3), np.uint8)})
    assert outputs["class_id"].shape == (1,)
    (status,) = repository.versions("colours")
    assert (status.version, status.state, status.error_code, status.warmup_records) == (10, "AVAILABLE", "OK", 2)


def test_an_error_also_has_the_message_of_tensorflow_serving(models_dir: Path) -> None:
    repository = load(models_dir)
    with pytest.raises(ModelNotFound) as unknown:
        repository.resolve("m")
    assert str(unknown.value.tensorflow_serving) == "Servable not found for request: Latest(m)"
    with pytest.raises(ModelNotFound) as missing:
        repository.resolve("colours", version=2)
    assert str(missing.value.tensorflow_serving) == "Servable not found for request: Specific(colours, 2)"
    with pytest.raises(ModelNotFound, match=r"^Could not find any versions of model m$"):
        repository.versions("m")


def test_a_broken_newest_version_leaves_the_previous_one_available(
    models_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    break_version(models_dir, "colours", 10)
    repository = load(models_dir)
    assert repository.resolve("colours").version == 2
    assert repository.ready
    broken, served = repository.versions("colours")
    assert (broken.version, broken.state, broken.error_code) == (10, "END", "DATA_LOSS")
    assert "saved_model.pb as binary proto" in broken.error_message
    assert (served.version, served.state) == (2, "AVAILABLE")
    assert "colours version 10 is not served" in caplog.text


def test_a_broken_model_leaves_the_others_available(models_dir: Path, adder: Path) -> None:
    shutil.copytree(adder, models_dir / "adder" / "1")
    for version in (2, 10):
        break_version(models_dir, "colours", version)
    repository = load(models_dir)
    assert repository.names() == ["adder"]
    assert repository.all_names() == ["adder", "colours"]
    assert repository.ready
    assert "Can't parse" in repository.problem("colours")
    with pytest.raises(ModelNotFound):
        repository.resolve("colours")
    assert repository.resolve("adder").version == 1


def test_without_an_available_model_the_repository_is_not_ready(models_dir: Path, colours: Path) -> None:
    for version in (2, 10):
        break_version(models_dir, "colours", version)
    repository = load(models_dir)
    assert not repository.ready
    assert "colours: Can't parse" in str(repository.not_ready_because)
    shutil.copy(colours / "saved_model.pb", models_dir / "colours" / "10")
    repository.poll()
    assert repository.ready


def test_a_required_model_must_be_available(models_dir: Path, adder: Path) -> None:
    repository = LocalRepository(ModelsFolder(models_dir), required=["colours", "adder"])
    assert repository.not_ready_because == "loading adder, colours"
    repository.load()
    assert repository.not_ready_because == "adder: no version to serve"
    shutil.copytree(adder, models_dir / "adder" / "1")
    repository.poll()
    assert repository.ready
    shutil.rmtree(models_dir / "colours")
    repository.poll()
    assert "colours: " in str(repository.not_ready_because)


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("nowhere", "there is no models folder"),
        ("file", "is not a folder"),
        ("file/models", "there is no models folder"),
        ("models/colours", "name its parent folder"),
    ],
)
def test_an_invalid_models_folder_is_refused_at_startup(models_dir: Path, folder: str, message: str) -> None:
    (models_dir.parent / "file").touch()
    with pytest.raises(StartupError, match=message):
        ModelsFolder(models_dir.parent / folder)


def test_an_empty_models_folder_is_polled(tmp_path: Path, colours: Path) -> None:
    (tmp_path / "name" / "no-version").mkdir(parents=True)
    repository = load(tmp_path)
    assert (repository.all_names(), repository.ready) == ([], False)
    assert repository.not_ready_because == "no model is available"
    shutil.copytree(colours, tmp_path / "name" / "1")
    repository.poll()
    assert (repository.all_names(), repository.ready) == (["name"], True)


def test_a_version_is_not_available_before_its_warm_up(models_dir: Path) -> None:
    entered, leave = threading.Event(), threading.Event()

    class Hesitant(SavedModelPredictor):
        def predict(self, *args: Any, **options: Any) -> dict[str, np.ndarray]:
            entered.set()
            assert leave.wait(60)
            return super().predict(*args, **options)

    repository = LocalRepository(ModelsFolder(models_dir), loader=InProcessLoader(Hesitant))
    assert not repository.ready
    loading = threading.Thread(target=repository.load)
    loading.start()
    assert entered.wait(60)
    assert (repository.ready, repository.not_ready_because) == (False, "loading colours")
    assert repository.versions("colours")[0].state == "LOADING"
    assert repository.names() == []
    with pytest.raises(NotReady, match="still being loaded"):
        repository.resolve("colours")
    with pytest.raises(ModelNotFound):
        repository.resolve("another")
    leave.set()
    loading.join()
    assert repository.ready
    assert repository.resolve("colours").version == 10


def test_requests_go_through_the_wrapper_and_warm_up_does_not(models_dir: Path) -> None:
    calls: list[str] = []

    class Counted(SavedModelPredictor):
        def predict(self, *args: Any, **options: Any) -> dict[str, np.ndarray]:
            calls.append("wrapped" if wrapped else "bare")
            return super().predict(*args, **options)

    wrapped: list[str] = []

    def wrap(name: str, predictor: Predictor, _: Collection[str]) -> Predictor:
        wrapped.append(name)
        return predictor

    repository = LocalRepository(ModelsFolder(models_dir), loader=InProcessLoader(Counted), wrap_predictor=wrap)
    repository.load()
    assert (wrapped, calls) == (["colours"], ["bare", "bare"])


def test_the_number_of_warm_up_records_is_logged(models_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    load(models_dir)
    assert "2 warm-up records replayed" in caplog.text
    (models_dir / "colours" / "10" / "assets.extra" / "tf_serving_warmup_requests").unlink()
    load(models_dir)
    assert "without warm-up records" in caplog.text


@pytest.mark.parametrize("text", [None, b"{", b"\xff", b"[1]", b""])
def test_an_invalid_model_info_does_not_prevent_serving(models_dir: Path, text: bytes | None) -> None:
    file = models_dir / "colours" / "10" / "assets.extra" / "model.json"
    file.unlink()
    if text is not None:
        file.write_bytes(text)
    assert load(models_dir).resolve("colours").info.class_names == ()
    file.write_text(json.dumps({"class_names": ["x"]}))
    assert load(models_dir).resolve("colours").info.class_names == ("x",)
