"""Checksums: a version whose files differ from its checksums is reported and not served."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from serving.inference import version_files
from serving.inference.local import LocalRepository
from serving.inference.model_config import ModelsFolder
from serving.inference.version_files import SUMS_FILE
from tests.serving.inference.test_local import publish, states, wait_until
from training.exporter.checksums import write_checksums

IMAGE = {"images": np.zeros((1, 32, 32, 3), np.uint8)}
FILES = (
    "saved_model.pb",
    "fingerprint.pb",
    "variables/variables.index",
    "variables/variables.data-00000-of-00001",
    "assets.extra/model.json",
    "assets.extra/tf_serving_warmup_requests",
)


@pytest.fixture
def summed(colours: Path, tmp_path: Path) -> Path:
    """A version with checksums."""
    version = shutil.copytree(colours, tmp_path / "summed")
    write_checksums(version)
    return version


def problem_of(models_dir: Path, version: Path) -> tuple[str, str]:
    """Serve a version and a valid model; return the version's error code and message."""
    (models_dir / "alpha").mkdir()
    version.rename(models_dir / "alpha" / "1")
    repository = LocalRepository(ModelsFolder(models_dir))
    repository.load()
    assert repository.resolve("colours").version == 10
    (status,) = repository.versions("alpha")
    assert (status.state == "AVAILABLE") == (status.error_code == "OK")
    return status.error_code, status.error_message


def test_unaltered_files_are_served_and_unlisted_files_are_allowed(models_dir: Path, summed: Path) -> None:
    (summed / "assets.extra" / "notes.txt").write_text("added later")
    assert problem_of(models_dir, summed) == ("OK", "")


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_is_reported_with_the_file(models_dir: Path, summed: Path, name: str) -> None:
    content = bytearray((summed / name).read_bytes())
    content[len(content) // 2] ^= 4
    (summed / name).write_bytes(content)
    code, message = problem_of(models_dir, summed)
    assert code == "DATA_LOSS"
    assert f"differs from its export: {name} has been altered" in message


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda version: (version / "fingerprint.pb").unlink(), "fingerprint.pb is missing"),
        (lambda version: replace(version / "fingerprint.pb", Path.mkdir), "fingerprint.pb is not a regular file"),
        (lambda version: replace(version / "fingerprint.pb", os.mkfifo), "fingerprint.pb is not a regular file"),
        (lambda version: replace(version / SUMS_FILE, Path.touch), "SHA256SUMS is damaged: it lists no files"),
        (lambda version: replace(version / SUMS_FILE, os.mkfifo), "SHA256SUMS is not a regular file"),
        (lambda version: replace(version / SUMS_FILE, lambda p: p.symlink_to(p)), "cannot read "),
        (lambda version: (version / SUMS_FILE).write_bytes(b"\xff\n"), "line 1 of "),
        (lambda version: (version / SUMS_FILE).write_text(f"{'0' * 64}  ../../x\n"), "line 1 of "),
        (lambda version: (version / SUMS_FILE).write_text(f"{'0' * 64}  /etc/passwd\n"), "line 1 of "),
        (lambda version: (version / SUMS_FILE).write_text(f"{'0' * 63}  x\n"), "line 1 of "),
    ],
)
def test_missing_files_and_damaged_checksums_are_reported(
    models_dir: Path, summed: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(summed)
    assert message in problem_of(models_dir, summed)[1]


def replace(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Blocks the verification of `colours` until set, like files of many gigabytes."""
    gate = threading.Event()
    verify = version_files.verify_checksums

    def verify_slowly(path: Path) -> None:
        if path.parent.name == "colours":
            gate.wait(60)
        verify(path)

    monkeypatch.setattr(version_files, "verify_checksums", verify_slowly)
    return gate


def test_a_long_verification_does_not_delay_other_models(models_dir: Path, summed: Path, gate: threading.Event) -> None:
    repository = LocalRepository(ModelsFolder(models_dir))
    repository.load()
    threading.Thread(target=repository.poll_forever, args=(0.05,), daemon=True).start()
    publish(summed, models_dir, 11)
    wait_until(lambda: 11 in states(repository))
    publish(summed, models_dir, 1, name="other")
    wait_until(lambda: "other" in repository.names())
    assert (repository.resolve("colours").version, states(repository)) == (10, {11: "START", 10: "AVAILABLE"})
    gate.set()
    wait_until(lambda: repository.resolve("colours").version == 11)


def test_other_models_are_available_during_a_verification_at_startup(
    models_dir: Path, summed: Path, gate: threading.Event
) -> None:
    publish(summed, models_dir, 11)
    publish(summed, models_dir, 1, name="other")
    repository = LocalRepository(ModelsFolder(models_dir))
    loading = threading.Thread(target=repository.load, daemon=True)
    loading.start()
    wait_until(lambda: "other" in repository.names())
    assert (repository.ready, repository.names()) == (False, ["other"])
    gate.set()
    loading.join(60)
    assert (repository.ready, repository.resolve("colours").version) == (True, 11)
    assert 10 not in states(repository)


def test_files_altered_after_loading_are_reported_until_repaired(models_dir: Path, summed: Path) -> None:
    version = publish(summed, models_dir, 11)
    repository = LocalRepository(ModelsFolder(models_dir))
    repository.load()
    info, good = version / "assets.extra" / "model.json", (summed / "assets.extra" / "model.json").read_text()
    info.write_text('{"class_names": ["a", "b", "c"]}')
    repository.poll()
    status = repository.versions("colours")[0]
    assert (status.state, status.warnings) == ("AVAILABLE", ("model_info",))
    assert "assets.extra/model.json has been altered" in status.error_message
    info.write_text(good)
    repository.poll()
    assert repository.versions("colours")[0].warnings == ()


def test_an_altered_version_is_loaded_once_repaired(models_dir: Path, summed: Path) -> None:
    repository = LocalRepository(ModelsFolder(models_dir))
    repository.load()
    (summed / "saved_model.pb").write_bytes(b"x" + (summed / "saved_model.pb").read_bytes())
    version = publish(summed, models_dir, 11)
    threading.Thread(target=repository.poll_forever, args=(0.05,), daemon=True).start()
    wait_until(lambda: states(repository).get(11) == "END")
    assert repository.resolve("colours").version == 10
    (version / "saved_model.pb").write_bytes((summed / "saved_model.pb").read_bytes()[1:])
    wait_until(lambda: repository.resolve("colours").version == 11)
