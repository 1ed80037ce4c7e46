"""Raw TCP clients, and the descriptors, connections and memory of the server process."""

from __future__ import annotations

import base64
import json
import resource
import shutil
import socket
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import pytest
from PIL import Image

from tests.serving.conftest import Server, encode, picture

JSON = b"application/json"
HEALTH = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
MB = 1024 * 1024
ALIVE = b'{"status":"alive"}'


@dataclass(frozen=True)
class Response:
    """One HTTP response; `headers` has lower-case names, repeated fields are joined by ", "."""

    version: str
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def closes(self) -> bool:
        return self.headers.get("connection", "").lower() == "close"


class Client:
    """One TCP connection; a context manager."""

    def __init__(self, port: int, *, timeout_s: float = 10, receive_buffer: int | None = None) -> None:
        self.socket = socket.socket()
        self.socket.settimeout(timeout_s)
        if receive_buffer is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.connect(("127.0.0.1", port))
        self._received = bytearray()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, *segments: bytes, pause_s: float = 0.005) -> None:
        """Send each argument in its own TCP segment."""
        for number, segment in enumerate(segments):
            if number:
                time.sleep(pause_s)
            self.socket.sendall(segment)

    def read(self, method: str = "GET") -> Response:
        """Read one final response, skipping 100 Continue. Raises EOFError if the server closes the connection first."""
        response = self._read_any(method)
        while response.status == 100:
            response = self._read_any(method)
        return response

    def read_continue(self) -> None:
        """Read a 100 Continue response."""
        response = self._read_any("GET")
        assert response.status == 100, response

    def read_to_end(self) -> bytes:
        """Read until the server closes or resets the connection; otherwise raises TimeoutError."""
        try:
            while data := self.socket.recv(65_536):
                self._received += data
        except ConnectionError:
            pass
        rest = bytes(self._received)
        self._received.clear()
        return rest

    def reset(self) -> None:
        """Close with an RST."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def _read_any(self, method: str) -> Response:
        version, status, *_ = self._take_line().split(maxsplit=2)
        assert version.startswith("HTTP/1."), f"not a response: {version}"
        headers: dict[str, str] = {}
        while line := self._take_line():
            name, _, value = line.partition(":")
            key = name.lower()
            headers[key] = f"{headers[key]}, {value.strip()}" if key in headers else value.strip()
        assert "transfer-encoding" not in headers, headers
        has_body = method != "HEAD" and int(status) >= 200 and int(status) not in (204, 304)
        length = int(headers["content-length"]) if has_body else 0
        return Response(version, int(status), headers, self._take(length))

    def _take_line(self) -> str:
        while (end := self._received.find(b"\r\n")) < 0:
            self._receive()
        line = self._received[:end].decode("latin-1")
        del self._received[: end + 2]
        return line

    def _take(self, length: int) -> bytes:
        while len(self._received) < length:
            self._receive()
        data = bytes(self._received[:length])
        del self._received[:length]
        return data

    def _receive(self) -> None:
        data = self.socket.recv(65_536)
        if not data:
            raise EOFError(f"the server closed the connection; unfinished: {bytes(self._received)!r}")
        self._received += data


@dataclass(frozen=True)
class Route:
    """An inference request to the `colours` model, for one of three colours."""

    path: str
    content_type: bytes
    body: Callable[[str], bytes]
    label: Callable[[bytes], str]


def _predict_body(colour: str) -> bytes:
    image = base64.b64encode(picture(colour)).decode()
    return json.dumps({"signature_name": "image_bytes", "instances": [{"image_bytes": {"b64": image}}]}).encode()


def _infer_body(colour: str) -> bytes:
    pixels = [255 if colour == name else 0 for name in ("red", "green", "blue")] * (32 * 32)
    tensor = {"name": "images", "datatype": "UINT8", "shape": [1, 32, 32, 3], "data": pixels}
    return json.dumps({"inputs": [tensor]}).encode()


def _infer_label(body: bytes) -> str:
    outputs = {output["name"]: output["data"] for output in json.loads(body)["outputs"]}
    label: str = outputs["label"][0]
    return label


ROUTES = {
    "predict": Route("/predict", b"image/png", picture, lambda body: str(json.loads(body)["predictions"][0]["label"])),
    "v1": Route(
        "/v1/models/colours:predict",
        JSON,
        _predict_body,
        lambda body: str(json.loads(body)["predictions"][0]["label"]),
    ),
    "v2": Route("/v2/models/colours/infer", JSON, _infer_body, _infer_label),
}


def post(path: str, body: bytes, *headers: bytes, content_type: bytes = JSON) -> bytes:
    """A POST request with Content-Length."""
    return head(path, b"Content-Length: %d" % len(body), *headers, content_type=content_type) + body


def post_chunked(path: str, body: bytes, *headers: bytes, content_type: bytes = JSON, size: int = 50) -> bytes:
    """A POST request with a chunked body."""
    start = head(path, b"Transfer-Encoding: chunked", *headers, content_type=content_type)
    return start + chunked(body, size) + b"0\r\n\r\n"


def head(path: str, *headers: bytes, content_type: bytes = JSON) -> bytes:
    """Request line and headers of a POST, with the empty line."""
    lines = [f"POST {path} HTTP/1.1".encode(), b"Host: x", b"Content-Type: " + content_type, *headers]
    return b"\r\n".join([*lines, b"", b""])


def chunked(body: bytes, size: int) -> bytes:
    """Chunks of this size, without the last-chunk."""
    parts = (body[start : start + size] for start in range(0, len(body), size))
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts)


def noisy_png() -> bytes:
    """A 1 MB image, which is a large upload."""
    noise = np.random.default_rng(0).integers(0, 256, (600, 600, 3), np.uint8)
    return encode(Image.fromarray(noise))


def request(server: Server, data: bytes, *, method: str = "GET") -> Response:
    """Send one request on a new connection; return its response."""
    with Client(server.port) as client:
        client.send(data)
        return client.read(method)


def error_of(response: Response) -> str:
    """Message of a JSON error."""
    message: str = json.loads(response.body)["error"]
    return message


# Resources of the server process


def count_descriptors(server: Server) -> int:
    return len(list(Path(f"/proc/{server.process.pid}/fd").iterdir()))


def resident_bytes(server: Server) -> int:
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) * 1024


def holds(server: Server, client: Client) -> bool:
    """Whether the server process still has the connection open."""
    return client.socket.getsockname()[1] in held_ports(server)


def send_queues(server: Server) -> dict[int, int]:
    """Bytes that the client has not received, by its port, of the server's open connections."""
    queues = {}
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        # A socket that the process has closed has no inode.
        if int(fields[1].split(":")[1], 16) == server.port and fields[9] != "0" and fields[3] != "0A":
            queues[int(fields[2].split(":")[1], 16)] = int(fields[4].split(":")[0], 16)
    return queues


def held_ports(server: Server) -> set[int]:
    """Client ports of the server's open connections."""
    return set(send_queues(server))


def wait_until(condition: Callable[[], bool], what: str, within_s: float = 10) -> None:
    end_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end_s, f"not within {within_s} s: {what}"
        time.sleep(0.05)


def health_latency_s(server: Server) -> float:
    """Latency of /healthz on a new connection."""
    start_s = time.perf_counter()
    assert request(server, HEALTH).status == 200
    return time.perf_counter() - start_s


# Server processes


def limit_files(server: Server, limit: int) -> None:
    """Set the soft and hard limit of open files; called right after the start."""
    resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (limit, limit))


@pytest.fixture(scope="session")
def one_model(colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models folder with `colours` version 1; read-only."""
    folder = tmp_path_factory.mktemp("one-model")
    shutil.copytree(colours, folder / "colours" / "1")
    return folder


@pytest.fixture(scope="module")
def start(one_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Server]]:
    """Start a server of the model with these options; killed after the module's tests."""
    servers: list[Server] = []
    folder = tmp_path_factory.mktemp("http")

    def start_server(*options: str, models_dir: Path = one_model) -> Server:
        servers.append(Server(models_dir, folder / f"server{len(servers)}.log", *options))
        return servers[-1]

    yield start_server
    for server in servers:
        if server.process.poll() is None:
            server.process.kill()
            server.process.wait()


@pytest.fixture(scope="module")
def server(start: Callable[..., Server]) -> Iterator[Server]:
    """A server for the module's tests, with default settings. It must exit with 0 and log no traceback."""
    server = start()
    server.wait_for("/readyz")
    yield server
    assert server.stop() == 0
    assert "Traceback" not in server.log, server.log
