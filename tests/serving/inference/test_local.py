"""Hot reload: versions that are added, changed, damaged and deleted while the repository serves."""

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
    """`colours` with versions 2 and 10, of which 10 is loaded; polled only explicitly."""
    repository = LocalRepository(ModelsFolder(models_dir))
    repository.load()
    return repository


@pytest.fixture
def watched(repository: LocalRepository) -> LocalRepository:
    threading.Thread(target=repository.poll_forever, args=(0.05,), daemon=True).start()
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


def test_a_new_version_replaces_the_old_one(watched: LocalRepository, models_dir: Path, colours: Path) -> None:
    publish(colours, models_dir, 11)
    wait_until(lambda: watched.resolve("colours").version == 11)
    wait_until(lambda: states(watched) == {11: "AVAILABLE", 10: "END"})
    with pytest.raises(ModelNotFound):
        watched.resolve("colours", version=10)


def test_an_old_version_is_unloaded_after_its_last_in_flight_request(
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


def test_a_broken_version_is_retried_when_its_files_change(
    repository: LocalRepository, models_dir: Path, colours: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = models_dir / "colours" / "11"
    broken.mkdir()
    (broken / "saved_model.pb").write_bytes(b"\xff garbage")
    repository.poll()
    repository.poll()
    assert states(repository) == {11: "END", 10: "AVAILABLE"}
    status = repository.versions("colours")[0]
    assert (status.error_code, "as binary proto" in status.error_message) == ("DATA_LOSS", True)
    assert caplog.text.count("version 11 is not served") == 1  # not at every poll
    assert repository.ready
    shutil.rmtree(broken)
    shutil.copytree(colours, broken)
    repository.poll()
    assert repository.resolve("colours").version == 11
    assert repository.versions("colours")[0].error_message == ""


def test_a_broken_version_does_not_block_the_next_one(
    repository: LocalRepository, models_dir: Path, colours: Path
) -> None:
    (models_dir / "colours" / "11").mkdir()
    publish(colours, models_dir, 12)
    (models_dir / "colours" / "13").mkdir()
    repository.poll()
    assert repository.resolve("colours").version == 12


def test_the_previous_version_is_loaded_when_the_newest_is_removed(
    repository: LocalRepository, models_dir: Path
) -> None:
    shutil.rmtree(models_dir / "colours" / "10")
    repository.poll()
    assert repository.resolve("colours").version == 2


def test_models_are_loaded_and_unloaded_with_their_folders(
    repository: LocalRepository, models_dir: Path, colours: Path, adder: Path
) -> None:
    shutil.copytree(adder, models_dir / "adder" / "1")
    repository.poll()
    assert repository.names() == ["adder", "colours"]
    shutil.rmtree(models_dir / "colours")
    repository.poll()
    assert (repository.names(), repository.all_names(), repository.ready) == (["adder"], ["adder"], True)
    with pytest.raises(ModelNotFound):
        repository.resolve("colours")
    shutil.rmtree(models_dir / "adder")
    repository.poll()
    assert (repository.ready, repository.not_ready_because) == (False, "no model is available")
    publish(colours, models_dir, 1, name="again")
    repository.poll()
    assert (repository.names(), repository.ready) == (["again"], True)


def test_a_broken_model_added_later_does_not_affect_others(repository: LocalRepository, models_dir: Path) -> None:
    (models_dir / "broken" / "1").mkdir(parents=True)
    repository.poll()
    assert repository.ready
    assert states(repository, "broken") == {1: "END"}


def test_an_unreadable_folder_changes_nothing(models_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, fails = ModelsFolder(models_dir), False

    def configs() -> list[ModelConfig]:
        if fails:
            raise OSError("stale file handle")
        return folder()

    repository = LocalRepository(configs)
    repository.load()
    fails = True
    repository.poll()
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
def test_the_version_policy_selects_the_versions(
    models_dir: Path, colours: Path, policy: VersionPolicy, served: set[int]
) -> None:
    publish(colours, models_dir, 9)
    repository = LocalRepository(lambda: [config(models_dir, policy)])
    repository.load()
    assert states(repository, "m") == dict.fromkeys(served, "AVAILABLE")
    assert repository.resolve("m").version == max(served)


def test_the_latest_policy_skips_versions_that_fail_to_load(models_dir: Path, colours: Path) -> None:
    publish(colours, models_dir, 9)
    (models_dir / "colours" / "11").mkdir()
    repository = LocalRepository(lambda: [config(models_dir, VersionPolicy(latest=2))])
    repository.load()
    assert states(repository, "m") == {11: "END", 10: "AVAILABLE", 9: "AVAILABLE"}


def test_a_label_resolves_to_its_version(models_dir: Path) -> None:
    both = VersionPolicy(latest=None)
    repository = LocalRepository(lambda: [config(models_dir, both, stable=2, canary=10)])
    repository.load()
    assert repository.resolve("m", label="stable").version == 2
    assert repository.resolve("m", label="canary").version == 10
    with pytest.raises(InvalidRequest, match='model m has no label "beta"; it has canary, stable') as unknown:
        repository.resolve("m", label="beta")
    assert str(unknown.value.tensorflow_serving) == "Unrecognized servable version label: beta"
    repository.reload([config(models_dir, both, stable=10)])
    assert repository.resolve("m", label="stable").version == 10
    with pytest.raises(InvalidRequest):
        repository.resolve("m", label="canary")
    with pytest.raises(ModelFailed, match="label stable to version 3 of model m, which is not currently available"):
        repository.reload([config(models_dir, both, stable=3)])


def test_a_label_of_a_missing_version_is_refused_at_startup(models_dir: Path) -> None:
    with pytest.raises(StartupError, match="label stable to version 2"):
        LocalRepository(lambda: [config(models_dir, stable=2)]).load()


def test_a_reload_replaces_the_served_models(repository: LocalRepository, models_dir: Path, adder: Path) -> None:
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


def test_memory_is_freed_after_each_version_swap(watched: LocalRepository, models_dir: Path, colours: Path) -> None:
    """Manually verified for 50 swaps of an exported CIFAR-10 model."""
    levels = []
    for version in range(11, 27):
        newest = publish(colours, models_dir, version)
        wait_until(lambda newest=newest: states(watched).get(int(newest.name)) == "AVAILABLE")
        wait_until(lambda newest=newest: states(watched)[int(newest.name) - 1] == "END")
        shutil.rmtree(models_dir / "colours" / str(version - 1))
        gc.collect()
        levels.append(resident_bytes())
    assert max(levels[3:]) < 1.1 * levels[2]


def test_an_unloaded_model_stays_unloaded_until_it_is_loaded(
    repository: LocalRepository, models_dir: Path, colours: Path
) -> None:
    repository.unload_model("colours")
    publish(colours, models_dir, 11)
    repository.poll()
    assert repository.names() == []
    assert repository.all_names() == ["colours"]
    assert repository.not_ready_because == "colours: it was unloaded; load it to use it again"
    with pytest.raises(ModelNotFound, match="model colours cannot be used: it was unloaded; load it to use it again"):
        repository.resolve("colours")
    repository.load_model("colours")
    assert repository.resolve("colours").version == 11
    repository.load_model("colours")  # is loaded already
    for change in (repository.load_model, repository.unload_model):
        with pytest.raises(ModelNotFound, match='there is no model "x"; available: colours'):
            change("x")


def test_loading_a_model_finds_a_new_folder_and_tries_a_failed_version_again(
    repository: LocalRepository, models_dir: Path, colours: Path
) -> None:
    (models_dir / "other" / "1").mkdir(parents=True)
    (models_dir / "other" / "1" / "saved_model.pb").write_bytes(b"\xff")
    with pytest.raises(ModelFailed, match="model other could not be loaded: Can't parse") as failed:
        repository.load_model("other")
    assert failed.value.code == "FAILED_PRECONDITION"
    with pytest.raises(ModelFailed):
        repository.load_model("other")
    assert repository._retries._failures["other", 1].count == 1  # tried again at once, as if for the first time
    shutil.rmtree(models_dir / "other" / "1")
    shutil.copytree(colours, models_dir / "other" / "1")
    repository.load_model("other")
    assert repository.names() == ["colours", "other"]


def test_models_of_a_config_are_unloaded_until_they_are_loaded_or_reconfigured(models_dir: Path) -> None:
    configs = [ModelConfig("colours", models_dir / "colours", VersionPolicy(latest=2))]
    repository = LocalRepository(lambda: configs)
    repository.load()
    repository.unload_model("colours")
    assert set(states(repository).values()) == {"UNLOADING"}
    repository.load_model("colours")
    assert [version.version for version in repository.available("colours")] == [2, 10]
    repository.unload_model("colours")
    repository.reload(configs)
    assert [version.version for version in repository.available("colours")] == [2, 10]
