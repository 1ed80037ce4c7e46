"""Messages for files that are not datasets."""

import gzip
import io
import pickle
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image

from training.config import TrainingConfig
from training.data import load_dataset
from training.errors import DatasetError


def make_zip(*names):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(name, b"content")
    return file.getvalue()


def make_npz(**arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def make_npy():
    file = io.BytesIO()
    np.save(file, np.zeros(3))
    return file.getvalue()


def make_png():
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "PNG")
    return file.getvalue()


def make_tar():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("empty"))
    return file.getvalue()


FOREIGN = {
    "zip": (make_zip("cifar-10-batches-py/data_batch_1", "x.npy"), "is a zip archive: unpack it, and name the folder"),
    "cut zip": (make_zip("a")[:40], "is a zip archive, and damaged: fetch it again"),
    "npz": (make_npz(x_train=np.zeros(2), y_train=np.zeros(2)), "is a NumPy archive (.npz, of x_train, y_train)"),
    "npy": (make_npy(), "is a NumPy array (.npy)"),
    "7z": (b"7z\xbc\xaf\x27\x1c" + bytes(100), "is a 7z archive: unpack it, and name the folder"),
    "rar": (b"Rar!\x1a\x07\x01\x00" + bytes(100), "is a RAR archive: unpack it"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(100), "is an HDF5 file"),
    "parquet": (b"PAR1" + bytes(100), "is a Parquet file"),
    "png": (make_png(), "is a single image: name the folder"),
    "batch": (
        pickle.dumps({b"data": 1}, protocol=2),
        "is a pickle file: if it is a batch of CIFAR-10, name the folder",
    ),
    "page": (b"\n <!DOCTYPE html><title>404</title>", "is a web page and not the data: the download went wrong"),
}


@pytest.mark.parametrize("dataset", ["cifar10", "folder"])
@pytest.mark.parametrize("kind", FOREIGN)
def test_message_describes_the_file_type(tmp_path, dataset, kind):
    content, message = FOREIGN[kind]
    path = tmp_path / "cifar-10-python.tar.gz"  # detected by content, not by name
    path.write_bytes(content)
    with pytest.raises(DatasetError) as error:
        load_dataset(TrainingConfig(dataset=dataset, data=path))
    assert str(error.value).startswith(f"{path} {message}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (make_tar(), "is a compressed or tar archive: unpack it, and name the folder"),
        (gzip.compress(make_tar(), mtime=0), "is a compressed or tar archive: unpack it, and name the folder"),
        (b"", "is an empty file: name a folder"),
        (b"text", "is a file: name a folder"),
    ],
)
def test_file_instead_of_an_image_folder_is_rejected(tmp_path, content, message):
    (tmp_path / "data").write_bytes(content)
    with pytest.raises(DatasetError) as error:
        load_dataset(TrainingConfig(dataset="folder", data=tmp_path / "data"))
    assert str(error.value) == f"{tmp_path / 'data'} {message}"


@pytest.mark.parametrize("content", [b"", b"text"])
def test_invalid_archive_error_has_one_line(tmp_path, content):
    (tmp_path / "data").write_bytes(content)
    with pytest.raises(DatasetError) as error:
        load_dataset(TrainingConfig(dataset="cifar10", data=tmp_path / "data"))
    assert "is not a complete tar archive (it is empty, or does not start like an archive)" in str(error.value)
    assert "\n" not in str(error.value)
