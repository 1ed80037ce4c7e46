"""What the supervisor tells workers to load and to serve, with workers that only note it."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from serving.errors import ModelLoadError
from serving.inference.model_config import ModelsFolder
from serving.inference.version_loader import WarmUp
from serving.workers.channel import ChannelClosed
from serving.workers.leader import JoinFailed, LeadingRepository, Members
from serving.workers.messages import Apply, Drop, Load, LoadReport, State


class FakeWorker:
    """Notes what it is told. `fails` returns the exception for loading a path, or None."""

    def __init__(self, number: int, fails: Callable[[Path], Exception | None] = lambda _: None) -> None:
        self.number = number
        self.is_retiring = False
        self.loads: set[int] = set()
        self.fails = fails
        self.told: list[Any] = []

    def post(self, message: Any) -> Future[Any]:
        self.told.append(message)
        future: Future[Any] = Future()
        if isinstance(message, Load) and (error := self.fails(message.path)):
            future.set_exception(error)
        elif isinstance(message, Load):
            future.set_result(LoadReport(WarmUp(2, ()), ("red",), 0.5, 0.1))
        else:
            future.set_result(None)
        return future

    @property
    def loaded(self) -> list[str]:
        return [message.path.name for message in self.told if isinstance(message, Load)]

    @property
    def states(self) -> list[State]:
        return [message.state for message in self.told if isinstance(message, Apply)]

    def versions(self) -> list[int]:
        return sorted(self.states[-1].versions.get("colours", {}))


def lead(models_dir: Path, *workers: FakeWorker) -> tuple[LeadingRepository, Members]:
    members = Members()
    repository = LeadingRepository(ModelsFolder(models_dir), members)
    for worker in workers:
        members.join(worker)
    return repository, members


def add_version(models_dir: Path, version: int) -> None:
    shutil.copytree(models_dir / "colours" / "10", models_dir / "colours" / str(version))


def state_of(worker: FakeWorker, version: int) -> tuple[str, str]:
    status = worker.states[-1].statuses["colours"][version]
    return status.state, status.error_message


def test_a_version_is_available_once_every_worker_has_loaded_it(models_dir: Path) -> None:
    one, other = FakeWorker(1), FakeWorker(2)
    repository, members = lead(models_dir, one, other)
    repository.load()
    add_version(models_dir, 11)
    repository.poll()
    for worker in (one, other):
        assert worker.loaded == ["10", "11"]
        assert worker.versions() == [11]
        available = [state for state in worker.states if 11 in state.versions.get("colours", {})]
        # It is served before the status says so, and the old version goes afterwards.
        states = [(state.statuses["colours"][11].state, 10 in state.versions["colours"]) for state in available]
        assert states == [("LOADING", True), ("AVAILABLE", True), ("AVAILABLE", True), ("AVAILABLE", False)]
    assert repository.versions("colours", 10)[0].state == "UNLOADING"
    members.release(one, 1)
    assert repository._released.empty()
    members.release(other, 1)  # the last one that held it
    assert repository._released.get(timeout=10) == ("colours", 10)


@pytest.mark.parametrize("number", [1, 2])
def test_a_version_that_one_worker_cannot_load_is_not_served(models_dir: Path, number: int) -> None:
    def fail(path: Path) -> Exception | None:
        return ModelLoadError("no memory", code="RESOURCE_EXHAUSTED") if path.name == "11" else None

    one, other = (FakeWorker(each, fail if each == number else lambda _: None) for each in (1, 2))
    repository, _ = lead(models_dir, one, other)
    repository.load()
    add_version(models_dir, 11)
    repository.poll()
    for worker in (one, other):
        assert worker.versions() == [10]
        assert state_of(worker, 11) == ("END", "no memory")
    assert isinstance(one.told[-1], Apply)
    assert any(isinstance(message, Drop) for message in one.told)


def test_a_version_that_ends_the_process_that_loads_it_ends_only_one(models_dir: Path) -> None:
    one = FakeWorker(1, lambda path: ChannelClosed() if path.name == "11" else None)
    other = FakeWorker(2)
    repository, members = lead(models_dir, one, other)
    repository.load()
    add_version(models_dir, 11)
    repository.poll()
    members.leave(one)
    assert other.loaded == ["10"]
    assert state_of(other, 11) == ("END", "worker 1 ended while it loaded colours/11")
    again = FakeWorker(1)
    members.join(again)
    assert (again.loaded, again.versions()) == (["10"], [10])


def test_a_worker_that_joins_loads_what_the_others_serve_even_meanwhile(models_dir: Path) -> None:
    late = FakeWorker(2)
    joining: list[threading.Thread] = []

    def join_meanwhile(path: Path) -> None:
        if path.name == "11" and not joining:
            joining.append(threading.Thread(target=members.join, args=(late,)))
            joining[0].start()
            joining[0].join()

    one = FakeWorker(1, join_meanwhile)
    repository, members = lead(models_dir, one)
    repository.load()
    add_version(models_dir, 11)
    repository.poll()
    assert late.loaded == ["10", "11"]
    assert late.versions() == [11]


def test_a_worker_that_cannot_load_what_the_others_serve_does_not_join(models_dir: Path) -> None:
    one = FakeWorker(1)
    repository, members = lead(models_dir, one)
    repository.load()
    late = FakeWorker(2, lambda _: ModelLoadError("no such file"))
    with pytest.raises(JoinFailed, match="no such file") as failed:
        members.join(late)
    assert late.states == []
    members.leave(one)  # no worker is left that serves the version
    repository.unload_failed(failed.value.path)
    members.join(late)
    assert late.versions() == []


def test_files_that_change_while_workers_load_them_are_not_served(models_dir: Path) -> None:
    def change(path: Path) -> None:
        if path.name == "11" and len(one.loaded) == 2:
            (path / "saved_model.pb").touch()

    one = FakeWorker(1, change)
    repository, _ = lead(models_dir, one)
    repository.load()
    add_version(models_dir, 11)
    repository.poll()
    assert one.versions() == [10]
    assert "changed while it was loaded" in state_of(one, 11)[1]
    repository.poll()
    assert one.versions() == [11]
