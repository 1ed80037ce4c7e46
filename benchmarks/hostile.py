"""Requests that cost a server far more than their senders: each attack is a set of calls that are sent at once.

They run in a process of their own that the scheduler lets run when nothing else does (`HostileProcess`), so that the
clients beside them are delayed by the server only.
"""

from __future__ import annotations

import http.client
import multiprocessing
import os
import select
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Self

TIMEOUT_S = 60
PREDICT = "/tensorflow.serving.PredictionService/Predict"
PIECE_BYTES = 256 * 1024

# A server may serve an expensive request, or refuse it, but it may not fail.
HTTP_STATUSES = frozenset({"200", "400", "404", "408", "413", "415", "422", "429", "431", "503", "504"})
GRPC_STATUSES = frozenset(
    {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "RESOURCE_EXHAUSTED", "UNAVAILABLE", "DEADLINE_EXCEEDED"}
)


@dataclass(frozen=True)
class Server:
    """Where the requests go, and the models there."""

    url: str
    grpc_address: str
    model: str  # takes 32x32 pixels, or files of images
    slow_model: str = ""  # takes x float (n, any)
    unbatched_model: str = ""  # takes x float (2,)
    wide_model: str = ""  # takes x float (n, 1); its output is large

    @property
    def http_address(self) -> tuple[str, int]:
        host, _, port = self.url.rpartition("//")[2].rpartition(":")
        return host, int(port)


@dataclass(frozen=True)
class HttpCall:
    path: str
    body: bytes = field(repr=False)
    headers: Mapping[str, str] = field(default_factory=dict)
    chunked: bool = False
    expected: frozenset[str] = HTTP_STATUSES


@dataclass(frozen=True)
class GrpcCall:
    message: bytes = field(repr=False)
    compressed: bool = False
    expected: frozenset[str] = GRPC_STATUSES
    method: str = PREDICT


Call = HttpCall | GrpcCall


@dataclass(frozen=True)
class Outcome:
    """What became of a call; the status is a number of HTTP, a name of gRPC, or "none" for a lost connection."""

    what: str
    status: str
    seconds: float
    text: str
    fault: str | None  # what is wrong with the response

    def __str__(self) -> str:
        return f"{self.what}: {self.status} after {self.seconds:.2f} s {self.text[:100]}"


def frame_in_chunks(body: bytes) -> bytes:
    """Return a body in chunked transfer coding."""
    pieces = (body[start : start + PIECE_BYTES] for start in range(0, len(body), PIECE_BYTES))
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


def send_http(address: tuple[str, int], call: HttpCall) -> tuple[str, Mapping[str, str], str]:
    """Send a request until all of it is sent or a response comes, and return status, headers and body."""
    head = [f"POST {call.path} HTTP/1.1", f"Host: {address[0]}:{address[1]}", "Connection: close"]
    head += [f"{name}: {value}" for name, value in call.headers.items()]
    head.append("Transfer-Encoding: chunked" if call.chunked else f"Content-Length: {len(call.body)}")
    view = memoryview(frame_in_chunks(call.body) if call.chunked else call.body)
    with socket.create_connection(address, timeout=TIMEOUT_S) as connection:
        try:
            connection.sendall("\r\n".join([*head, "", ""]).encode())
            while view:
                readable, writable, _ = select.select([connection], [connection], [], TIMEOUT_S)
                if readable or not writable:
                    break
                view = view[connection.send(view[:PIECE_BYTES]) :]
        except (BrokenPipeError, ConnectionResetError):
            pass  # a response may have come before
        response = http.client.HTTPResponse(connection)
        response.begin()
        text = response.read(2_000).decode(errors="replace")
        while response.read(2**20):
            pass
        return str(response.status), dict(response.headers.items()), text


def send_grpc(address: str, call: GrpcCall) -> tuple[str, str]:
    """Call Predict with the message as it is; returns the status' name and its text."""
    import grpc

    options = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
    options.append(("grpc.use_local_subchannel_pool", 1))
    compression = grpc.Compression.Gzip if call.compressed else grpc.Compression.NoCompression
    with grpc.insecure_channel(address, options=options, compression=compression) as channel:
        try:
            channel.unary_unary(call.method)(call.message, timeout=TIMEOUT_S)
        except grpc.RpcError as error:
            return error.code().name, error.details() or ""
    return "OK", ""


def send(server: Server, call: Call) -> Outcome:
    """Send one call and judge the response."""
    started_s = time.monotonic()
    what, text = "gRPC Predict", ""
    headers: dict[str, str] = {}
    try:
        if isinstance(call, GrpcCall):
            status, text = send_grpc(server.grpc_address, call)
        else:
            what = call.path
            status, received, text = send_http(server.http_address, call)
            headers = {name.lower(): value for name, value in received.items()}
    except (OSError, http.client.HTTPException) as error:
        status, text = "none", f"{type(error).__name__}: {error}"
    fault = None
    if status not in call.expected:
        fault = f"expected one of {', '.join(sorted(call.expected))}"
    elif status == "503" and not headers.get("retry-after", "").isdigit():
        fault = "503 without Retry-After in seconds"
    return Outcome(what, status, time.monotonic() - started_s, text, fault)


def send_at_once(server: Server, calls: Sequence[Call]) -> list[Outcome]:
    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(lambda call: send(server, call), calls))


def run_attacks(names: Sequence[str], server: Server, seconds: float) -> dict[str, list[Outcome]]:
    """Make all attacks at the same time, each again until so many seconds have passed."""
    from benchmarks.attacks import ATTACKS

    until_s = time.monotonic() + seconds

    def run(name: str) -> list[Outcome]:
        outcomes = ATTACKS[name](server)
        while time.monotonic() < until_s:
            outcomes += ATTACKS[name](server)
        return outcomes

    with ThreadPoolExecutor(len(names)) as pool:
        return dict(zip(names, pool.map(run, names), strict=True))


def prepare_attacks(names: Sequence[str], server: Server) -> None:
    """Make the bodies of attacks, which takes up to seconds."""
    from benchmarks.attacks import CALLS, make_calls

    for name in names:
        if name in CALLS:
            make_calls(name, server)


def count_outcomes(outcomes: Iterable[Outcome]) -> dict[str, int]:
    """Count them by status."""
    counts: dict[str, int] = {}
    for outcome in outcomes:
        counts[outcome.status] = counts.get(outcome.status, 0) + 1
    return counts


def give_way() -> None:
    """Let this process run only while a core has nothing else to do.

    A low priority is not enough: a hundred threads of low priority have more weight together than a few of the server.
    """
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


class HostileProcess:
    """A process that makes attacks, and gives way to all others."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(1, mp_context=context, initializer=give_way)

    def prepare(self, names: Sequence[str], server: Server) -> None:
        """Make the bodies, so that `start` sends them at once."""
        self._pool.submit(prepare_attacks, tuple(names), server).result()

    def start(self, names: Sequence[str], server: Server, *, seconds: float = 0) -> Future[dict[str, list[Outcome]]]:
        """Make all attacks at the same time, each at least once and again until so many seconds have passed."""
        return self._pool.submit(run_attacks, tuple(names), server, seconds)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
