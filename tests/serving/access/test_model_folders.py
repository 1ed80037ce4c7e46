"""Which folders a reloaded configuration may name."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from serving.access.model_folders import ModelFolders
from serving.app import make_policy
from serving.errors import InvalidRequest
from serving.inference.model_config import ModelConfig
from serving.settings import Settings


def is_allowed(folders: ModelFolders, *paths: Path) -> bool:
    try:
        folders.check([ModelConfig("m", path) for path in paths])
    except InvalidRequest:
        return False
    return True


@pytest.fixture
def models_dir(tmp_path: Path) -> Path:
    for name in ("models/pets", "models/deep/pets", "other/pets"):
        (tmp_path / name).mkdir(parents=True)
    return tmp_path / "models"


def test_folders_below_the_models_folder(models_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    folders = ModelFolders([models_dir])
    other = models_dir.parent / "other" / "pets"
    assert is_allowed(folders, models_dir / "pets", models_dir / "deep" / "pets", models_dir / "later")
    for path in (other, models_dir, models_dir / ".." / "other" / "pets", Path("/"), Path("/etc")):
        assert not is_allowed(folders, models_dir / "pets", path), path
    message = "model m: its base_path must be below the folder of the server's --models-dir"
    with caplog.at_level(logging.ERROR), pytest.raises(InvalidRequest, match=message):
        folders.check([ModelConfig("m", other)])
    assert f"refused to load {other}, which is not below {models_dir}" in caplog.messages


def test_symbolic_links_are_followed(models_dir: Path) -> None:
    (models_dir / "out").symlink_to(models_dir.parent / "other" / "pets")
    (models_dir / "in").symlink_to(models_dir / "deep")
    (models_dir.parent / "current").symlink_to(models_dir)
    for folders in (ModelFolders([models_dir]), ModelFolders([models_dir.parent / "current"])):
        assert not is_allowed(folders, models_dir / "out")
        assert is_allowed(folders, models_dir / "in" / "pets", models_dir.parent / "current" / "pets")


def test_a_relative_models_folder(models_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(models_dir.parent)
    assert is_allowed(ModelFolders([Path("models")]), models_dir / "pets")


def test_the_folders_of_single_models(models_dir: Path) -> None:
    other = models_dir.parent / "other"
    folders = make_policy(Settings(models_dir, models=(("pets", other / "pets"),))).model_folders
    assert is_allowed(folders, other / "pets", models_dir / "pets")
    assert not is_allowed(folders, other / "cats")


def test_the_folders_around_the_models_of_a_config_file(models_dir: Path) -> None:
    other = models_dir.parent / "other"
    config = models_dir.parent / "models.config"
    entries = [
        f'config {{ name: "{name}" base_path: "{path}" }}' for name, path in (("a", other / "pets"), ("b", "/pets"))
    ]
    config.write_text(f"model_config_list {{ {' '.join(entries)} }}")
    folders = make_policy(Settings(models_dir, model_config_file=config)).model_folders
    assert is_allowed(folders, other / "pets", other / "cats", models_dir / "pets")
    # A model directly below the root does not allow everything.
    assert is_allowed(folders, Path("/pets"))
    assert not is_allowed(folders, Path("/etc"))
