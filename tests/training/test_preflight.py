"""Checks before the first training step, and the numbers in their messages."""

import os
import shutil
from pathlib import Path

import keras
import numpy as np
import pytest
from PIL import Image

from training import memory
from training.config import TrainingConfig
from training.data import Dataset, Split
from training.data.image_folder import load_image_folder
from training.errors import ExportError, MemoryTooSmallError, StorageFullError
from training.memory import available_bytes, checkpoint_bytes
from training.models import build_model
from training.preflight import check_free_space, check_memory, check_model_name, check_models_folder


def dataset(count=20, height=32, width=32):
    images = np.zeros((count, height, width, 3), np.uint8)
    split = Split(images, np.arange(count, dtype=np.int64) % 2)
    return Dataset("pets", "made", ("cat", "dog"), split, Split(images[:2], split.labels[:2]))


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("my pictures (2)", "my-pictures-2"),
        ("a/b", "a-b"),
        (".hidden", "hidden"),
        ("caf\udce9", "caf"),
        ("x" * 250, "x" * 40),
        ("?", "NAME"),
    ],
)
def test_invalid_model_name_error_suggests_a_valid_name(name, suggestion):
    with pytest.raises(ExportError, match=rf"is not a valid model name.*--name {suggestion}$"):
        check_model_name(name)


@pytest.mark.parametrize("name", ["pets", "größe", "v1.2_b-3"])
def test_valid_model_names_are_accepted(name):
    check_model_name(name)


def test_models_folder_check_leaves_no_files(tmp_path):
    check_models_folder(tmp_path / "models", "pets")
    assert not list(tmp_path.iterdir())
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "pets").write_text("in the way")
    with pytest.raises(ExportError, match=r"models/pets is not a writable folder .*--models-dir"):
        check_models_folder(tmp_path / "models", "pets")
    with pytest.raises(ExportError, match="not a writable folder"):
        check_models_folder(Path("/proc/models"), "pets")


@pytest.mark.parametrize(
    ("variant", "height", "width"), [("sequential", 40, 57), ("airbench", 33, 40), ("transfer", 24, 40)]
)
def test_checkpoint_size_estimate_matches_its_tensors(variant, height, width):
    config = TrainingConfig.fill_in(variant=variant)
    model = build_model(variant, (height, width, 3), classes=7)
    optimizer = config.recipe.make_optimizer(config, steps_per_epoch=1)
    optimizer.build(model.trainable_variables)
    tensors = (*model.variables, *optimizer.variables)
    exact = sum(keras.ops.convert_to_numpy(variable).nbytes for variable in tensors)
    assert exact <= checkpoint_bytes(config, (height, width, 3), classes=7) <= 1.05 * exact + 2**16


def test_too_little_memory_error_has_the_numbers(monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda: 2**30)
    check_memory(TrainingConfig(), dataset())
    with pytest.raises(MemoryTooSmallError) as error:
        check_memory(TrainingConfig(batch_size=64), dataset(4, 600, 800))
    text = str(error.value)
    assert "4 training images of 600x800 (11.0 MiB)" in text
    assert "the network with a batch of 64 (" in text
    assert "1.0 GiB are available" in text
    assert "--batch-size" in text
    with pytest.raises(MemoryTooSmallError, match=r"network with a batch of 1 \("):  # its Dense layer alone
        check_memory(TrainingConfig(batch_size=1), dataset(4, 1500, 2000))


def test_features_that_are_kept_count_as_memory_and_as_disk_space(tmp_path, monkeypatch):
    config, images = TrainingConfig.fill_in(variant="transfer", batch_size=1), dataset(10_000, 1, 1)
    features = 4 * 576 * 10_000  # 22 MiB
    monkeypatch.setattr(memory, "available_bytes", lambda: 2 * features)
    with pytest.raises(MemoryTooSmallError, match=r"of 1x1 \(0\.1 MiB\), their features \(43\.9 MiB\) and the network"):
        check_memory(config, images)
    monkeypatch.setattr(memory, "available_bytes", lambda: 2 * features + 2**23)
    check_memory(config, images)

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=features))
    with pytest.raises(StorageFullError, match="the run needs about 3"):
        check_free_space(config, images, run_folder=tmp_path, models_dir=None)
    (tmp_path / "features").mkdir()
    (tmp_path / "features" / "part.npy").write_bytes(bytes(features))
    check_free_space(config, images, run_folder=tmp_path, models_dir=None)


def test_error_for_images_larger_than_memory_has_the_numbers(tmp_path, monkeypatch):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for number in range(3):
            Image.new("RGB", (400, 300)).save(tmp_path / name / f"{number}.png")
    monkeypatch.setattr(memory, "available_bytes", lambda: 2**20)
    with pytest.raises(
        MemoryTooSmallError, match=r"6 images of 300x400, .*, need about 4\.1 MiB of memory, and 1\.0 MiB are available"
    ):
        load_image_folder(tmp_path, image_size=(300, 400), seed=0)


def test_available_memory_is_the_least_of_machine_limit_and_control_groups(tmp_path):
    def write(path, text):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    assert available_bytes(tmp_path) is None
    write("proc/meminfo", "MemTotal: 100 kB\nMemAvailable: 50 kB\n")
    assert available_bytes(tmp_path) == 50 * 1024
    write("proc/self/statm", "3 1 1 1 0 1 0\n")
    for limit, available in (("unlimited", 50 * 1024), (str(3 * os.sysconf("SC_PAGE_SIZE") + 20000), 20000)):
        write("proc/self/limits", f"Limit Soft Hard Units\nMax address space   {limit}   unlimited   bytes\n")
        assert available_bytes(tmp_path) == available
    write("proc/self/cgroup", "0::/box/inner\n")
    write("sys/fs/cgroup/box/memory.max", "40000\n")
    write("sys/fs/cgroup/box/memory.current", "30000\n")
    write("sys/fs/cgroup/box/memory.stat", "anon 20000\ninactive_file 5000\n")
    write("sys/fs/cgroup/box/inner/memory.max", "max\n")
    assert available_bytes(tmp_path) == 15000
    write("proc/self/cgroup", "9:memory:/old\n")
    write("sys/fs/cgroup/memory/old/memory.limit_in_bytes", "9000\n")
    write("sys/fs/cgroup/memory/old/memory.usage_in_bytes", "8000\n")
    write("sys/fs/cgroup/memory/old/memory.stat", "inactive_file 0\n")
    assert available_bytes(tmp_path) == 1000


def test_too_little_disk_space_error_has_the_numbers(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    run, models = tmp_path / "runs" / "r", tmp_path / "models"

    def check(free, models_dir):
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free))
        check_free_space(TrainingConfig(), dataset(), run_folder=run, models_dir=models_dir)

    # A checkpoint of 32x32 pixels has 1.3 MB; the report has 4 MiB; the export is as large as the weights twice.
    check(9 * 2**20, None)
    with pytest.raises(StorageFullError, match=r"about 7\.\d MiB .* 3\.0 MiB are free"):
        check(3 * 2**20, None)
    with pytest.raises(StorageFullError, match=r"about 1\d\.\d MiB .*models, and 9\.0 MiB are free"):
        check(9 * 2**20, models)
    (run / "checkpoints" / "best").mkdir(parents=True)
    (run / "checkpoints" / "best" / "checkpoint-1.data").write_bytes(bytes(2**21))
    check(7 * 2**20, None)  # what is there already need not be written
    assert not os.path.lexists(models)


def test_there_are_as_many_decoding_threads_as_large_images_fit_into_memory(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    for available, threads in ((None, 128), (10**12, 128), (2 * 2**30, 4), (1000, 1)):
        monkeypatch.setattr(memory, "available_bytes", lambda available=available: available)
        assert memory.count_decoding_threads(per_core=2) == threads
