"""Shards have the pixels of the folder they were written from, and are whole or not there."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from training.config import TrainingConfig
from training.data import load_dataset
from training.data.image_folder import load_image_folder
from training.data.image_reading import read_image
from training.data.shapes import draw_shapes
from training.data.shard_writer import write_shards
from training.data.shards import load_shards
from training.errors import DatasetError, StorageFullError

PROJECT = Path(__file__).parents[3]
COUNT = 60


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of different sizes and formats, some of them rotated by their EXIF data."""
    folder = tmp_path_factory.mktemp("sources") / "my pets"
    drawn = draw_shapes(COUNT, seed=0)
    exif = Image.Exif()
    exif[0x0112] = 6
    for number, (image, label) in enumerate(zip(drawn.images, drawn.labels, strict=True)):
        path = folder / f"class{label % 3}" / f"{number:03}"
        path.parent.mkdir(parents=True, exist_ok=True)
        if number % 2:
            Image.fromarray(image).save(path.with_suffix(".png"))
        else:
            Image.fromarray(image[:24]).save(path.with_suffix(".jpg"), exif=exif)
    return folder


@pytest.fixture(scope="module")
def shards(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("written") / "shards"
    written = write_shards(pictures, out, image_size=(40, 36), shard_bytes=20_000)
    assert (written.folder, written.images) == (out, COUNT)
    assert written.shards == len(list(out.glob("*.tfrecord"))) > 3
    return out


@pytest.fixture
def copied(shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shards, tmp_path / "copy"))


@pytest.mark.parametrize("stream", [False, True])
def test_shards_are_the_folder(pictures: Path, shards: Path, stream: bool) -> None:
    expected = load_image_folder(pictures, image_size=(40, 36), seed=0)
    config = TrainingConfig(dataset="folder", data=shards, stream=stream)
    found = load_dataset(config)
    assert isinstance(found.train.images, np.ndarray) != stream
    for split, of_folder in ((found.train, expected.train), (found.test, expected.test)):
        np.testing.assert_array_equal(split.images[:], of_folder.images)
        np.testing.assert_array_equal(split.labels, of_folder.labels)
    assert found.content_hash == expected.content_hash
    assert (found.name, found.class_names) == ("my pets", expected.class_names)
    assert found.source == f"{shards}, written from {expected.source}"


def test_other_programs_read_the_records(pictures: Path, shards: Path) -> None:
    manifest = json.loads((shards / "manifest.json").read_text())
    labels = {"train": [], "test": []}  # type: dict[str, list[int]]
    for file in manifest["files"]:
        count = 0
        for record in tf.data.TFRecordDataset(str(shards / file["name"])):  # verifies the checksums
            feature = tf.train.Example.FromString(record.numpy()).features.feature
            values = {name: value.bytes_list.value or value.int64_list.value for name, value in feature.items()}
            ((encoded,), (label,), (text,), (name,)) = (
                values[key] for key in ("image/encoded", "image/class/label", "image/class/text", "image/filename")
            )
            assert manifest["class_names"][label] == text.decode()
            pixels = tf.io.decode_png(encoded).numpy()
            np.testing.assert_array_equal(pixels, read_image(pictures / name.decode(), image_size=(40, 36)))
            labels[file["split"]].append(label)
            count += 1
        assert count == file["images"]
    assert {split: len(values) for split, values in labels.items()} == manifest["splits"]
    found = load_shards(shards, image_size=None, stream=True)
    assert (found.train.labels.tolist(), found.test.labels.tolist()) == (labels["train"], labels["test"])


def test_a_damaged_record_is_named(copied: Path) -> None:
    manifest = json.loads((copied / "manifest.json").read_text())
    first, path = manifest["files"][0]["images"], copied / manifest["files"][1]["name"]
    content = bytearray(path.read_bytes())
    place = content.index(b"IDAT", content.index(b"IDAT") + 4) + 20  # in the second record's pixels
    content[place] ^= 1
    path.write_bytes(content)
    found = load_shards(copied, image_size=None, stream=True)
    assert found.train.images[first].shape == (40, 36, 3)
    with pytest.raises(DatasetError, match=rf"^{path} is damaged: record 1, at byte [\d,]+, has another checksum"):
        found.train.images[first + 1]


def cut(path: Path, count: int) -> None:
    path.write_bytes(path.read_bytes()[:-count])


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        (
            "train-00001.tfrecord",
            lambda path: cut(path, 5),
            "is cut off or altered: it has",
        ),
        ("train-00001.tfrecord", Path.unlink, r"train-00001.tfrecord cannot be read: No such file"),
        ("index.npz", Path.unlink, r"index.npz cannot be read: No such file"),
        (
            "index.npz",
            lambda path: cut(path, 50),
            "has a damaged manifest.json or index.npz",
        ),
        ("manifest.json", Path.unlink, r"manifest.json cannot be read: No such file.* shard SOURCE --out FOLDER"),
        ("manifest.json", lambda path: path.write_text("{"), "has a damaged manifest.json or index.npz"),
        ("manifest.json", lambda path: path.write_text('{"format": "2"}'), "has shards of another format, 2: expected"),
    ],
)
def test_incomplete_shards_are_refused_before_training(copied: Path, name: str, damage, message: str) -> None:
    damage(copied / name)
    with pytest.raises(DatasetError, match=message):
        load_dataset(TrainingConfig(dataset="folder", data=copied, stream=True))


def test_shards_have_one_size(shards: Path) -> None:
    assert load_shards(shards, image_size=(40, 36), stream=True).train.images.shape[1:] == (40, 36, 3)
    with pytest.raises(DatasetError, match="have 40x36 pixels, not 32x32: leave out --image-size"):
        load_shards(shards, image_size=(32, 32), stream=True)


def test_unreadable_images_leave_no_shards(pictures: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(pictures, tmp_path / "source"))
    path = next((source / "class0").glob("*.jpg"))
    path.write_bytes(b"no image")
    with pytest.raises(DatasetError, match=rf"1 of 60 files are not usable.*\n.*class0/{path.name}"):
        write_shards(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_target_in_use_is_refused(pictures: Path, shards: Path) -> None:
    with pytest.raises(DatasetError, match="exists: name another folder"):
        write_shards(pictures, shards)
    with pytest.raises(DatasetError, match="whose folders are classes: name a folder outside"):
        write_shards(pictures, pictures / "shards")


def test_stream_is_for_folders() -> None:
    with pytest.raises(ValueError, match="stream is for the dataset folder: the images of shapes fit into memory"):
        TrainingConfig(dataset="shapes", stream=True)


def start(pictures: Path, out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "training", "shard", str(pictures), "--out", str(out), "--image-size", "1000x1000"]
    return subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_records(process: subprocess.Popen[str], partial: Path) -> None:
    limit_s = time.monotonic() + 200
    while not any(path.stat().st_size for path in partial.glob("*.tfrecord")):
        assert process.poll() is None
        assert time.monotonic() < limit_s
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_command_leaves_no_shards(pictures: Path, tmp_path: Path, number: signal.Signals) -> None:
    out, partial = tmp_path / "out", tmp_path / ".out.partial"
    with start(pictures, out) as process:
        wait_for_records(process, partial)
        with pytest.raises(DatasetError, match=f"another process is writing {out}"):
            write_shards(pictures, out)
        process.send_signal(number)
        _, errors = process.communicate()
    assert not out.exists()
    if number == signal.SIGINT:
        assert (process.returncode, errors.strip()) == (130, "interrupted")
        assert not partial.exists()
    write_shards(pictures, out)
    assert len(load_shards(out, image_size=None, stream=True).train.labels) == COUNT - 6
    assert not partial.exists()


def test_a_full_disk_is_explained_and_leaves_nothing(pictures: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True, text=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"mounting a file system needs rights this user lacks: {mounted.stderr.strip()}")
    try:
        with pytest.raises(StorageFullError, match=f"^disk full: cannot write {disk / 'out'}. Free some space"):
            write_shards(pictures, disk / "out", image_size=(1000, 1000))
        assert not list(disk.iterdir())
    finally:
        subprocess.run(["umount", "-l", disk], check=True)
