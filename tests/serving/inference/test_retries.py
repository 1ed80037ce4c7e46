"""Retries of failed versions, and the stamps that detect changes of their files."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from serving.inference import version_files
from serving.inference.local import LocalRepository
from serving.inference.model_config import ModelsFolder
from serving.inference.version_files import FIRST_DELAY_S, LONGEST_DELAY_S, MAX_ENTRIES, Retries, read_stamp
from serving.inference.version_loader import InProcessLoader

KEY = ("m", 1)


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 1_000.0
        monkeypatch.setattr(version_files, "time", SimpleNamespace(monotonic=lambda: self.now_s))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_the_backoff_doubles_up_to_a_limit(clock: Clock) -> None:
    retries, stamp = Retries(), frozenset({("a", 1)})
    delay_s = FIRST_DELAY_S
    for _ in range(20):
        assert retries.is_due(KEY, stamp)
        retries.record_failure(KEY, stamp)
        clock.now_s += delay_s - 0.01
        assert not retries.is_due(KEY, stamp)
        clock.now_s += 0.01
        delay_s = min(2 * delay_s, LONGEST_DELAY_S)
    assert delay_s == LONGEST_DELAY_S


def test_a_change_is_retried_at_once_and_resets_the_backoff(clock: Clock) -> None:
    retries, stamp = Retries(), frozenset({("a", 1)})
    for _ in range(5):
        retries.record_failure(KEY, stamp)
    other = frozenset({("a", 2)})
    assert retries.is_due(KEY, other)
    retries.record_failure(KEY, other)
    assert not retries.is_due(KEY, other)
    clock.now_s += FIRST_DELAY_S
    assert retries.is_due(KEY, other)


def test_deleted_versions_are_removed(clock: Clock) -> None:  # noqa: ARG001
    retries, stamp = Retries(), frozenset({("a", 1)})
    for key in (KEY, ("m", 2), ("other", 1)):
        retries.record_failure(key, stamp)
    retries.forget_missing("m", {2})
    assert [retries.is_due(key, stamp) for key in (KEY, ("m", 2), ("other", 1))] == [True, False, False]
    retries.forget(("m", 2))
    assert retries.is_due(("m", 2), stamp)


@pytest.fixture
def version(tmp_path: Path) -> Path:
    """A version with a file, a folder, and links to a file and a folder."""
    version = tmp_path / "1"
    (version / "variables").mkdir(parents=True)
    (version / "file").write_text("abc")
    (tmp_path / "target" / "sub").mkdir(parents=True)
    (tmp_path / "target" / "sub" / "data").write_text("abc")
    (version / "link").symlink_to(tmp_path / "target")
    (version / "nowhere").symlink_to(tmp_path / "missing")
    (version / "above").symlink_to(version)
    return version


def rewrite_with_the_same_times(path: Path) -> None:
    before = path.stat()
    path.write_text("abd")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace_target(version: Path) -> None:
    shutil.copytree(version.parent / "target", version.parent / "other")
    (version / "link").unlink()
    (version / "link").symlink_to(version.parent / "other")


@pytest.mark.parametrize(
    "change",
    [
        lambda version: (version / "file").write_text("abcd"),
        lambda version: (version / "file").chmod(0o600),
        lambda version: version.chmod(0o700),
        lambda version: rewrite_with_the_same_times(version / "file"),
        lambda version: (version / "variables" / "new").touch(),
        lambda version: (version / "file").rename(version / "renamed"),
        lambda version: (version.parent / "target" / "sub" / "data").write_text("abcd"),
        lambda version: rewrite_with_the_same_times(version.parent / "target" / "sub" / "data"),
        lambda version: (version.parent / "target" / "sub" / "data").chmod(0o600),
        lambda version: (version.parent / "missing").touch(),
        replace_target,
    ],
)
def test_every_change_alters_the_stamp(version: Path, change: Callable[[Path], object]) -> None:
    before = read_stamp(version)
    assert read_stamp(version) == before
    change(version)
    assert read_stamp(version) != before


def test_a_stamp_of_a_large_tree_is_limited(tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "root").symlink_to("/")
    assert len(read_stamp(tmp_path / "1")) <= MAX_ENTRIES


def test_a_repaired_link_target_is_retried(models_dir: Path, tmp_path: Path) -> None:
    target = tmp_path / "volume"
    (models_dir / "colours" / "10").rename(target)
    data = target / "variables" / "variables.data-00000-of-00001"
    whole = data.read_bytes()
    data.write_bytes(whole[:50])
    (models_dir / "colours" / "10").mkdir()
    for name in ("saved_model.pb", "variables", "fingerprint.pb", "assets.extra"):
        (models_dir / "colours" / "10" / name).symlink_to(target / name)
    repository = LocalRepository(ModelsFolder(models_dir))
    repository.load()
    assert repository.resolve("colours").version == 2
    data.write_bytes(whole)
    repository.poll()
    assert repository.resolve("colours").version == 10


def test_a_failure_without_file_changes_is_retried(
    models_dir: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    from serving.inference.saved_model import SavedModelPredictor

    memory = False
    attempts = 0

    def load(path: Path) -> SavedModelPredictor:
        nonlocal attempts
        attempts += 1
        if not memory:
            raise MemoryError
        return SavedModelPredictor(path)

    repository = LocalRepository(ModelsFolder(models_dir), loader=InProcessLoader(load))
    repository.load()
    for _ in range(5):
        repository.poll()
    assert attempts == 2  # one per version
    clock.now_s += FIRST_DELAY_S
    repository.poll()
    repository.poll()
    assert attempts == 4
    assert caplog.text.count("colours version 10 is not served") == 1
    memory = True
    clock.now_s += 2 * FIRST_DELAY_S
    repository.poll()
    assert repository.resolve("colours").version == 10
