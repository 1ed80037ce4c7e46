"""The repository index, of versions in every state."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from serving.inference.local import LocalRepository
from serving.inference.model_config import ModelConfig
from serving.inference.repository import VersionStatus
from serving.inference.service import InferenceService
from serving.open_inference.descriptions import list_models


@pytest.mark.slow
def test_the_index_has_every_version_with_its_state_and_the_reason(models_dir: Path) -> None:
    (models_dir / "colours" / "11").mkdir()
    (models_dir / "colours" / "11" / "saved_model.pb").write_bytes(b"\xff")
    shutil.rmtree(models_dir / "colours" / "2")
    configs = [ModelConfig("colours", models_dir / "colours"), ModelConfig("none", models_dir / "none")]
    repository = LocalRepository(lambda: configs)
    repository.load()
    for version, state in ((7, "LOADING"), (6, "UNLOADING"), (5, "END")):
        repository._set_status(VersionStatus("colours", version, state))
    inference = InferenceService(repository, max_rows=1)
    index = list_models(inference, ready_only=False)
    states = {(entry["name"], entry["version"]): entry["state"] for entry in index}
    assert states == {
        ("colours", "11"): "UNAVAILABLE",
        ("colours", "10"): "READY",
        ("colours", "7"): "LOADING",
        ("colours", "6"): "UNLOADING",
        ("colours", "5"): "UNAVAILABLE",
        ("none", ""): "UNAVAILABLE",
    }
    reasons = {entry["version"]: entry["reason"] for entry in index}
    assert "Can't parse" in reasons["11"]
    assert reasons["5"] == "unloaded"
    assert "no version to serve" in reasons[""]
    assert reasons["10"] == reasons["7"] == reasons["6"] == ""
    ready = [{"name": "colours", "version": "10", "state": "READY", "reason": ""}]
    assert list_models(inference, ready_only=True) == ready
