"""Streamed images are the images of an array, in the same order, and few of them are in memory."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from training.data import Split
from training.data.image_folder import list_image_folder, load_image_folder
from training.data.input_pipeline import Parts, evaluation_batches, split_validation, steps_per_epoch, training_batches
from training.data.shapes import draw_shapes
from training.data.streamed_images import ImageSource, StreamedImages, explain_unreadable, read_batches
from training.errors import DatasetError
from training.models.presets import Augmentation

PROJECT = Path(__file__).parents[3]


class Recorder:
    """A source of the images of an array that records which ones were read."""

    def __init__(self, images: np.ndarray) -> None:
        self.positions: list[int] = []
        self._images = images
        self._lock = threading.Lock()
        self.streamed = StreamedImages(ImageSource(images.shape[1:3], self._read), np.arange(len(images)))

    def _read(self, position: int) -> np.ndarray:
        with self._lock:
            self.positions.append(position)
        image: np.ndarray = self._images[position]
        return image


@pytest.fixture(scope="module")
def drawn() -> Split:
    return draw_shapes(90, seed=0)


def streamed(split: Split) -> Split:
    return Split(Recorder(split.images).streamed, split.labels)


def assert_equal_batches(first: tf.data.Dataset, second: tf.data.Dataset, *, count: int) -> None:
    pairs = list(zip(itertools.islice(first, count), itertools.islice(second, count), strict=True))
    assert len(pairs) == count
    for (images, labels), (other_images, other_labels) in pairs:
        np.testing.assert_array_equal(images, other_images)
        np.testing.assert_array_equal(labels, other_labels)


def test_indexing_is_that_of_an_array(drawn: Split) -> None:
    images = Recorder(drawn.images).streamed
    assert (images.shape, len(images)) == (drawn.images.shape, 90)
    some = np.array([7, 3, 3, 80])
    for index in (5, -1, slice(4, 9), slice(80, 200), some, drawn.labels == 2):
        np.testing.assert_array_equal(images[index], drawn.images[index])
    np.testing.assert_array_equal(images.select(some)[1:], drawn.images[some][1:])
    np.testing.assert_array_equal(np.concatenate(list(read_batches(images, 40))), drawn.images)
    np.testing.assert_array_equal(np.asarray(images), drawn.images)


def test_splitting_reads_nothing(drawn: Split) -> None:
    recorder = Recorder(drawn.images)
    kept, validation = split_validation(Split(recorder.streamed, drawn.labels), seed=3)
    assert not recorder.positions
    for split, expected in zip((kept, validation), split_validation(drawn, seed=3), strict=True):
        np.testing.assert_array_equal(split.images[:], expected.images)
        np.testing.assert_array_equal(split.labels, expected.labels)


@pytest.mark.parametrize("augmentation", [None, Augmentation(max_shift=2, cutout=8)])
def test_batches_equal_those_in_memory(drawn: Split, augmentation: Augmentation | None) -> None:
    options = {"batch_size": 16, "seed": 1, "first_epoch": 0, "augmentation": augmentation}
    count = 2 * steps_per_epoch(drawn, 16)
    assert_equal_batches(
        training_batches(streamed(drawn), **options),  # type: ignore[arg-type]
        training_batches(drawn, **options),  # type: ignore[arg-type]
        count=count,
    )
    parts = Parts(4, range(1, 3))
    in_memory = evaluation_batches(drawn, batch_size=20, parts=parts)
    batches = evaluation_batches(streamed(drawn), batch_size=20, parts=parts)
    assert_equal_batches(batches, in_memory, count=len(list(in_memory)))


@pytest.mark.parametrize("cores", [1, 16])
def test_images_are_read_a_few_batches_ahead(drawn: Split, cores: int) -> None:
    images = np.repeat(drawn.images, 20, axis=0)
    recorder = Recorder(images)
    split = Split(recorder.streamed, np.repeat(drawn.labels, 20))
    options = tf.data.Options()
    options.autotune.cpu_budget = options.threading.private_threadpool_size = cores
    batches = training_batches(split, batch_size=10, seed=0, first_epoch=0).with_options(options)
    for number, _ in enumerate(itertools.islice(batches, 100), start=1):
        if number % 10 == 0:
            time.sleep(0.05)  # a slow model: what may be read ahead is
        assert len(recorder.positions) <= 10 * (number + 6)  # of 1,800: four that wait, two that are read


def test_each_worker_reads_its_part_of_every_batch(drawn: Split) -> None:
    images: list[bytes] = []
    for index in range(3):
        recorder = Recorder(drawn.images)
        split = Split(recorder.streamed, drawn.labels)
        batches = training_batches(split, batch_size=12, seed=0, first_epoch=0, parts=Parts(3, range(index, index + 1)))
        for number, (batch, _) in enumerate(itertools.islice(batches, steps_per_epoch(split, 12)), start=1):
            images += [image.tobytes() for image in batch.numpy()]
            assert len(recorder.positions) <= 4 * (number + 6)  # a third of each batch; some are read ahead
    assert sorted(images) == sorted(image.tobytes() for image in drawn.images)


def test_an_unreadable_image_ends_training_with_its_own_error(drawn: Split) -> None:
    def fail(position: int) -> np.ndarray:
        raise DatasetError(f"cat{position}.png is gone")

    images = StreamedImages(ImageSource((32, 32), fail), np.array([4]))
    batches = training_batches(Split(images, drawn.labels[:1]), batch_size=1, seed=0, first_epoch=0)
    with pytest.raises(DatasetError, match=r"^cat4.png is gone$"), explain_unreadable(images):
        next(iter(batches))
    with pytest.raises(ValueError, match="other"), explain_unreadable(drawn.images):
        raise ValueError("other")


def save(image: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


@pytest.fixture
def pictures(drawn: Split, tmp_path: Path) -> Path:
    for number, (image, label) in enumerate(zip(drawn.images, drawn.labels, strict=True)):
        # Different sizes, so that all are resized.
        save(image if number % 2 else image[:30], tmp_path / "pets" / f"class{label % 3}" / f"{number:03}.png")
    return tmp_path / "pets"


def test_a_streamed_folder_is_the_folder(pictures: Path) -> None:
    in_memory, stream = (
        load_image_folder(pictures, image_size=None, seed=0, stream=stream) for stream in (False, True)
    )
    for split, expected in ((stream.train, in_memory.train), (stream.test, in_memory.test)):
        assert isinstance(split.images, StreamedImages)
        assert split.images.shape[1:] == (96, 96, 3)
        np.testing.assert_array_equal(split.images[:], expected.images)
        np.testing.assert_array_equal(split.labels, expected.labels)
    assert stream.content_hash == in_memory.content_hash
    assert (stream.name, stream.source, stream.class_names) == (in_memory.name, in_memory.source, in_memory.class_names)


def test_a_streamed_folder_is_checked_before_training(pictures: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = min((pictures / "class1").iterdir())
    content = path.read_bytes()
    path.with_name("copy.png").write_bytes(content)
    copies = {"copy.png", path.name}
    seed = next(
        seed
        for seed in range(100)
        if len(copies & {file.name for file in list_image_folder(pictures, seed=seed).test}) == 1  # one is a test image
    )
    load_image_folder(pictures, image_size=None, seed=seed, stream=True)
    assert "1 of the 10 test images" in caplog.text
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DatasetError, match=rf"1 of 91 files .*\n.*class1/{path.name}.*damaged or cut off"):
        load_image_folder(pictures, image_size=None, seed=0, stream=True)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_images(tmp_path: Path) -> None:
    """The images take 246 MB when they are decoded, and few of them are at a time."""
    for label in range(4):
        first = tmp_path / "flat" / str(label) / "0.png"
        save(np.full((128, 128, 3), 60 * label, np.uint8), first)
        for number in range(1, 1250):
            os.link(first, first.with_name(f"{number}.png"))
    command = [
        sys.executable,
        "-m",
        "tests.training.data.streaming_memory",
        str(tmp_path / "flat"),
        str(tmp_path / "out"),
    ]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    measured = json.loads(done.stdout.splitlines()[-1])
    assert measured["decoded"] > 240e6
    assert measured["growth"] < measured["decoded"] / 2, measured
