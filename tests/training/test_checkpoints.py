"""Checkpoints are always complete, found by content, and never deleted by reading."""

import dataclasses
import errno
import json
import math
import os
import re
import shutil
import subprocess
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from training.checkpoints import Checkpoints, TrainingState, read_best_state, restore_best
from training.errors import RunError
from training.history import EpochResult
from training.models import RECIPES, build_model

# `transfer` trains a part of its network: tests/training/test_transfer.py.
TRAINED_WHOLE = [variant for variant, recipe in RECIPES.items() if not recipe.backbones]
ENDINGS = ("index", "data-00000-of-00001")


def make(variant, folder, *, seed=0, classes=4):
    keras.utils.set_random_seed(seed)
    model = build_model(variant, (24, 24, 3), classes=classes, conv_activation="relu")
    optimizer = keras.optimizers.Adam(1e-3)
    return model, optimizer, Checkpoints(folder, model=model, optimizer=optimizer)


def step(model, optimizer, *, seed=0):
    """One optimizer step on random images."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (8, 24, 24, 3), dtype=np.uint8)
    model.compile(optimizer, "sparse_categorical_crossentropy")
    model.train_on_batch(images, rng.integers(0, 4, 8))


def state(epochs, *, val_loss=1.25):
    figures = {"accuracy": 0.5, "val_accuracy": 0.5, "learning_rate": 1e-3, "seconds": 1.0, "images_per_s": 1.0}
    history = (EpochResult(epoch=n + 1, loss=1.0, val_loss=val_loss, **figures) for n in range(epochs))
    return TrainingState(history=tuple(history), plateau={"best": math.inf, "epochs_without": 1}, config={"seed": 0})


def values(*owners):
    return [variable.numpy() for owner in owners for variable in owner.variables]


def assert_same(first, second):
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)


def listing(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def damage(path, how):
    if how == "empty":
        path.write_bytes(b"")
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:1000])
    elif how == "flipped":
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(bytes(content))
    elif how == "deleted":
        path.unlink()


@pytest.mark.parametrize(
    ("variant", "kind"), [*((variant, "latest") for variant in TRAINED_WHOLE), ("sequential", "best")]
)
def test_both_checkpoints_restore_bit_identically(variant, kind, tmp_path):
    model, optimizer, checkpoints = make(variant, tmp_path)
    step(model, optimizer)
    optimizer.learning_rate.assign(2e-4)
    getattr(checkpoints, f"save_{kind}")(state(3))

    again, other_optimizer, reopened = make(variant, tmp_path, seed=1)
    assert reopened.restore() == state(3)
    assert_same(values(model, optimizer), values(again, other_optimizer))
    step(model, optimizer, seed=5)
    step(again, other_optimizer, seed=5)
    assert_same(values(model, optimizer), values(again, other_optimizer))


@pytest.mark.parametrize("variant", TRAINED_WHOLE)
def test_best_restores_the_outputs(variant, tmp_path):
    # Outputs are compared: TensorFlow's own checks do not miss a layer that a checkpoint leaves out.
    model, optimizer, checkpoints = make(variant, tmp_path)
    step(model, optimizer)
    checkpoints.save_best(state(1))
    images = np.random.default_rng(1).integers(0, 256, (3, 24, 24, 3), dtype=np.uint8)
    expected = model(images).numpy()
    step(model, optimizer)
    assert (model(images).numpy() != expected).any()

    again, _, _ = make(variant, tmp_path, seed=1)
    assert read_best_state(tmp_path) == state(1)
    assert (again(images).numpy() != expected).any()  # reading the state left the weights alone
    assert restore_best(tmp_path, again) == state(1)
    np.testing.assert_array_equal(again(images).numpy(), expected)


def test_no_checkpoint_is_not_an_error(tmp_path):
    model, _, checkpoints = make("sequential", tmp_path)
    assert checkpoints.restore() is None
    assert restore_best(tmp_path, model) is None
    assert read_best_state(tmp_path) is None
    assert not list(tmp_path.iterdir())


def test_one_best_and_one_latest_are_kept_and_not_overwritten_in_place(tmp_path):
    _, _, checkpoints = make("sequential", tmp_path)
    for epoch in range(1, 4):
        checkpoints.save_latest(state(epoch))
    _, _, reopened = make("sequential", tmp_path)
    reopened.restore()
    reopened.save_latest(state(4))
    assert sorted(path.name for path in (tmp_path / "latest").iterdir()) == [
        "checkpoint",
        "checkpoint-4.data-00000-of-00001",
        "checkpoint-4.index",
    ]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The best of epoch 2 and the latest of epoch 3, with the weights of each."""
    folder = tmp_path_factory.mktemp("saved")
    model, optimizer, checkpoints = make("sequential", folder)
    step(model, optimizer)
    checkpoints.save_best(state(2))
    best = values(model)
    step(model, optimizer, seed=1)
    checkpoints.save_latest(state(3))
    return folder, {"best": best, "latest": values(model)}


@pytest.fixture
def copied(saved, tmp_path):
    folder, weights = saved
    shutil.copytree(folder, tmp_path / "copy")
    return tmp_path / "copy", weights


def read(folder):
    model, _, _ = make("sequential", folder, seed=7)
    return restore_best(folder, model), model


@pytest.mark.parametrize("how", ["deleted", "empty", "garbage"])
def test_checkpoint_state_file_is_not_needed(copied, how):
    folder, weights = copied
    for kind in ("best", "latest"):
        damage(folder / kind / "checkpoint", how)
        if how == "garbage":
            (folder / kind / "checkpoint").write_bytes(b'model_checkpoint_path: "checkpoint-7"\n\xff')
    before = listing(folder)
    found, model = read(folder)
    assert found == state(2)
    assert_same(values(model), weights["best"])
    again, _, reopened = make("sequential", folder, seed=1)
    assert reopened.restore() == state(3)
    assert_same(values(again), weights["latest"])
    assert listing(folder) == before


@pytest.mark.parametrize("how", ["empty", "truncated", "flipped", "deleted"])
@pytest.mark.parametrize("file", ENDINGS)
def test_a_damaged_best_is_replaced_by_the_latest_with_a_warning(copied, caplog, file, how):
    folder, weights = copied
    damage(folder / "best" / f"checkpoint-1.{file}", how)
    before = listing(folder)
    found, model = read(folder)
    assert found == state(3)
    assert_same(values(model), weights["latest"])
    assert re.search(r"best.*; using the latest, .*latest/checkpoint-1, of epoch 3, instead", caplog.text)
    assert listing(folder) == before  # reading wrote nothing and deleted nothing


@pytest.mark.parametrize("how", ["empty", "truncated", "flipped", "deleted"])
@pytest.mark.parametrize("file", ENDINGS)
def test_a_damaged_latest_is_replaced_by_the_best_and_nothing_is_lost(copied, caplog, file, how):
    folder, weights = copied
    damage(folder / "latest" / f"checkpoint-1.{file}", how)
    before = listing(folder)
    model, _, checkpoints = make("sequential", folder, seed=1)
    assert checkpoints.restore() == state(2)
    assert_same(values(model), weights["best"])
    if (folder / "latest" / "checkpoint-1.data-00000-of-00001").exists():
        assert re.search(r"latest/checkpoint-1 is damaged \(.+\); using .*best/checkpoint-1, of epoch 2", caplog.text)
    after = listing(folder)
    assert {name: after[name] for name in before if name.name != "checkpoint"} == {
        name: content for name, content in before.items() if name.name != "checkpoint"
    }
    # The best was saved as the latest, and the damaged file is not reported again.
    caplog.clear()
    assert make("sequential", folder)[2].restore() == state(2)
    assert not caplog.text


def test_lost_best_is_restored_from_the_latest(copied):
    folder, weights = copied
    shutil.rmtree(folder / "best")
    make("sequential", folder)[2].restore()
    found, model = read(folder)
    assert found == state(3)
    assert_same(values(model), weights["latest"])


def test_error_names_every_damaged_checkpoint(copied):
    folder, _ = copied
    for kind in ("best", "latest"):
        damage(folder / kind / "checkpoint-1.data-00000-of-00001", "flipped")
    before = listing(folder)
    match = r"no checkpoint is usable.*(best|latest)/checkpoint-1 is damaged.*(best|latest)/checkpoint-1 is damaged"
    with pytest.raises(RunError, match=match):
        read(folder)
    with pytest.raises(RunError, match=match):
        make("sequential", folder)[2].restore()
    assert listing(folder) == before


def test_other_files_are_never_deleted(copied):
    folder, _ = copied
    latest = folder / "latest"
    for ending in ENDINGS:
        shutil.copy(latest / f"checkpoint-1.{ending}", latest / f"checkpoint-1-of-monday.{ending}")
        (latest / f"checkpoint-2.{ending}").write_bytes(b"half")  # a save that was killed, by an earlier version
        (latest / f"checkpoint-9.{ending}.bak").write_bytes(b"backup")
    others = {name: content for name, content in listing(latest).items() if not name.match("checkpoint-1.*")}
    others.pop(Path("checkpoint"))
    _, _, checkpoints = make("sequential", folder)
    assert checkpoints.restore() == state(3)
    checkpoints.save_latest(state(4))
    checkpoints.save_latest(state(5))
    after = listing(latest)
    assert {name: after[name] for name in others} == others
    assert not (latest / "checkpoint-1.index").exists()  # ours
    assert make("sequential", folder)[2].restore() == state(5)


def test_newest_complete_checkpoint_is_found_by_content(copied):
    folder, _ = copied
    for ending in ENDINGS:
        (folder / "best" / f"checkpoint-1.{ending}").rename(folder / "latest" / f"checkpoint-8.{ending}")
    assert make("sequential", folder)[2].restore() == state(3)


def test_run_is_resumed_from_a_best_newer_than_the_latest(copied, caplog):
    """As after a kill between the two saves of an epoch."""
    folder, _ = copied
    model, optimizer, checkpoints = make("sequential", folder)
    checkpoints.restore()
    step(model, optimizer)
    checkpoints.save_best(state(4))
    again, other_optimizer, reopened = make("sequential", folder, seed=1)
    assert reopened.restore() == state(4)
    assert_same(values(model, optimizer), values(again, other_optimizer))
    assert not caplog.text


def test_checkpoint_can_be_read_while_training_replaces_it(copied, monkeypatch):
    folder, _ = copied
    _, _, checkpoints = make("sequential", folder)
    checkpoints.restore()
    load = tf.train.load_checkpoint
    epochs = iter(range(3, 6))

    def replace_then_load(path):
        if (epoch := next(epochs, None)) is not None:
            monkeypatch.setattr("tensorflow.train.load_checkpoint", load)
            checkpoints.save_best(state(epoch))
            monkeypatch.setattr("tensorflow.train.load_checkpoint", replace_then_load)
        return load(path)

    monkeypatch.setattr("tensorflow.train.load_checkpoint", replace_then_load)
    assert read_best_state(folder) == state(5)


def test_checkpoint_of_another_network_is_rejected(copied):
    folder, _ = copied
    model, _, checkpoints = make("sequential", folder, classes=5)
    with pytest.raises(RunError, match="another model"):
        restore_best(folder, model)
    with pytest.raises(RunError, match="another model"):
        checkpoints.restore()


def test_best_checkpoint_of_an_earlier_version_is_read(tmp_path):
    """It held the weights, and the figures of its epoch as its whole state."""
    model, _, _ = make("sequential", tmp_path)
    figures = dataclasses.asdict(state(1).history[0])
    earlier = tf.train.Checkpoint(weights=model.variables, state=tf.Variable(json.dumps(figures)))
    tf.train.CheckpointManager(earlier, str(tmp_path / "best"), max_to_keep=1, checkpoint_name="checkpoint").save()
    found, again = read(tmp_path)
    assert found.history == state(1).history
    assert_same(values(model), values(again))


def test_checkpoint_is_synced_before_its_predecessor_is_deleted(copied, monkeypatch):
    folder, _ = copied
    _, _, checkpoints = make("sequential", folder)
    checkpoints.restore()
    calls = []
    fsync, unlink, rename = os.fsync, Path.unlink, Path.rename

    def record_fsync(descriptor):
        calls.append(("fsync", Path(f"/proc/self/fd/{descriptor}").readlink()))
        fsync(descriptor)

    def record_rename(path, target):
        calls.append(("rename", Path(target)))
        return rename(path, target)

    def record_unlink(path, missing_ok=False):
        calls.append(("unlink", path))
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(Path, "rename", record_rename)
    monkeypatch.setattr(Path, "unlink", record_unlink)
    latest = folder / "latest"
    checkpoints.save_latest(state(4))
    contents = [calls.index(("fsync", latest / ".partial" / f"checkpoint-2.{end}")) for end in ENDINGS]
    renames = [calls.index(("rename", latest / f"checkpoint-2.{end}")) for end in ENDINGS]
    folder_synced = calls.index(("fsync", latest))
    deletions = [calls.index(("unlink", latest / f"checkpoint-1.{end}")) for end in ENDINGS]
    assert max(contents) < min(renames)
    assert max(renames) < folder_synced
    assert folder_synced < min(deletions)


def test_full_disk_keeps_the_previous_checkpoint(copied, monkeypatch):
    folder, _ = copied
    _, _, checkpoints = make("sequential", folder)
    checkpoints.restore()
    before = listing(folder)

    def fail(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="No space left"):
            checkpoints.save_latest(state(4))
    assert listing(folder) == before
    assert make("sequential", folder)[2].restore() == state(3)


@pytest.fixture
def ext4(tmp_path):
    """A file system in a file: a copy of the file, taken while it is mounted, is what a power cut leaves on a disk."""
    image, folder = tmp_path / "disk.img", tmp_path / "disk"
    folder.mkdir()
    with image.open("wb") as file:
        file.truncate(32 * 2**20)
    for command in (["mkfs.ext4", "-q", "-F", image], ["mount", "-o", "loop", image, folder]):
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError as error:
            pytest.skip(f"an ext4 file system cannot be made: {error}")
        if done.returncode != 0:
            pytest.skip(f"mounting a file system needs rights this user lacks: {done.stderr.strip()}")
    yield image, folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_checkpoint_survives_a_power_failure(ext4, tmp_path):
    image, disk = ext4
    model, optimizer, checkpoints = make("sequential", disk / "runs" / "run")
    cuts = []
    for epoch in range(1, 4):
        step(model, optimizer, seed=epoch)
        checkpoints.save_best(state(epoch))
        checkpoints.save_latest(state(epoch))
        cut = tmp_path / f"cut{epoch}.img"
        subprocess.run(["cp", "--sparse=always", image, cut], check=True)
        cuts.append((epoch, cut, values(model, optimizer)))
    after = tmp_path / "after"
    after.mkdir()
    for epoch, cut, expected in cuts:
        subprocess.run(["mount", "-o", "loop", cut, after], check=True)
        try:
            for kind in ("best", "latest"):
                alone = tmp_path / f"{kind}{epoch}"
                shutil.copytree(after / "runs" / "run" / kind, alone / kind)
                again, other_optimizer, reopened = make("sequential", alone, seed=9)
                assert reopened.restore() == state(epoch)
                assert_same(values(again, other_optimizer), expected)
        finally:
            subprocess.run(["umount", "-l", after], check=True)
