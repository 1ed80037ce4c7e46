import logging
import os
import pty
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from training import memory
from training.config import TrainingConfig
from training.data import load_dataset
from training.data.image_folder import load_image_folder
from training.errors import DatasetError, MemoryTooSmallError


def save(path, *, size=(32, 32), colour=(200, 30, 60)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def remove(*folders):
    for folder in folders:
        shutil.rmtree(folder)


def make_classes(folder, *, classes=("cat", "dog"), count=4, size=(32, 32), blue=99):
    """One level of folders, by class; every picture has a colour of its own."""
    for number, name in enumerate(classes):
        for image in range(count):
            save(folder / name / f"{image}.png", size=size, colour=(80 * number, 10 * image, blue))
    return folder


def make_splits(folder, **options):
    for number, split in enumerate(("train", "test")):
        make_classes(folder / split, blue=99 + number, **options)
    return folder


def load(folder, *, image_size=None, seed=0):
    return load_dataset(TrainingConfig(dataset="folder", data=folder, image_size=image_size, seed=seed))


def refusal(folder, **options):
    with pytest.raises(DatasetError) as error:
        load(folder, **options)
    return str(error.value)


def test_train_and_test_by_class(tmp_path):
    folder = make_classes(tmp_path / "pets" / "train")
    make_classes(tmp_path / "pets" / "test", count=1)
    dataset = load(folder.parent)
    assert dataset.name == "pets"
    assert dataset.source == str(tmp_path / "pets")
    assert dataset.class_names == ("cat", "dog")
    assert dataset.train.images.shape == (8, 32, 32, 3)
    assert dataset.train.labels.tolist() == [0] * 4 + [1] * 4
    assert dataset.train.images[5, 0, 0].tolist() == [80, 10, 99]
    assert dataset.test.images.shape == (2, 32, 32, 3)
    assert dataset.test.labels.tolist() == [0, 1]


def test_single_level_folder_is_split_by_class_and_seed(tmp_path):
    folder = make_classes(tmp_path / "pets", count=20)
    dataset, again, other = (load(folder, seed=seed) for seed in (1, 1, 2))
    assert np.bincount(dataset.test.labels).tolist() == [2, 2]
    assert np.bincount(dataset.train.labels).tolist() == [18, 18]
    assert dataset.content_hash == again.content_hash != other.content_hash
    assert "seed 1" in dataset.source
    assert len({image.tobytes() for image in (*dataset.train.images, *dataset.test.images)}) == 40


@settings(max_examples=15, deadline=None)
@given(counts=st.lists(st.integers(3, 25), min_size=2, max_size=4), seed=st.integers(0, 2**31 - 1))
def test_test_split_is_a_tenth_of_each_class(tmp_path_factory, counts, seed):
    folder = tmp_path_factory.mktemp("counts")
    for class_id, count in enumerate(counts):
        make_classes(folder, classes=(f"class{class_id}",), count=count, size=(2, 2))
    dataset = load(folder, seed=seed)
    assert np.bincount(dataset.test.labels).tolist() == [max(1, round(0.1 * count)) for count in counts]
    totals = np.bincount(dataset.test.labels) + np.bincount(dataset.train.labels)
    assert totals.tolist() == counts


def test_files_are_read_in_name_order_with_any_number_of_threads(tmp_path):
    folder = make_splits(tmp_path / "pets", count=20)
    dataset = load(folder)
    names = sorted(str(number) + ".png" for number in range(20))
    assert dataset.train.images[:20, 0, 0, 1].tolist() == [10 * int(name[:-4]) for name in names]


def test_parent_of_a_single_image_folder_is_accepted(tmp_path):
    make_splits(tmp_path / "download" / "pets")
    (tmp_path / "download" / "docs").mkdir()
    assert load(tmp_path / "download").name == "pets"
    make_splits(tmp_path / "download" / "more")
    message = refusal(tmp_path / "download")
    assert "contains 2 image folders" in message
    assert str(tmp_path / "download" / "more") in message


def test_folders_without_images_are_not_classes(tmp_path):
    make_splits(tmp_path / "images")
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"no picture")
    assert load(tmp_path).name == "images"


def test_class_can_be_called_train(tmp_path):
    dataset = load(make_classes(tmp_path / "vehicles", classes=("bus", "car", "train")))
    assert dataset.class_names == ("bus", "car", "train")


def test_train_and_test_folders_without_classes_are_rejected(tmp_path):
    assert "use a folder for each class" in refusal(make_classes(tmp_path, classes=("test", "train")))


def test_files_beside_class_folders_are_ignored(tmp_path):
    folder = make_splits(tmp_path / "pets")
    save(folder / "train" / "overview.png", size=(100, 100))
    (folder / "README.md").write_text("Pets")
    assert len(load(folder).train.labels) == 8


def test_unread_split_is_logged(tmp_path, caplog):
    folder = make_splits(tmp_path / "pets")
    make_classes(folder / "val")
    with caplog.at_level(logging.WARNING):
        load(folder)
    assert caplog.messages == [
        f"of {folder}, only train/ and test/ are read, not val; the validation images are split off from train/"
    ]


def test_any_class_name_is_accepted(tmp_path):
    names = ("Äpfel & Birnen", "a.b", "犬")
    assert load(make_splits(tmp_path / "x", classes=names)).class_names == tuple(sorted(names))


def test_images_of_different_sizes_are_resized_and_logged(tmp_path, caplog):
    folder = make_splits(tmp_path / "pets")
    save(folder / "train" / "dog" / "big.png", size=(60, 40))
    with caplog.at_level(logging.INFO):
        dataset = load(folder)
    (message,) = caplog.messages
    assert "differ in size" in message
    assert "0.png is 32x32" in message
    assert "dog/big.png is 40x60" in message
    assert "all are resized to 96x96; choose another size with --image-size HEIGHTxWIDTH (make: IMAGE_SIZE=)" in message
    assert "\n" not in message
    assert dataset.train.images.shape == (9, 96, 96, 3)
    assert dataset.test.images.shape == (8, 96, 96, 3)
    dataset = load(folder, image_size=(24, 48))
    assert dataset.train.images.shape == (9, 24, 48, 3)


def test_photos_are_larger_for_transfer_learning(tmp_path):
    make_splits(tmp_path / "pets", size=(200, 150))
    config = TrainingConfig.fill_in(variant="transfer", dataset="folder", data=tmp_path / "pets")
    assert load_dataset(config).train.images.shape[1:] == (160, 160, 3)


def test_large_photos_are_resized_and_logged(tmp_path, caplog):
    folder = make_classes(tmp_path / "photos", size=(2000, 1500), count=3)
    with caplog.at_level(logging.INFO):
        dataset = load(folder)
    (message,) = caplog.messages
    assert "the images in" in message
    assert "are large" in message
    assert "is 1500x2000: all are resized to 96x96" in message
    assert dataset.train.images.shape[1:] == (96, 96, 3)


def test_small_images_of_equal_size_are_not_resized(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        assert load(make_classes(tmp_path, size=(128, 100))).train.images.shape[1:] == (100, 128, 3)
        assert load(tmp_path, image_size=(150, 200)).train.images.shape[1:] == (150, 200, 3)
    assert caplog.messages == []


def test_train_and_test_images_have_the_same_size(tmp_path):
    make_classes(tmp_path / "train")
    make_classes(tmp_path / "test", size=(40, 40))
    dataset = load(tmp_path)
    assert dataset.train.images.shape[1:] == dataset.test.images.shape[1:] == (96, 96, 3)


def test_images_below_a_class_folder_belong_to_the_class(tmp_path, caplog):
    for number, batch in enumerate(("batch1", "batch2")):
        for name in ("cat", "dog"):
            make_classes(tmp_path / "pets" / name, classes=(batch,), blue=100 * number + ord(name[0]))
    with caplog.at_level(logging.INFO):
        dataset = load(tmp_path / "pets")
    assert dataset.class_names == ("cat", "dog")
    assert len(dataset.train.labels) + len(dataset.test.labels) == 16
    assert caplog.messages == [
        f"the classes of {tmp_path / 'pets'} are cat, dog; images in folders below them are included"
    ]
    save(tmp_path / "pets" / "cat" / "more" / "deep" / "x.png", colour=(1, 2, 3))
    save(tmp_path / "pets" / "dog" / "y.png", colour=(1, 2, 3))
    dataset = load(tmp_path / "pets")
    assert (dataset.class_names, len(dataset.train.labels) + len(dataset.test.labels)) == (("cat", "dog"), 18)
    for split in ("train", "test"):
        shutil.copytree(tmp_path / "pets", tmp_path / "split" / split)
    assert np.bincount(load(tmp_path / "split").train.labels).tolist() == [9, 9]


def test_links_to_a_parent_folder_are_skipped(tmp_path):
    folder = make_classes(tmp_path / "pets")
    (folder / "cat" / "loop").symlink_to(".")
    (folder / "dog" / "up").symlink_to("../dog")
    (folder / "dog" / "more").symlink_to(make_classes(tmp_path / "elsewhere", classes=("dog",)) / "dog")
    dataset = load(folder)
    assert np.bincount([*dataset.train.labels, *dataset.test.labels]).tolist() == [4, 8]


@pytest.mark.parametrize(
    ("train", "test", "logged"),
    [
        ("Train", "Test", False),
        ("TRAINING", "testing", False),
        ("train", "val", True),
        ("train", "Valid", True),
        ("training", "validation", True),
    ],
)
def test_usual_names_of_splits_are_recognized(tmp_path, caplog, train, test, logged):
    make_classes(tmp_path / train)
    make_classes(tmp_path / test, count=2, blue=50)
    with caplog.at_level(logging.INFO):
        dataset = load(tmp_path)
    assert (dataset.class_names, len(dataset.train.labels), len(dataset.test.labels)) == (("cat", "dog"), 8, 4)
    message = f"{tmp_path} has no test/, so the images of {test}/ are the test images"
    assert caplog.messages == ([message] if logged else [])


def test_two_folders_for_the_same_split_are_rejected(tmp_path):
    for name in ("train", "val", "valid"):
        make_classes(tmp_path / name)
    assert "has val/, valid/ for the same split: keep one" in refusal(tmp_path)


@pytest.mark.parametrize("names", [("Train", "val"), ("train",), ("training", "valid", "test")])
def test_split_folders_without_classes_are_rejected(tmp_path, names):
    assert "use a folder for each class" in refusal(make_classes(tmp_path, classes=names))


def test_unsupported_file_types_are_named(tmp_path):
    for number in range(3):
        for name in ("cat/{}.heic", "dog/{}.HEIC", "dog/more/{}.psd"):
            path = tmp_path / name.format(number)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"no image that is known here")
    message = refusal(tmp_path)
    assert "have unsupported types, .heic (6), .psd (3); expected JPEG, PNG" in message


def test_images_are_known_by_their_content_whatever_their_suffix(tmp_path):
    """Every class has one kind of name only, so that each would be missed where names counted."""
    classes = {"camera": ".jfif", "old": ".jpe", "scan": ".tif", "web": "", "wrong": ".txt"}
    for number, (name, suffix) in enumerate(classes.items()):
        for image in range(3):
            path = tmp_path / name / f"{image}{suffix}"
            path.parent.mkdir(exist_ok=True)
            kind = "JPEG" if suffix.startswith(".j") else "PNG"
            Image.new("RGB", (8, 8), (50 * number, 10 * image, 99)).save(path, kind, quality=100)
    dataset = load(tmp_path)
    assert dataset.class_names == tuple(classes)
    assert np.bincount(dataset.train.labels).tolist() == [2] * 5
    for image, label in zip(dataset.train.images, dataset.train.labels, strict=True):
        assert abs(int(image[0, 0, 0]) - 50 * label) <= 2


def test_images_without_class_folders_are_rejected(tmp_path):
    save(tmp_path / "cat.1.png")
    assert "its images are directly in it; put them into a folder for each class" in refusal(tmp_path)


def test_reading_threads_stop_after_an_error(tmp_path):
    before = set(threading.enumerate())
    folder = make_splits(tmp_path / "pets", count=200, size=(8, 8))
    save(folder / "train" / "cat" / "1.png", size=(9, 9))
    with pytest.raises(DatasetError) as error:
        load_image_folder(folder, image_size=None, seed=0, default_size=None)
    assert set(threading.enumerate()) <= before
    assert "differ in size" in str(error.value)  # and so the error, with all it refers to, was alive until here


def test_damaged_files_are_named(tmp_path):
    folder = make_splits(tmp_path / "pets")
    whole = (folder / "train" / "cat" / "0.png").read_bytes()
    (folder / "train" / "cat" / "half.png").write_bytes(whole[:60])
    (folder / "train" / "dog" / "notes.txt").write_text("not a picture")
    (folder / "test" / "dog" / "empty.png").touch()
    message = refusal(folder)
    assert "3 of 19 files" in message
    assert "train/cat/half.png: the image is damaged or cut off" in message
    assert "train/dog/notes.txt: unknown image format: expected JPEG" in message
    assert "test/dog/empty.png: the file is empty" in message
    for number in range(9):
        (folder / "train" / "dog" / f"empty{number}.jpg").touch()
    message = refusal(folder)
    assert "12 of 28 files" in message
    assert message.endswith("and 7 more")
    assert message.count("\n") == 6


def test_folder_of_damaged_files_is_rejected(tmp_path):
    folder = make_splits(tmp_path / "pets", count=2)
    for path in folder.glob("*/*/*.png"):
        path.write_bytes(b"damaged")
    assert "8 of 8 files" in refusal(folder)


def test_files_of_file_managers_are_skipped(tmp_path):
    folder = make_splits(tmp_path / "pets")
    for name in ("train/cat/.DS_Store", "train/cat/._0.png", "train/cat/Thumbs.db", "test/dog/desktop.ini"):
        (folder / name).write_bytes(b"\0")
    for name in (".cache", "train/.cache", "train/cat/.thumbnails"):
        (folder / name).mkdir()
    for name in ("ehthumbs.db", "Picasa.ini", "Icon\r"):
        (folder / "train" / "dog" / name).write_bytes(b"")
    save(folder / "train" / "@eaDir" / "cat" / "thumbnail.png")
    # An archive made on a Mac has one beside the classes, and its files begin as the images do, not only by name.
    for place in ("__MACOSX", "train/__MACOSX", "train/cat/__MACOSX", "test/dog/__MACOSX"):
        save(folder / place / "cat" / "0.png")
        save(folder / place / "0.png")
    (folder / "train" / "lost+found").mkdir(mode=0)
    dataset = load(folder)
    assert dataset.class_names == ("cat", "dog")
    assert len(dataset.train.labels) == len(dataset.test.labels) == 8


def test_an_archive_made_on_a_mac_has_one_image_folder(tmp_path):
    make_splits(tmp_path / "pets")
    make_splits(tmp_path / "__MACOSX")
    assert load(tmp_path).name == "pets"
    make_classes(tmp_path / "flat")
    make_classes(tmp_path / "flat" / "__MACOSX")
    assert load(tmp_path / "flat").class_names == ("cat", "dog")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "train" / "fox").mkdir(), "lacks the class 'fox'"),
        (lambda f: (f / "test" / "fox").mkdir(), "has the class 'fox', which"),
        (lambda f: shutil.rmtree(f / "test" / "dog"), "lacks the class 'dog'"),
        (lambda f: [(f / s / "fox").mkdir() for s in ("train", "test")], "train has no images in the class 'fox'"),
        (lambda f: [p.unlink() for p in (f / "test" / "dog").iterdir()], "test has no images in the class 'dog'"),
        (lambda f: [(f / s / f"c{n}").mkdir() for s in ("train", "test") for n in range(9)], "'c4' and 4 more"),
        (lambda f: (remove(f / "test"), save(f / "test" / "0.png")), "test are directly in it"),
        (lambda f: shutil.rmtree(f / "test"), "has train/ but no test/"),
        (lambda f: remove(f / "train" / "dog", f / "test" / "dog"), "has one class folder"),
        (lambda f: (f / "train" / "cat" / "gone.png").symlink_to("nowhere"), "gone.png is not a regular file"),
        (lambda f: os.mkfifo(f / "train" / "cat" / "pipe.png"), "pipe.png is not a regular file"),
        (
            lambda f: [(f / "train" / "dog" / f"{n}.png").unlink() for n in range(3)],
            "class 'dog': 1; at least 2 are needed",
        ),
        (shutil.rmtree, "cannot be read as a folder: No such file"),
        (lambda f: remove(f / "train", f / "test"), "is not an image folder and contains none"),
        (lambda f: (remove(f), f.write_bytes(b"")), "is an empty file: name a folder"),
    ],
)
def test_errors_name_file_or_class(tmp_path, change, message):
    folder = make_splits(tmp_path / "pets")
    change(folder)
    assert message in refusal(folder)


def test_class_needs_an_image_for_each_split(tmp_path):
    folder = make_classes(tmp_path / "pets", count=3)
    assert len(load(folder).test.labels) == 2
    (folder / "dog" / "0.png").unlink()
    assert "class 'dog': 2; at least 3 are needed" in refusal(folder)


def test_too_few_images_are_rejected(tmp_path):
    folder = make_classes(tmp_path / "pets", classes=("ant", "bee", "cat"), count=1)
    (folder / "dog").mkdir()
    assert "no images in the class 'dog'" in refusal(folder)
    (folder / "dog").rmdir()
    assert "class 'ant': 1; at least 3 are needed" in refusal(folder)


LOAD = """
import sys
from pathlib import Path
from training.config import TrainingConfig
from training.data import load_dataset
from training.errors import TrainingError
try:
    load_dataset(TrainingConfig(dataset="folder", data=Path(sys.argv[1])))
except TrainingError as error:
    sys.exit(str(error))
"""


def test_images_larger_than_the_address_space_limit_are_rejected_with_advice(tmp_path):
    folder = make_classes(tmp_path / "photos", count=1)
    for name in ("cat", "dog"):
        for number in range(1, 60):
            (folder / name / f"{number}.png").hardlink_to(folder / name / "0.png")
    large = LOAD.replace("sys.argv[1])", "sys.argv[1]), image_size=(4000, 4000)")
    limited = "import resource; resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))\n" + large
    done = subprocess.run([sys.executable, "-c", limited, folder], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("120 images of 4000x4000, and the copy made when they are split, need about 10.7 GiB")
    assert "--image-size 96x96 (make: IMAGE_SIZE=96x96)" in done.stderr


def test_images_larger_than_available_memory_are_rejected(tmp_path, monkeypatch):
    """Linux grants more than there is, and kills the process once it is used."""
    folder = make_classes(tmp_path)
    monkeypatch.setattr(memory, "available_bytes", lambda: 2 * 8 * 32 * 32 * 3)
    assert len(load(folder).train.labels) == 6
    monkeypatch.setattr(memory, "available_bytes", lambda: 2 * 8 * 32 * 32 * 3 - 1)
    with pytest.raises(MemoryTooSmallError, match=r"^8 images of 32x32.* need about 0\.0 MiB of memory"):
        load(folder)


def test_progress_is_shown_on_terminals_only(tmp_path):
    folder = make_splits(tmp_path / "pets")
    command = [sys.executable, "-c", LOAD, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
    controller, terminal = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "200"}
    on_terminal = subprocess.run(command, stdout=subprocess.PIPE, stderr=terminal, env=environment, check=True)
    os.close(terminal)
    assert on_terminal.stdout == b""
    assert b"reading" in os.read(controller, 10_000)
    os.close(controller)


@pytest.mark.parametrize("layout", ["splits", "classes"])
def test_test_images_that_are_training_images_are_counted_and_named(layout, tmp_path, caplog):
    if layout == "splits":
        folder = make_splits(tmp_path / "pets")
        # Another name, class and format: what counts is the pixels.
        Image.open(folder / "train" / "dog" / "2.png").save(folder / "test" / "cat" / "copy.bmp", "BMP")
        shutil.copy(folder / "train" / "cat" / "1.png", folder / "test" / "cat" / "another.png")
        expected = (
            f"2 of the 10 test images of {folder} are training images too, so the test accuracy is too high: "
            "test/cat/another.png = train/cat/1.png, test/cat/copy.bmp = train/dog/2.png. Keep one file of each"
        )
    else:
        folder = make_classes(tmp_path / "pets", classes=("cat", "dog"), count=5)
        for number in range(5):
            shutil.copy(folder / "dog" / "0.png", folder / "dog" / f"copy{number}.png")
            shutil.copy(folder / "cat" / f"{number}.png", folder / "cat" / f"copy{number}.png")
        expected = f"2 of the 2 test images of {folder} are training images too"
    with caplog.at_level(logging.WARNING):
        load(folder)
    assert [message[: len(expected)] for message in caplog.messages] == [expected]


def test_copies_within_the_training_images_are_no_reason_to_warn(tmp_path, caplog):
    folder = make_splits(tmp_path / "pets")
    shutil.copy(folder / "train" / "dog" / "2.png", folder / "train" / "dog" / "copy.png")
    shutil.copy(folder / "test" / "dog" / "2.png", folder / "test" / "dog" / "copy.png")
    with caplog.at_level(logging.WARNING):
        load(folder)
    assert caplog.messages == []
