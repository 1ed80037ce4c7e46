import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.training.data.cifar10_files import check, write_archive, write_batches
from training.config import TrainingConfig
from training.data import load_dataset
from training.data.cifar10 import CLASS_NAMES, SHA256, URL, load_cifar10
from training.errors import DatasetError

REAL = os.environ.get("CIFAR10_DATA")
needs_real = pytest.mark.skipif(not REAL, reason="CIFAR10_DATA names no folder with CIFAR-10")


@pytest.fixture(autouse=True)
def nowhere(tmp_path, monkeypatch):
    """No CIFAR-10 is to be found, unless a test puts it somewhere; return Keras's cache."""
    monkeypatch.delenv("CIFAR10_DATA", raising=False)
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    return tmp_path / "keras" / "datasets"


def make_images(folder, *, classes=CLASS_NAMES, size=(32, 32), count=3):
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for image in range(count):
            Image.new("RGB", size, (20 * number, image, 0)).save(folder / name / f"{image}.png")
    return folder


def refusal(path, **options):
    with pytest.raises(DatasetError) as error:
        load_cifar10(path, seed=0, **options)
    return str(error.value)


def test_path_can_be_archive_extracted_folder_or_their_parent(tmp_path):
    archive = write_archive(tmp_path / "a" / "cifar-10-python.tar.gz")
    renamed = archive.with_name("mine.tgz")
    shutil.copy(archive, renamed)
    folder = write_batches(tmp_path / "b")
    for path in (archive, renamed, archive.parent, folder, folder.parent):
        check(load_cifar10(path, seed=0))


def test_path_can_be_an_image_folder_in_either_layout(tmp_path):
    for split in ("train", "test"):
        make_images(tmp_path / "splits" / split)
    make_images(tmp_path / "flat")
    for folder in ("splits", "flat"):
        dataset = load_cifar10(tmp_path / folder, seed=0)
        assert (dataset.name, dataset.class_names) == ("cifar10", CLASS_NAMES)
        assert dataset.source.startswith(str(tmp_path / folder))
        assert dataset.train.images[dataset.train.labels == 9][0, 0, 0, 0] == 180
    assert np.bincount(load_cifar10(tmp_path / "flat", seed=0).test.labels).tolist() == [1] * 10


def test_batches_take_precedence_over_archive_over_images(tmp_path):
    make_images(tmp_path / "images")
    assert load_cifar10(tmp_path, seed=0).source.startswith(str(tmp_path / "images"))
    archive = write_archive(tmp_path / "cifar-10-python.tar.gz")
    assert load_cifar10(tmp_path, seed=0).source == str(archive)
    folder = write_batches(tmp_path)
    assert load_cifar10(tmp_path, seed=0).source == str(folder)


def test_sources_are_searched_in_order(tmp_path, monkeypatch, nowhere):
    cached = write_batches(nowhere / "cifar-10-batches-py-target")
    check(load_cifar10(None, seed=0))
    named = write_batches(tmp_path / "named")
    monkeypatch.setenv("CIFAR10_DATA", str(named))
    assert load_dataset(TrainingConfig(dataset="cifar10")).source == str(named)
    given = write_batches(tmp_path / "given")
    assert load_dataset(TrainingConfig(dataset="cifar10", data=given)).source == str(given)
    monkeypatch.delenv("CIFAR10_DATA")
    assert load_cifar10(None, seed=0).source == str(cached)


def test_an_invalid_named_path_is_an_error(tmp_path, monkeypatch, nowhere):
    write_batches(nowhere)
    assert refusal(tmp_path / "typo") == f"{tmp_path / 'typo'} does not exist"
    monkeypatch.setenv("CIFAR10_DATA", str(tmp_path / "typo"))
    assert refusal(None).startswith(f"{tmp_path / 'typo'} does not exist\n")
    assert "the environment variable CIFAR10_DATA" in refusal(None)
    (tmp_path / "empty").mkdir()
    assert "does not contain CIFAR-10: expected cifar-10-python.tar.gz" in refusal(tmp_path / "empty")


@pytest.mark.parametrize(
    "place", ["cifar-10-batches-py-target_archive", "cifar-10-batches-py.tar.gz", "cifar-10-python.tar.gz"]
)
def test_archive_is_found_under_every_name_in_the_keras_cache(nowhere, place):
    write_archive(nowhere / place)
    shutil.rmtree(nowhere / f"{place}-contents")
    check(load_cifar10(None, seed=0))


def test_default_keras_cache_is_in_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.delenv("KERAS_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    write_batches(tmp_path / ".keras" / "datasets")
    check(load_cifar10(None, seed=0))


def test_damaged_cache_error_names_the_path_to_remove(nowhere):
    folder = write_batches(nowhere)
    (folder / "data_batch_4").unlink()
    message = refusal(None)
    assert "data_batch_4 cannot be read" in message
    assert f"remove {folder} to download it again" in message


def test_image_folder_with_other_classes_is_rejected_before_reading(tmp_path):
    folder = make_images(tmp_path / "pets", classes=("cat", "dog"))
    (folder / "cat" / "0.png").write_bytes(b"damaged, and nobody looks")
    message = refusal(folder)
    assert "not of CIFAR-10: its classes are cat, dog." in message
    assert f"make train DATASET=folder DATA={folder}" in message


def test_missing_or_extra_class_is_rejected(tmp_path):
    make_images(tmp_path / "less", classes=CLASS_NAMES[:9])
    make_images(tmp_path / "more", classes=(*CLASS_NAMES, "zebra"))
    for folder in ("less", "more"):
        assert "not of CIFAR-10" in refusal(tmp_path / folder)


def test_image_folder_with_another_image_size_is_rejected(tmp_path):
    message = refusal(make_images(tmp_path / "large", size=(48, 40)))
    assert "images of 40x48, but CIFAR-10's are 32x32" in message
    assert "DATASET=folder" in message


def test_images_of_different_sizes_are_not_resized(tmp_path):
    folder = make_images(tmp_path / "my images")
    Image.new("RGB", (64, 64)).save(folder / "cat" / "large.png")
    message = refusal(folder)
    assert "differ in size" in message
    assert f"make train DATASET=folder DATA='{folder}'" in message
    (folder / "cat" / "large.png").unlink()
    dataset = load_cifar10(tmp_path, seed=0)
    assert (dataset.class_names, dataset.train.images.shape[1:]) == (CLASS_NAMES, (32, 32, 3))


def test_several_image_folders_are_rejected(tmp_path):
    for name in ("one", "two"):
        make_images(tmp_path / name)
    assert "contains 2 image folders" in refusal(tmp_path)


def test_download_is_cached_for_the_next_run(tmp_path, nowhere, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    archive = write_archive(tmp_path / "server" / "cifar-10-python.tar.gz")
    sha256 = hashlib.sha256(archive.read_bytes()).hexdigest()
    command = [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1", "--directory", archive.parent]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        assert server.stdout
        port = server.stdout.readline().split(" port ")[1].split()[0]
        url = f"http://127.0.0.1:{port}/cifar-10-python.tar.gz"
        try:
            assert f"the download of {url} failed: its SHA-256 is {sha256}" in refusal(None, url=url, sha256="0" * 64)
            check(load_cifar10(None, seed=0, url=url, sha256=sha256, timeout_s=10))
        finally:
            server.kill()
    check(load_cifar10(None, seed=0, url=url, sha256=sha256))
    assert [path.name for path in nowhere.iterdir()] == ["cifar-10-python.tar.gz"]


def test_url_and_checksum_match_keras():
    """Read from Keras's own source, which nothing here imports."""
    import importlib.util

    spec = importlib.util.find_spec("keras")
    assert spec
    assert spec.submodule_search_locations
    source = (Path(spec.submodule_search_locations[0]) / "src" / "datasets" / "cifar10.py").read_text()
    assert URL in source
    assert SHA256 in source


def test_error_without_network_lists_sources_and_alternatives(tmp_path):
    # A proxy that nothing listens at is the surest way to have no network.
    environment = {name: value for name, value in os.environ.items() if name.lower() not in ("no_proxy", "https_proxy")}
    environment |= {"HTTPS_PROXY": "http://127.0.0.1:9", "PYTHONPATH": str(Path.cwd())}
    command = [sys.executable, "-m", "training", "train"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    for part in (
        "--data, or the environment variable CIFAR10_DATA",
        f"it is not in Keras's cache, {tmp_path / 'keras' / 'datasets'}",
        f"the download of {URL} failed: ",
        "make train DATA=/path/to/cifar-10-python.tar.gz",
        "make train DATASET=shapes",
        "make demo",
    ):
        assert part in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


@needs_real
def test_real_data_is_equal_in_all_formats():
    assert REAL
    batches = load_cifar10(Path(REAL) / "cifar-10-batches-py", seed=0)
    for split, count in ((batches.train, 50_000), (batches.test, 10_000)):
        assert split.images.shape == (count, 32, 32, 3)
        assert np.bincount(split.labels).tolist() == [count // 10] * 10
    assert load_cifar10(Path(REAL), seed=0).content_hash == batches.content_hash
    archive = Path(REAL) / "cifar-10-python.tar.gz"
    if archive.is_file():
        assert load_cifar10(archive, seed=0).content_hash == batches.content_hash
    images = load_cifar10(Path(REAL) / "images", seed=0)
    assert images.class_names == batches.class_names == CLASS_NAMES
    for one, other in ((batches.train, images.train), (batches.test, images.test)):
        pictures, others = (
            sorted(
                (hashlib.sha1(image.tobytes()).digest(), int(label))
                for image, label in zip(split.images, split.labels, strict=True)
            )
            for split in (one, other)
        )
        assert pictures == others
