"""The models folder or a model's base path becomes unreadable while it is served, and readable again."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from serving.app import make_app
from serving.inference.local import LocalRepository
from serving.inference.model_config import ModelConfig, ModelsFolder
from serving.settings import Settings
from tests.serving.conftest import Server, picture

pytestmark = pytest.mark.slow

IMAGE = {"images": np.zeros((1, 32, 32, 3), np.uint8)}


def hide(path: Path) -> None:
    path.rename(path.with_name(path.name + "-gone"))


def show(path: Path) -> None:
    path.with_name(path.name + "-gone").rename(path)


def replace_by_file(path: Path) -> None:
    hide(path)
    path.touch()


def bring_back_for_file(path: Path) -> None:
    path.unlink()
    show(path)


def replace_by_loop(path: Path) -> None:
    hide(path)
    path.symlink_to(path)


WAYS = [(hide, show), (replace_by_file, bring_back_for_file), (replace_by_loop, bring_back_for_file)]


@pytest.mark.parametrize(("vanish", "come_back"), WAYS)
@pytest.mark.parametrize("source", ["models folder", "base path"])
def test_versions_of_an_unreadable_folder_stay_available(
    models_dir: Path,
    colours: Path,
    source: str,
    vanish: Callable[[Path], None],
    come_back: Callable[[Path], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder, config_file = models_dir, None
    if source == "base path":
        folder, config_file = models_dir / "colours", models_dir.parent / "models.config"
        config_file.write_text(f'model_config_list {{ config {{ name: "colours" base_path: "{folder}" }} }}')
    app = make_app(Settings(models_dir=models_dir, model_config_file=config_file))
    repository = app.inference.repository
    repository.load()
    caplog.clear()
    vanish(folder)
    for _ in range(3):
        repository.poll()
    assert repository.resolve("colours").predictor.predict("serving_default", IMAGE)["class_id"].shape == (1,)
    assert repository.ready
    client = app.test_client()
    (status,) = (client.get("/v1/models/colours").json or {})["model_version_status"]
    assert (status["state"], status["status"]["error_code"]) == ("AVAILABLE", "OK")
    model = "" if source == "models folder" else "colours"
    shown = "the folder of model colours" if model else "the models folder"
    assert shown in status["status"]["error_message"]
    (problem,) = (client.get("/readyz").json or {})["problems"]
    assert problem["model"] == (model or None)
    assert shown in problem["error"]
    assert f'serving_folder_unreadable{{model="{model}"}} 1.0' in client.get("/metrics").text
    for page in ("/readyz", "/metrics", "/v1/models/colours", "/models.json", "/"):
        assert str(models_dir.parent) not in client.get(page).text, page
    assert client.get("/models.json").json[0]["problem"] is None  # type: ignore[index]
    assert caplog.text.count(str(folder)) == 1  # not at every poll

    come_back(folder)
    repository.poll()
    assert caplog.text.count(f"{folder} is readable again") == 1
    assert repository.versions("colours")[0].error_message == ""
    assert (client.get("/readyz").json or {})["problems"] == []
    shutil.copytree(colours, models_dir / "colours" / "11")
    repository.poll()
    assert repository.resolve("colours").version == 11


def test_a_model_with_a_broken_link_stays_available(models_dir: Path) -> None:
    target = models_dir.parent / "volume"
    (models_dir / "colours").rename(target)
    (models_dir / "colours").symlink_to(target)
    repository = LocalRepository(ModelsFolder(models_dir))
    repository.load()
    hide(target)
    repository.poll()
    assert repository.resolve("colours").version == 10
    assert "colours does not exist" in repository.versions("colours")[0].error_message
    show(target)
    shutil.rmtree(target / "10")
    repository.poll()
    assert repository.resolve("colours").version == 2


def test_a_version_with_a_broken_link_stays_available(models_dir: Path) -> None:
    target = models_dir.parent / "volume"
    (models_dir / "colours" / "10").rename(target)
    (models_dir / "colours" / "10").symlink_to(target)
    repository = LocalRepository(ModelsFolder(models_dir))
    repository.load()
    hide(target)
    repository.poll()
    assert repository.resolve("colours").version == 10


@pytest.fixture
def volume() -> Iterator[Path]:
    """A folder on another volume than the tests' other folders."""
    if not Path("/dev/shm").is_dir() or Path("/dev/shm").stat().st_dev == Path(tempfile.gettempdir()).stat().st_dev:
        pytest.skip("there is no second volume")
    folder = Path(tempfile.mkdtemp(dir="/dev/shm"))
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("mounted", ["models", "models/colours"])
def test_versions_of_an_unmounted_volume_stay_available(
    models_dir: Path, volume: Path, colours: Path, mounted: str, tmp_path: Path
) -> None:
    """A link simulates the mount: after unmounting, it points to an empty folder on the parent volume."""
    mount = tmp_path / mounted
    shutil.rmtree(mount)
    inside = volume / "colours" if mounted == "models" else volume
    shutil.copytree(colours, inside / "10")
    mount.symlink_to(volume)
    folder = ModelsFolder(models_dir)
    repository = LocalRepository(folder)
    repository.load()
    mount.unlink()
    mount.mkdir()
    repository.poll()
    assert repository.resolve("colours").version == 10
    assert "no longer mounted" in repository.versions("colours")[0].error_message
    mount.rmdir()
    mount.symlink_to(volume)
    repository.poll()
    assert repository.versions("colours")[0].error_message == ""
    shutil.rmtree(inside / "10")  # on the mounted volume: an intended deletion
    repository.poll()
    assert repository.names() == []


def test_a_model_deleted_from_an_intact_folder_is_unloaded(models_dir: Path, adder: Path) -> None:
    shutil.copytree(adder, models_dir / "adder" / "1")
    repository = LocalRepository(ModelsFolder(models_dir))
    repository.load()
    shutil.rmtree(models_dir / "colours")
    repository.poll()
    assert (repository.names(), repository.folder_problems) == (["adder"], ())


def test_a_base_path_without_versions_unloads_its_model(models_dir: Path) -> None:
    repository = LocalRepository(lambda: [ModelConfig("m", models_dir / "colours")])
    repository.load()
    for version in ("2", "10"):
        shutil.rmtree(models_dir / "colours" / version)
    repository.poll()
    assert (repository.names(), repository.folder_problems) == ([], ())


def test_a_base_path_may_be_created_later(models_dir: Path) -> None:
    hide(models_dir)
    repository = LocalRepository(lambda: [ModelConfig("m", models_dir / "colours")])
    repository.load()
    assert "m: no version to serve: the folder of model m does not exist" in str(repository.not_ready_because)
    show(models_dir)
    repository.poll()
    assert repository.ready


def test_the_process_keeps_serving_without_its_models_folder(
    models_dir: Path, start_server: Callable[..., Server]
) -> None:
    server = start_server(models_dir, "--poll-interval-s", "0.05")
    server.wait_for("/readyz")
    hide(models_dir)
    server.wait_until(lambda: f"{models_dir} does not exist" in server.log)
    image: dict[str, Any] = {"content": picture("blue"), "headers": {"Content-Type": "image/png"}}
    for _ in range(20):
        assert httpx.post(server.url + "/predict", **image).status_code == 200
    assert httpx.get(server.url + "/readyz").status_code == 200
    show(models_dir)
    server.wait_until(lambda: f"{models_dir} is readable again" in server.log)
    assert server.log.count("does not exist") == 1
    assert server.stop() == 0
