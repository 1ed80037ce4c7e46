"""Models named with their folders: numbered versions, or one SavedModel whose files are replaced while it serves."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import serving
from serving.__main__ import main
from serving.errors import ModelFailed, StartupError
from serving.inference.local import LocalRepository
from serving.inference.model_config import ModelConfig
from serving.inference.model_folders import read_model_folders
from serving.settings import Settings

PIXELS = {"images": np.zeros((1, 32, 32, 3), np.uint8)}
NUMBERS = {"a": np.ones((1, 2), np.float32), "b": np.ones((1, 2), np.float32)}


def load(folder: Path, name: str = "m") -> LocalRepository:
    configs = read_model_folders([(name, folder)])
    repository = LocalRepository(lambda: configs)
    repository.load()
    return repository


def classifies(repository: LocalRepository) -> bool:
    return "class_id" in repository.resolve("m").predictor.predict("serving_default", PIXELS)


def adds(repository: LocalRepository) -> bool:
    return "sum" in repository.resolve("m").predictor.predict("serving_default", NUMBERS)


def versions(repository: LocalRepository) -> list[tuple[int, str]]:
    return [(status.version, status.state) for status in repository.versions("m")]


@pytest.mark.parametrize(("folder", "number"), [("models", 1), ("7", 7), ("007", 7), ("0", 0), ("7x", 1)])
def test_a_saved_model_is_version_1_or_the_number_of_its_folder(
    tmp_path: Path, adder: Path, folder: str, number: int
) -> None:
    shutil.copytree(adder, tmp_path / folder)
    repository = load(tmp_path / folder)
    assert versions(repository) == [(number, "AVAILABLE")]
    assert adds(repository)


def test_the_working_directory_has_a_name_too(tmp_path: Path, adder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shutil.copytree(adder, tmp_path / "12"))
    assert versions(load(Path())) == [(12, "AVAILABLE")]


def test_a_saved_model_in_text_format_is_one_too(tmp_path: Path, adder: Path) -> None:
    from google.protobuf import text_format
    from tensorflow.core.protobuf import saved_model_pb2

    shutil.copytree(adder, tmp_path / "m")
    message = saved_model_pb2.SavedModel.FromString((adder / "saved_model.pb").read_bytes())
    (tmp_path / "m" / "saved_model.pbtxt").write_text(text_format.MessageToString(message))
    (tmp_path / "m" / "saved_model.pb").unlink()
    assert adds(load(tmp_path / "m"))


def test_numbered_versions_are_polled_as_usual(models_dir: Path, adder: Path) -> None:
    repository = load(models_dir / "colours")
    assert versions(repository) == [(10, "AVAILABLE")]
    shutil.copytree(adder, models_dir / "colours" / "11")
    repository.poll()
    assert repository.resolve("m").version == 11
    shutil.rmtree(models_dir / "colours" / "11")
    repository.poll()
    assert repository.resolve("m").version == 10


def test_a_link_that_is_replaced_loads_the_other_model(tmp_path: Path, adder: Path, colours: Path) -> None:
    """As KServe mounts a model image, and as a release is switched with `ln -sfn`."""
    link = tmp_path / "models"
    link.symlink_to(adder)
    repository = load(link)
    held = repository.resolve("m")
    (tmp_path / "next").symlink_to(colours)
    (tmp_path / "next").rename(link)
    repository.poll()
    assert classifies(repository)
    assert held.predictor.predict("serving_default", NUMBERS)["sum"].tolist() == [[2, 2]]  # a request in progress
    assert versions(repository) == [(1, "AVAILABLE")]


def test_a_link_may_get_its_target_later(tmp_path: Path, adder: Path) -> None:
    (tmp_path / "models").symlink_to(tmp_path / "image")
    repository = load(tmp_path / "models")
    assert "the folder of model m does not exist" in str(repository.not_ready_because)
    shutil.copytree(adder, tmp_path / "image")
    repository.poll()
    assert repository.ready


def test_files_are_replaced_without_a_failed_request(
    tmp_path: Path, adder: Path, colours: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(adder, tmp_path / "models")
    repository = load(folder)
    loaded = repository.resolve("m")
    repository.poll()
    assert repository.resolve("m") is loaded

    for child in folder.iterdir():
        shutil.rmtree(child) if child.is_dir() else child.unlink()
    for _ in range(2):
        repository.poll()
        assert adds(repository)
    (status,) = repository.versions("m")
    assert (status.state, status.error_code, status.warnings) == ("AVAILABLE", "OK", ("files",))
    expected = "cannot be loaded, so it stays as it was: no saved_model.pb or saved_model.pbtxt in m/1"
    assert expected in status.error_message
    assert repository.ready
    assert caplog.text.count("stays as it was") == 1  # not at every poll

    shutil.copytree(colours, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("variables"))
    repository.poll()
    assert adds(repository)
    shutil.copytree(colours / "variables", folder / "variables")
    repository.poll()
    assert classifies(repository)
    (status,) = repository.versions("m")
    assert (status.state, status.error_message, status.warnings) == ("AVAILABLE", "", ())
    assert status.warmup_records == 2


def test_a_link_that_is_set_back_loads_nothing_again(tmp_path: Path, adder: Path) -> None:
    link, broken = tmp_path / "models", tmp_path / "broken"
    broken.mkdir()
    (broken / "saved_model.pb").write_bytes(b"\xff garbage")
    link.symlink_to(adder)
    repository = load(link)
    loaded = repository.resolve("m").predictor
    for target, warnings in ((broken, ("files",)), (adder, ())):
        link.unlink()
        link.symlink_to(target)
        repository.poll()
        assert repository.versions("m")[0].warnings == warnings
        assert repository.resolve("m").predictor is loaded


def test_added_warm_up_records_load_nothing_again(tmp_path: Path, colours: Path) -> None:
    folder = shutil.copytree(colours, tmp_path / "models")
    records = folder / "assets.extra" / "tf_serving_warmup_requests"
    records.rename(tmp_path / "records")
    repository = load(folder)
    loaded = repository.resolve("m").predictor
    (tmp_path / "records").rename(records)
    repository.poll()
    assert repository.versions("m")[0].warmup_records == 2
    assert repository.resolve("m").predictor is loaded


def test_a_saved_model_may_be_replaced_by_versions_and_back(tmp_path: Path, adder: Path, colours: Path) -> None:
    folder = shutil.copytree(adder, tmp_path / "models")
    repository = load(folder)
    shutil.rmtree(folder)
    shutil.copytree(colours, folder / "1")
    repository.poll()
    assert classifies(repository)
    shutil.rmtree(folder / "1")
    shutil.copytree(adder, folder, dirs_exist_ok=True)
    repository.poll()
    assert adds(repository)
    assert versions(repository) == [(1, "AVAILABLE")]


def test_a_reloaded_config_wants_versions_in_the_folder(tmp_path: Path, adder: Path) -> None:
    """gRPC's HandleReloadConfigRequest has base paths, which contain versions as in TensorFlow Serving."""
    repository = load(shutil.copytree(adder, tmp_path / "models"))
    with pytest.raises(ModelFailed, match="no version to serve"):
        repository.reload([ModelConfig("m", tmp_path / "models")])
    assert repository.names() == []


def test_a_folder_that_is_gone_leaves_its_model_loaded(tmp_path: Path, adder: Path) -> None:
    folder = shutil.copytree(adder, tmp_path / "models")
    repository = load(folder)
    folder.rename(tmp_path / "elsewhere")
    repository.poll()
    assert adds(repository)
    assert "the folder of model m does not exist" in repository.versions("m")[0].error_message


def test_an_empty_folder_waits_for_a_model(tmp_path: Path, adder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "models" / "lost+found").mkdir(parents=True)
    repository = load(tmp_path / "models")
    assert "neither saved_model.pb nor a numbered version yet; waiting for model m" in caplog.text
    assert repository.not_ready_because == "m: no version to serve"
    shutil.copytree(adder, tmp_path / "models", dirs_exist_ok=True)
    repository.poll()
    assert repository.ready


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("nowhere", "--model m: there is no folder {}"),
        ("models/colours/2/saved_model.pb", "{} is not a folder; name the folder that contains saved_model.pb"),
        ("models/colours/2/saved_model.pb/x", "there is no folder"),
        ("models", "{} contains models (colours), not the versions of one; name one of them, such as m={}/colours, or"),
        ("keras", "{} contains a Keras model (pets.keras), not a SavedModel; export it first"),
    ],
)
def test_a_folder_that_is_no_model_is_refused(models_dir: Path, path: str, problem: str) -> None:
    (models_dir.parent / "keras").mkdir()
    (models_dir.parent / "keras" / "pets.keras").touch()
    folder = models_dir.parent / path
    with pytest.raises(StartupError) as refused:
        read_model_folders([("m", folder)])
    assert problem.replace("{}", str(folder)) in str(refused.value)


@pytest.mark.parametrize(
    ("arguments", "code", "problem"),
    [
        (["--model", "pets"], 2, "expected NAME=PATH, such as pets=/mnt/models, got 'pets'"),
        (["--model", "=x"], 2, "expected NAME=PATH"),
        (["--model", "pets="], 2, "expected NAME=PATH"),
        (["--model", "a/b=x"], 1, "a model name without / and :, got 'a/b'"),
        (["--model", "a=x", "--model", "a=y"], 1, "a is given 2 times"),
        (["--model", "a=x", "--models-dir", "models"], 1, "--model and --models-dir both say"),
        (["--model", "a=x", "--remote", "h:1"], 1, "--model and --remote both say"),
        (["--model", "a=x", "--model-config-file", __file__], 1, "--model and --model-config-file both say"),
        (["--model", "a=nowhere=1"], 1, "there is no folder nowhere=1"),
    ],
)
def test_mistakes_in_the_option_are_told(arguments: list[str], code: int, problem: str) -> None:
    result = CliRunner().invoke(main, arguments, terminal_width=1_000)
    assert (result.exit_code, problem in " ".join(result.output.split())) == (code, True), result.output


def test_the_environment_names_models_too() -> None:
    """The container image sets SERVING_MODELS_DIR, which is only a default."""
    environment = {"SERVING_MODEL": "a=/nowhere/a b=/nowhere/b", "SERVING_MODELS_DIR": "/models"}
    result = CliRunner().invoke(main, [], env=environment)
    assert (result.exit_code, "there is no folder /nowhere/a" in result.output) == (1, True), result.output


def test_the_python_api_takes_names_and_folders(tmp_path: Path, adder: Path, colours: Path) -> None:
    client = serving.create_app({"sums": adder, "rgb": str(colours)}).test_client()
    client.get("/v2/health/ready")
    assert client.get("/v1/models/sums").status_code == 200
    assert client.get("/v1/models/rgb").status_code == 200
    settings = Settings(models=(("sums", tmp_path / "nowhere"),))
    with pytest.raises(StartupError, match="--model sums: there is no folder"):
        serving.create_app(settings)
    with pytest.raises(StartupError, match="--model sums: there is no folder"):
        serving.serve({"sums": tmp_path / "nowhere"})
