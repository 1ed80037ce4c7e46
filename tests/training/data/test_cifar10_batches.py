import contextlib
import io
import os
import pickle
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.training.data.cifar10_files import COUNT, FILES, make_batch, write_archive, write_batches
from training.data import cifar10_batches
from training.data.cifar10_batches import read_archive, read_batches
from training.errors import DatasetError


def test_batches_are_read_in_numeric_order(tmp_path):
    train, test = read_batches(write_batches(tmp_path))
    assert train.labels.tolist() == [label for number in range(5) for label in make_batch(number)[b"labels"]]
    rows = make_batch(5)[b"data"].reshape(COUNT, 3, 32, 32)
    np.testing.assert_array_equal(test.images, np.moveaxis(rows, 1, 3))


def test_archive_and_folder_give_equal_data(tmp_path):
    of_folder, of_archive = read_batches(write_batches(tmp_path)), read_archive(write_archive(tmp_path / "a.tar.gz"))
    for one, other in zip(of_folder, of_archive, strict=True):
        np.testing.assert_array_equal(one.images, other.images)
        np.testing.assert_array_equal(one.labels, other.labels)


def python_2_pickle(value):
    """Pickle as Python 2 did, byte for byte the form of the original's batches."""
    if isinstance(value, dict):
        items = [python_2_pickle(item) for pair in value.items() for item in pair]
        return b"}(" + b"".join(items) + b"u"
    if isinstance(value, list):
        return b"](" + b"".join(python_2_pickle(item) for item in value) + b"e"
    if isinstance(value, bytes):
        return b"T" + struct.pack("<i", len(value)) + value
    if isinstance(value, int):
        return b"M" + struct.pack("<H", value)
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    dtype = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    shape = b"".join(python_2_pickle(length) for length in value.shape) + b"\x86"
    return array + b"(K\x01" + shape + dtype + b"\x89" + python_2_pickle(value.tobytes()) + b"tb"


@pytest.mark.parametrize(
    "dump",
    [
        lambda batch: b"\x80\x02" + python_2_pickle(batch) + b".",
        *(lambda batch, protocol=protocol: pickle.dumps(batch, protocol=protocol) for protocol in (2, 3, 4)),
    ],
    ids=["Python 2", "protocol 2", "protocol 3", "protocol 4"],
)
def test_batches_of_any_python_and_numpy_version_are_read(tmp_path, dump):
    folder = write_batches(tmp_path)
    (folder / "test_batch").write_bytes(dump(make_batch(7)))
    assert read_batches(folder)[1].labels.tolist() == make_batch(7)[b"labels"]


class Calls:
    """Executes a call when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(
    ("call", "refused"),
    [
        (Calls(os.mkdir, "was-run"), r"posix\.mkdir"),
        (Calls(eval, "open('was-run', 'w')"), r"\w+\.eval"),
        (Calls(getattr, np.ndarray, "tofile"), r"\w+\.getattr"),
        (Calls(np.save, "was-run", b""), r"numpy\.save"),
        (Calls(np.load, "was-run"), r"numpy\.load"),
        (Path("x"), r"pathlib\S*Path"),
    ],
    ids=["mkdir", "eval", "getattr", "save", "load", "path"],
)
def test_pickles_that_execute_code_are_rejected(tmp_path, monkeypatch, call, refused, protocol):
    monkeypatch.chdir(tmp_path)
    folder = write_batches(tmp_path)
    (folder / "data_batch_3").write_bytes(pickle.dumps({**make_batch(2), b"data": call}, protocol=protocol))
    with pytest.raises(DatasetError, match=f"data_batch_3: not a CIFAR-10 batch: it imports {refused}"):
        read_batches(folder)
    assert not list(tmp_path.glob("was-run*"))


def test_other_codecs_are_rejected(tmp_path):
    folder = write_batches(tmp_path)
    content = pickle.dumps(make_batch(0), protocol=2)
    assert content.count(b"latin1") == 1
    (folder / "data_batch_1").write_bytes(content.replace(b"latin1", b"zlib_c"))
    with pytest.raises(DatasetError, match=r"data_batch_1: .*'zlib_c'"):
        read_batches(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a CIFAR-10 batch: Ran out of input"),
        (b"not a pickle", "not a CIFAR-10 batch"),
        (pickle.dumps(make_batch(0), protocol=2)[:900], "not a CIFAR-10 batch"),
        (pickle.dumps([1, 2]), "expected a dictionary"),
        (pickle.dumps({b"labels": [1]}), "uint8"),
        (pickle.dumps({"data": b"", "labels": []}), r"its keys are str \('data'\)"),
        (pickle.dumps({b"fine_labels": [], b"data": b""}), "this is CIFAR-100"),
        (pickle.dumps({**make_batch(0), b"data": np.zeros((COUNT, 3072))}, protocol=2), "uint8"),
        (pickle.dumps({**make_batch(0), b"data": np.zeros((COUNT, 10), np.uint8)}, protocol=2), r"\(n, 3072\)"),
        (pickle.dumps({**make_batch(0), b"labels": [0] * (COUNT - 1)}, protocol=2), f"'labels', {COUNT} whole"),
        (pickle.dumps({**make_batch(0), b"labels": [10] * COUNT}, protocol=2), "from 0 to 9"),
        (pickle.dumps({**make_batch(0), b"labels": [-1] * COUNT}, protocol=2), "from 0 to 9"),
        (pickle.dumps({**make_batch(0), b"labels": [0.0] * COUNT}, protocol=2), "whole numbers"),
        (pickle.dumps({**make_batch(0), b"labels": None}, protocol=2), "whole numbers"),
    ],
)
def test_invalid_batch_is_named(tmp_path, content, message):
    folder = write_batches(tmp_path)
    (folder / "test_batch").write_bytes(content)
    with pytest.raises(DatasetError, match=f"test_batch: .*{message}"):
        read_batches(folder)


@pytest.mark.filterwarnings("ignore:dtype")
@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damaged_batch_is_read_or_raises_dataset_error(data):
    content = bytearray(b"\x80\x02" + python_2_pickle(make_batch(0, count=2)) + b".")
    edges = st.integers(0, 200) | st.integers(len(content) - 60, len(content) - 1)
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(edges)] = data.draw(st.integers(0, 255))
    with contextlib.suppress(DatasetError):
        split = cifar10_batches._parse_batch(bytes(content), where="here")
        assert split.images.shape == (len(split.labels), 32, 32, 3)


@pytest.mark.parametrize("name", FILES)
def test_missing_batch_is_named(tmp_path, name):
    folder = write_batches(tmp_path)
    (folder / name).unlink()
    with pytest.raises(DatasetError, match=f"{name} cannot be read: No such file"):
        read_batches(folder)


def add(archive, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def test_another_archive_is_rejected(tmp_path):
    with tarfile.open(tmp_path / "other.tar.gz", "w:gz") as archive:
        add(archive, "cifar-100-python/train", pickle.dumps(make_batch(0), protocol=2))
    with pytest.raises(DatasetError, match=r"other\.tar\.gz has no cifar-10-batches-py/data_batch_1"):
        read_archive(tmp_path / "other.tar.gz")


def test_archive_is_not_extracted_to_disk(tmp_path, monkeypatch):
    """Neither a path that leads out, nor a link in a batch's place, nor anything else."""
    monkeypatch.chdir(tmp_path)
    write_archive(tmp_path / "whole.tar.gz")
    with tarfile.open("evil.tar", "w") as archive:
        add(archive, "../../escaped", b"x")
        add(archive, "/tmp/cifar-10-batches-py/readme", b"x")
        link = tarfile.TarInfo("cifar-10-batches-py/data_batch_1")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DatasetError, match="has no cifar-10-batches-py/data_batch_1"):
        read_archive(Path("evil.tar"))
    read_archive(Path("whole.tar.gz"))
    assert sorted(tmp_path.rglob("*")) == before


def test_batch_with_a_huge_declared_size_is_rejected(tmp_path, monkeypatch):
    archive = write_archive(tmp_path / "a.tar.gz")
    monkeypatch.setattr(cifar10_batches, "_MAX_BATCH_BYTES", 1000)
    with pytest.raises(DatasetError, match="too large for a batch"):
        read_archive(archive)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.9999])
def test_truncated_archive_is_named(tmp_path, share):
    archive = write_archive(tmp_path / "cifar-10-python.tar.gz")
    content = archive.read_bytes()
    archive.write_bytes(content[: int(share * len(content))])
    with pytest.raises(DatasetError, match=r"cifar-10-python\.tar\.gz is not a complete tar archive"):
        read_archive(archive)


def test_flipped_bits_in_an_archive_are_detected(tmp_path):
    archive = write_archive(tmp_path / "cifar-10-python.tar.gz")
    content = archive.read_bytes()
    # What comes before is gzip's header, with a time and a name that nothing depends on.
    for position in np.linspace(60, len(content) - 1, 25, dtype=int):
        damaged = bytearray(content)
        damaged[position] ^= 0x10
        archive.write_bytes(damaged)
        with pytest.raises(DatasetError):
            read_archive(archive)
