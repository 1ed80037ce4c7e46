import hashlib
import http.server
import os
import pickle
import shutil
import socket
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training.datasets.cifar10 import CLASS_NAMES, load_cifar10
from training.errors import DatasetError

REAL = os.environ.get("CIFAR10_DATA")
needs_real = pytest.mark.skipif(not REAL, reason="CIFAR10_DATA names no folder with CIFAR-10")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """No CIFAR-10 is to be found, unless a test puts it somewhere."""
    monkeypatch.delenv("CIFAR10_DATA", raising=False)
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))


def batch(count, *, seed):
    rng = np.random.default_rng(seed)
    return {
        b"data": rng.integers(0, 256, (count, 3072), dtype=np.uint8),
        b"labels": rng.integers(0, 10, count).tolist(),
    }


def make_batches(folder):
    """The original's layout, with few images."""
    folder = folder / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for number, name in enumerate([*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]):
        (folder / name).write_bytes(pickle.dumps(batch(20, seed=number), protocol=2))
    return folder


def make_archive(path):
    folder = make_batches(path.parent / "unpacked")
    with tarfile.open(path, "w:gz") as archive:
        archive.add(folder, "cifar-10-batches-py")
    return path


def check_small(dataset):
    assert (dataset.name, dataset.class_names) == ("cifar10", CLASS_NAMES)
    assert dataset.train.images.shape == (100, 32, 32, 3)
    assert dataset.test.images.shape == (20, 32, 32, 3)
    first = batch(20, seed=0)
    # A row holds 1,024 red values, then green, then blue.
    assert dataset.train.images[0, 0, 1].tolist() == first[b"data"][0, [1, 1025, 2049]].tolist()
    assert dataset.train.labels[:20].tolist() == first[b"labels"]


def test_a_path_may_be_any_of_its_forms(tmp_path):
    archive = make_archive(tmp_path / "cifar-10-python.tar.gz")
    folder = tmp_path / "unpacked" / "cifar-10-batches-py"
    for path in (archive, folder, folder.parent, tmp_path):
        check_small(load_cifar10(path, seed=0))


def test_the_places_are_tried_in_order(tmp_path, monkeypatch):
    cached = tmp_path / "keras" / "datasets" / "cifar-10-batches-py-target"
    make_batches(cached)
    check_small(load_cifar10(None, seed=0))
    monkeypatch.setenv("CIFAR10_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(DatasetError, match="nowhere"):  # what was named is not replaced by what is cached
        load_cifar10(None, seed=0)
    named = make_batches(tmp_path / "named")
    monkeypatch.setenv("CIFAR10_DATA", str(named))
    assert load_cifar10(None, seed=0).source == str(named)
    assert load_cifar10(cached, seed=0).source.startswith(str(cached))


def test_an_image_folder_must_be_of_cifar10(tmp_path):
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (32, 32)).save(tmp_path / split / name / "0.png")
    with pytest.raises(DatasetError, match=r"not of CIFAR-10.*cat, dog.*DATASET=folder"):
        load_cifar10(tmp_path, seed=0)


def test_an_empty_folder_is_explained(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match=r"holds no CIFAR-10: expected cifar-10-python\.tar\.gz"):
        load_cifar10(tmp_path / "empty", seed=0)


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("was-run",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps(Malicious()), "asks for posix.mkdir"),
        (pickle.dumps({b"data": Path}), "asks for pathlib"),
        (b"", "no batch of CIFAR-10"),
        (pickle.dumps(batch(5, seed=0), protocol=2)[:900], "no batch of CIFAR-10"),
        (pickle.dumps([1, 2]), "expected a dictionary"),
        (pickle.dumps({b"data": np.zeros((5, 3072))}, protocol=2), "uint8"),
        (pickle.dumps({b"data": np.zeros((5, 10), np.uint8)}, protocol=2), "uint8"),
        (pickle.dumps({**batch(5, seed=0), b"labels": [0] * 4}, protocol=2), "'labels'"),
        (pickle.dumps({**batch(5, seed=0), b"labels": [0, 1, 2, 3, 10]}, protocol=2), "'labels'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_batch_that_is_none_is_named_and_never_run(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    folder = make_batches(tmp_path)
    (folder / "data_batch_3").write_bytes(content)
    with pytest.raises(DatasetError, match=f"data_batch_3: .*{message}"):
        load_cifar10(folder, seed=0)
    assert not Path("was-run").exists()


def test_a_damaged_archive_is_named(tmp_path):
    archive = make_archive(tmp_path / "cifar-10-python.tar.gz")
    content = archive.read_bytes()
    for damaged in (content[: len(content) // 2], b"words"):
        archive.write_bytes(damaged)
        with pytest.raises(DatasetError, match="not a whole tar archive"):
            load_cifar10(archive, seed=0)
    with tarfile.open(archive, "w:gz") as other:
        other.add(__file__, "something.py")
    with pytest.raises(DatasetError, match="has no cifar-10-batches-py/data_batch_1"):
        load_cifar10(archive, seed=0)


@pytest.fixture
def web_server(tmp_path):
    """A web server with one archive; returns (address, its SHA-256, the requests it got)."""
    archive = make_archive(tmp_path / "cifar-10-python.tar.gz")
    content = archive.read_bytes()
    archive.unlink()
    shutil.rmtree(tmp_path / "unpacked")
    requests = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content if self.path == "/whole" else content[:1000])
            if self.path == "/stalls":
                time.sleep(3)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", hashlib.sha256(content).hexdigest(), requests
    server.shutdown()
    server.server_close()


def test_a_download_is_checked_and_kept(tmp_path, web_server):
    url, sha256, requests = web_server
    check_small(load_cifar10(None, seed=0, url=f"{url}/whole", sha256=sha256))
    check_small(load_cifar10(None, seed=0, url=f"{url}/whole", sha256=sha256))
    assert requests == ["/whole"]
    assert [path.name for path in (tmp_path / "keras" / "datasets").iterdir()] == ["cifar-10-python.tar.gz"]


@pytest.mark.parametrize(
    ("path", "sha256", "message"),
    [
        ("/whole", "0" * 64, "is not the original CIFAR-10: its SHA-256"),
        ("/cut", None, "the download of http"),
        ("/stalls", None, "the download of http"),
    ],
)
def test_a_bad_download_leaves_nothing(tmp_path, web_server, path, sha256, message):
    url, right_sha256, _ = web_server
    with pytest.raises(DatasetError, match=message):
        load_cifar10(None, seed=0, url=url + path, sha256=sha256 or right_sha256, timeout_s=0.5)
    assert not list((tmp_path / "keras" / "datasets").iterdir())


def test_a_name_that_cannot_be_looked_up_is_not_waited_for(monkeypatch):
    asked = threading.Event()

    def hang(*_, **__):  # as a resolver does that has no network
        asked.set()
        time.sleep(30)

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    with pytest.raises(DatasetError, match=r"no answer within 0\.5 s"):
        load_cifar10(None, seed=0, url="http://example.invalid/x", timeout_s=0.5)
    assert asked.is_set()


def test_nowhere_to_be_found_says_what_was_tried_and_what_works():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/x"
        with pytest.raises(DatasetError) as error:
            load_cifar10(None, seed=0, url=url)
    message = str(error.value)
    for part in ("CIFAR10_DATA", "Keras's cache", url, "make train DATA=", "make train DATASET=shapes", "make demo"):
        assert part in message


def test_without_network_and_data_the_command_ends_with_an_explanation(tmp_path):
    # A proxy that nothing listens at is the surest way to have no network.
    environment = {**os.environ, "HTTPS_PROXY": "http://127.0.0.1:9", "KERAS_HOME": str(tmp_path / "keras")}
    environment |= {"PYTHONPATH": str(Path.cwd())}
    command = [sys.executable, "-m", "training", "train"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 1
    assert "make train DATASET=shapes" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


@needs_real
def test_the_real_data_is_the_same_in_all_its_forms():
    batches = load_cifar10(Path(REAL) / "cifar-10-batches-py", seed=0)
    assert batches.train.images.shape == (50_000, 32, 32, 3)
    assert batches.test.images.shape == (10_000, 32, 32, 3)
    assert np.bincount(batches.train.labels).tolist() == [5000] * 10
    images = load_cifar10(Path(REAL) / "images", seed=0)
    assert images.class_names == batches.class_names
    for one, other in ((batches.train, images.train), (batches.test, images.test)):
        pictures = [
            sorted(zip((hashlib.sha1(i.tobytes()).digest() for i in split.images), split.labels.tolist(), strict=True))
            for split in (one, other)
        ]
        assert pictures[0] == pictures[1]
