"""A service with two workers on its model `versioned`, and clients that note every failure."""

from __future__ import annotations

import contextlib
import http.client
import json
import select
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
import tensorflow as tf
from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

from tests.contract.test_swaps import publish
from tests.serving.conftest import Server

HUNG_S = 10
# Shorter times than a user's, so that a hung worker is replaced and clients of gRPC move on within the test.
PROGRAM = f"""
from serving.__main__ import main
from serving.workers import supervisor
supervisor.HUNG_S, supervisor.CONNECTION_AGE_S = {HUNG_S}, 1
main()
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    publish(folder / "versioned", 1)
    return folder


@pytest.fixture(scope="module")
def server(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    options = "--workers", "2", "--poll-interval-s", "0.2", "--allow-model-control"
    server = Server(models, tmp_path_factory.mktemp("log") / "log", *options, program=("-c", PROGRAM))
    server.wait_until(lambda: len(serving_workers(server)) == 2)
    server.wait_for("/readyz")
    yield server
    if server.process.poll() is None:
        server.process.kill()
        server.process.wait()


def worker_pids(server: Server) -> list[int]:
    """Return the processes of all workers, in the order of their start."""
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text()
    return [int(pid) for pid in children.split()]


def serving_workers(server: Server) -> list[int]:
    """Return the workers that accept connections, as the supervisor has logged it."""
    return [pid for pid in worker_pids(server) if f"(process {pid}) serves" in server.log]


def connections_of(pid: int, port: int) -> set[int]:
    """Return the clients' ports of a process' connections to a port of this machine."""
    inodes = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            inodes.add(str(entry.readlink()).removeprefix("socket:[").removesuffix("]"))
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            fields = line.split()
            local, remote = (int(field.rpartition(":")[2], 16) for field in fields[1:3])
            if local == port and remote and fields[9] in inodes:
                found.add(remote)
    return found


class HttpConnection:
    """A keep-alive connection that notes the versions it was told."""

    def __init__(self, port: int) -> None:
        self._http = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        self._http.connect()
        self.port: int = self._http.sock.getsockname()[1]

    def close(self) -> None:
        self._http.close()

    def request(self, method: str, path: str, document: object = None) -> tuple[int, bytes]:
        """Send a request, and return the status and the body of the response."""
        body = None if document is None else json.dumps(document)
        self._http.request(method, path, body, {"Content-Type": "application/json"} if body else {})
        response = self._http.getresponse()
        return response.status, response.read()

    def predict(self) -> int:
        """Return the version that responds; fails if a response mixes versions."""
        status, body = self.request("POST", "/v1/models/versioned:predict", {"instances": [1.0, 2.0]})
        assert status == 200, body
        (version,) = {value for row in json.loads(body)["predictions"] for value in row.values()}
        return int(version)

    @property
    def is_closed(self) -> bool:
        """Whether the server has closed it after its last response, as clients check before they use it again."""
        return self._http.sock is None or bool(select.select([self._http.sock], [], [], 0)[0])


class GrpcConnection:
    """A channel with a connection of its own."""

    def __init__(self, port: int) -> None:
        options = [("grpc.use_local_subchannel_pool", 1)]
        self._channel = grpc.insecure_channel(f"127.0.0.1:{port}", options=options)
        self._stub = prediction_service_pb2_grpc.PredictionServiceStub(self._channel)
        self._request = predict_pb2.PredictRequest()
        self._request.model_spec.name = "versioned"
        self._request.inputs["x"].CopyFrom(tf.make_tensor_proto([1.0, 2.0]))
        self.port = 0
        self.is_closed = False

    def close(self) -> None:
        self._channel.close()

    def predict(self) -> int:
        response = self._stub.Predict(self._request, timeout=60)
        (version,) = {value for tensor in response.outputs.values() for value in tensor.int_val}
        assert version == response.model_spec.version.value
        return int(version)


Connection = HttpConnection | GrpcConnection


class Client:
    """Sends one request after the other, on a new connection after a failure; notes what each connection was told."""

    def __init__(self, connect: Callable[[], Connection]) -> None:
        self._connect = connect
        self._stop = threading.Event()
        self.failures: list[tuple[int, Exception]] = []  # with the connection's own port; 0 over gRPC
        self.versions: list[list[int]] = []  # of each connection
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self._use(self._connect())
        except BaseException as error:
            self.error = error

    def _use(self, connection: Connection) -> None:
        versions: list[int] = []
        self.versions.append(versions)
        with contextlib.closing(connection):
            while not self._stop.is_set() and not connection.is_closed:
                try:
                    versions.append(connection.predict())
                except (OSError, http.client.HTTPException, grpc.RpcError) as error:
                    self.failures.append((connection.port, error))
                    return

    @property
    def count(self) -> int:
        """How many requests were answered."""
        return sum(map(len, self.versions))

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(timeout=120)
        assert not self._thread.is_alive()
        assert self.error is None, self.error


class Load:
    """Constant load on both ports, from clients with a connection each; a context manager."""

    def __init__(self, server: Server, *, each: int = 4) -> None:
        self._server = server
        self.http = [Client(lambda: HttpConnection(server.port)) for _ in range(each)]
        self.grpc = [Client(lambda: GrpcConnection(server.grpc_port)) for _ in range(each)]
        self.wait()

    @property
    def clients(self) -> list[Client]:
        return [*self.http, *self.grpc]

    @property
    def failures(self) -> list[tuple[int, Exception]]:
        return [failure for client in self.clients for failure in client.failures]

    def wait(self, requests: int = 3) -> None:
        """Wait until every client has so many more responses."""
        before = [client.count for client in self.clients]
        self._server.wait_until(
            lambda: all(
                client.error or client.count >= count + requests
                for client, count in zip(self.clients, before, strict=True)
            )
        )

    def __enter__(self) -> Load:
        return self

    def __exit__(self, *_: object) -> None:
        for client in self.clients:
            client.stop()
