"""The models folder followed: what appears, changes, breaks and vanishes while the repository serves."""

from __future__ import annotations

import gc
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from serving.errors import InvalidRequest, ModelFailed, ModelNotFound, StartupError
from serving.inference.local import LocalRepository
from serving.inference.model_config import ModelConfig, ModelsFolder, VersionPolicy

pytestmark = pytest.mark.slow

IMAGE = {"images": np.zeros((1, 32, 32, 3), np.uint8)}


@pytest.fixture
def repository(models_dir: Path) -> LocalRepository:
    """`colours` version 10 of 2 and 10, loaded; looked at again only when told to."""
    repository = LocalRepository(ModelsFolder(models_dir))
    repository.load()
    return repository


@pytest.fixture
def watched(repository: LocalRepository) -> LocalRepository:
    threading.Thread(target=repository.watch, args=(0.05,), daemon=True).start()
    return repository


def publish(colours: Path, models_dir: Path, version: int, name: str = "colours") -> Path:
    partial = models_dir / name / f".{version}.partial"
    shutil.copytree(colours, partial)
    return partial.rename(models_dir / name / str(version))


def states(repository: LocalRepository, name: str = "colours") -> dict[int, str]:
    return {status.version: status.state for status in repository.versions(name)}


def wait_until(condition: object) -> None:
    deadline = time.monotonic() + 60
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_new_version_takes_the_place_of_the_old_one(
    watched: LocalRepository, models_dir: Path, colours: Path
) -> None:
    publish(colours, models_dir, 11)
    wait_until(lambda: watched.resolve("colours").version == 11)
    wait_until(lambda: states(watched) == {11: "AVAILABLE", 10: "END"})
    with pytest.raises(ModelNotFound):
        watched.resolve("colours", version=10)


def test_the_old_version_answers_until_its_last_request_is_done(
    watched: LocalRepository, models_dir: Path, colours: Path
) -> None:
    held = watched.resolve("colours")
    publish(colours, models_dir, 11)
    wait_until(lambda: states(watched).get(11) == "AVAILABLE")
    wait_until(lambda: states(watched)[10] == "UNLOADING")
    assert held.predictor.predict("serving_default", IMAGE)["class_id"].shape == (1,)
    assert states(watched)[10] == "UNLOADING"
    del held
    wait_until(lambda: states(watched)[10] == "END")


def test_a_broken_version_replaces_nothing_and_is_retried_when_its_files_change(
    repository: LocalRepository, models_dir: Path, colours: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = models_dir / "colours" / "11"
    broken.mkdir()
    (broken / "saved_model.pb").write_bytes(b"\xff garbage")
    repository.update()
    repository.update()
    assert states(repository) == {11: "END", 10: "AVAILABLE"}
    status = repository.versions("colours")[0]
    assert (status.error_code, "as binary proto" in status.error_message) == ("DATA_LOSS", True)
    assert caplog.text.count("version 11 is not served") == 1  # not at every look
    assert repository.ready
    shutil.rmtree(broken)
    shutil.copytree(colours, broken)
    repository.update()
    assert repository.resolve("colours").version == 11
    assert repository.versions("colours")[0].error_message == ""


def test_a_broken_version_does_not_hold_up_the_next(
    repository: LocalRepository, models_dir: Path, colours: Path
) -> None:
    (models_dir / "colours" / "11").mkdir()
    publish(colours, models_dir, 12)
    (models_dir / "colours" / "13").mkdir()
    repository.update()
    assert repository.resolve("colours").version == 12


def test_the_version_before_comes_back_when_the_newest_is_removed(
    repository: LocalRepository, models_dir: Path
) -> None:
    shutil.rmtree(models_dir / "colours" / "10")
    repository.update()
    assert repository.resolve("colours").version == 2


def test_models_come_and_go(repository: LocalRepository, models_dir: Path, colours: Path, adder: Path) -> None:
    shutil.copytree(adder, models_dir / "adder" / "1")
    repository.update()
    assert repository.names() == ["adder", "colours"]
    shutil.rmtree(models_dir / "colours")
    repository.update()
    assert (repository.names(), repository.all_names(), repository.ready) == (["adder"], ["adder"], True)
    with pytest.raises(ModelNotFound):
        repository.resolve("colours")
    shutil.rmtree(models_dir / "adder")
    repository.update()
    assert (repository.ready, repository.not_ready_because) == (False, "there is no model to answer with")
    publish(colours, models_dir, 1, name="again")
    repository.update()
    assert (repository.names(), repository.ready) == (["again"], True)


def test_a_broken_model_that_comes_later_does_not_take_the_others_out_of_use(
    repository: LocalRepository, models_dir: Path
) -> None:
    (models_dir / "broken" / "1").mkdir(parents=True)
    repository.update()
    assert repository.ready
    assert states(repository, "broken") == {1: "END"}


def test_a_folder_that_cannot_be_read_changes_nothing(models_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, fails = ModelsFolder(models_dir), False

    def configs() -> list[ModelConfig]:
        if fails:
            raise OSError("stale file handle")
        return folder()

    repository = LocalRepository(configs)
    repository.load()
    fails = True
    repository.update()
    assert repository.resolve("colours").version == 10
    assert "stale file handle" in caplog.text


def config(models_dir: Path, policy: VersionPolicy = VersionPolicy(), **labels: int) -> ModelConfig:  # noqa: B008
    return ModelConfig("m", models_dir / "colours", policy, labels)


@pytest.mark.parametrize(
    ("policy", "served"),
    [
        (VersionPolicy(), {10}),
        (VersionPolicy(latest=2), {10, 9}),
        (VersionPolicy(latest=None), {10, 9, 2}),
        (VersionPolicy(latest=None, specific=frozenset({2, 9, 77})), {9, 2}),
    ],
)
def test_the_policy_chooses_the_versions(
    models_dir: Path, colours: Path, policy: VersionPolicy, served: set[int]
) -> None:
    publish(colours, models_dir, 9)
    repository = LocalRepository(lambda: [config(models_dir, policy)])
    repository.load()
    assert states(repository, "m") == dict.fromkeys(served, "AVAILABLE")
    assert repository.resolve("m").version == max(served)


def test_the_latest_two_are_the_latest_two_that_load(models_dir: Path, colours: Path) -> None:
    publish(colours, models_dir, 9)
    (models_dir / "colours" / "11").mkdir()
    repository = LocalRepository(lambda: [config(models_dir, VersionPolicy(latest=2))])
    repository.load()
    assert states(repository, "m") == {11: "END", 10: "AVAILABLE", 9: "AVAILABLE"}


def test_labels_are_names_of_versions(models_dir: Path) -> None:
    both = VersionPolicy(latest=None)
    repository = LocalRepository(lambda: [config(models_dir, both, stable=2, canary=10)])
    repository.load()
    assert repository.resolve("m", label="stable").version == 2
    assert repository.resolve("m", label="canary").version == 10
    with pytest.raises(InvalidRequest, match=r"^Unrecognized servable version label: beta$"):
        repository.resolve("m", label="beta")
    repository.reload([config(models_dir, both, stable=10)])
    assert repository.resolve("m", label="stable").version == 10
    with pytest.raises(InvalidRequest):
        repository.resolve("m", label="canary")
    with pytest.raises(ModelFailed, match="label stable to version 3 of model m, which is not currently available"):
        repository.reload([config(models_dir, both, stable=3)])


def test_a_label_for_nothing_is_refused_at_the_start(models_dir: Path) -> None:
    with pytest.raises(StartupError, match="label stable to version 2"):
        LocalRepository(lambda: [config(models_dir, stable=2)]).load()


def test_a_reload_serves_exactly_its_models(repository: LocalRepository, models_dir: Path, adder: Path) -> None:
    shutil.copytree(adder, models_dir.parent / "elsewhere" / "5")
    repository.reload([ModelConfig("sum", models_dir.parent / "elsewhere")])
    assert repository.all_names() == ["sum"]
    assert repository.ready
    with pytest.raises(ModelFailed, match="did not become available: gone: no version to serve") as refused:
        repository.reload([ModelConfig("sum", models_dir.parent / "elsewhere"), ModelConfig("gone", models_dir / "x")])
    assert refused.value.code == "UNKNOWN"
    assert repository.resolve("sum").version == 5


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_memory_returns_after_each_swap(watched: LocalRepository, models_dir: Path, colours: Path) -> None:
    """Also held for 50 swaps of an exported CIFAR-10 model, by hand."""
    levels = []
    for version in range(11, 27):
        newest = publish(colours, models_dir, version)
        wait_until(lambda newest=newest: states(watched).get(int(newest.name)) == "AVAILABLE")
        wait_until(lambda newest=newest: states(watched)[int(newest.name) - 1] == "END")
        shutil.rmtree(models_dir / "colours" / str(version - 1))
        gc.collect()
        levels.append(resident_bytes())
    assert max(levels[3:]) < 1.1 * levels[2]
