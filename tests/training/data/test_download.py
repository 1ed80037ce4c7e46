import hashlib
import http.server
import os
import socket
import threading

import pytest

from training.data.download import DownloadError, download

CONTENT = os.urandom(700_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    released: threading.Event


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self):
        if self.path == "/silent":
            self.server.released.wait(30)
            return
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/whole")
            self.end_headers()
            return
        self.send_response(404 if self.path == "/missing" else 200)
        if self.path != "/unsized":
            self.send_header("Content-Length", str(len(CONTENT)))
        if self.path == "/labelled":  # as some servers label every .gz file, which is then not to be unpacked
            self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        whole = self.path not in ("/cut", "/stalled")
        self.wfile.write(CONTENT if whole else CONTENT[:100_000])
        if self.path == "/stalled":
            self.server.released.wait(30)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def server():
    server = Server(("127.0.0.1", 0), Handler)
    server.released = threading.Event()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.released.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def reason(url, path, *, sha256=SHA256, timeout_s=0.5):
    with pytest.raises(DownloadError) as error:
        download(url, path, sha256=sha256, timeout_s=timeout_s)
    return str(error.value)


@pytest.mark.parametrize("path", ["/whole", "/moved", "/unsized", "/labelled"])
def test_a_file_is_downloaded_into_a_new_folder(server, tmp_path, path):
    target = tmp_path / "new" / "folder" / "data.tar.gz"
    download(server + path, target, sha256=SHA256, timeout_s=10)
    assert target.read_bytes() == CONTENT
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/missing", "the server responded with 404"),
        ("/cut", "peer closed connection"),
        ("/stalled", "no data within 0.5 s"),
        ("/silent", "no data within 0.5 s"),
    ],
)
def test_a_failed_download_leaves_no_file(server, tmp_path, path, message):
    assert message in reason(server + path, tmp_path / "data.tar.gz")
    assert not list(tmp_path.iterdir())


def test_a_wrong_checksum_keeps_the_old_file(server, tmp_path):
    target = tmp_path / "data.tar.gz"
    target.write_bytes(b"what was there")
    assert reason(server + "/whole", target, sha256="0" * 64) == f"its SHA-256 is {SHA256}, expected {'0' * 64}"
    assert target.read_bytes() == b"what was there"
    assert list(tmp_path.iterdir()) == [target]


def test_a_refused_connection_is_a_download_error(tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        assert "refused" in reason(f"http://127.0.0.1:{unused.getsockname()[1]}/x", tmp_path / "data.tar.gz")


def test_a_name_that_cannot_be_resolved_is_a_download_error(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    assert "name resolution" in reason("http://example.invalid/x", tmp_path / "data.tar.gz")


def test_an_invalid_proxy_is_a_download_error(tmp_path, monkeypatch):
    monkeypatch.setenv("ALL_PROXY", "nonsense://127.0.0.1:1")
    assert "proxy" in reason("http://example.invalid/x", tmp_path / "data.tar.gz")


def test_a_path_that_cannot_be_written_is_named(server, tmp_path):
    (tmp_path / "file").touch()
    assert str(tmp_path / "file") in reason(server + "/whole", tmp_path / "file" / "data.tar.gz")


def test_concurrent_downloads_of_one_file_do_not_interfere(server, tmp_path):
    target = tmp_path / "data.tar.gz"
    failures = []

    def fetch():
        try:
            download(server + "/whole", target, sha256=SHA256, timeout_s=10)
        except DownloadError as error:
            failures.append(error)

    threads = [threading.Thread(target=fetch) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert target.read_bytes() == CONTENT
    assert list(tmp_path.iterdir()) == [target]


def test_an_interrupted_download_leaves_no_file(server, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("rich.progress.Progress.advance", interrupt)
    with pytest.raises(KeyboardInterrupt):
        download(server + "/whole", tmp_path / "data.tar.gz", sha256=SHA256, timeout_s=10)
    assert not list(tmp_path.iterdir())
