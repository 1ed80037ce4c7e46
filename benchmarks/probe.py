"""Well-behaved clients in a process of their own: they send small requests at fixed times and note the latencies.

A latency counts from when the request was due, so that a server that stops for a second delays all requests due in it.
The process is not the one that misbehaves, so that what is measured is the server's delay and not the other client's.
"""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

import click
import numpy as np

from benchmarks import payloads

PROJECT = Path(__file__).parents[1]
TIMEOUT_S = 30
PREDICT = "/tensorflow.serving.PredictionService/Predict"
KINDS = ("healthz", "upload", "json", "base64", "v2", "grpc", "large")
PER_S = {"healthz": 25.0, "large": 4.0}
DEFAULT_PER_S = 15.0
# Connections of each kind, which take turns: a response that comes late does not make the next request late.
CONNECTIONS = 8
LARGE_ROWS = 48  # more than 256 KB of JSON


@dataclass(frozen=True)
class Sample:
    """One request: when it was due, how long it took from then on, and what was wrong with its response."""

    kind: str
    connection: int
    due_s: float  # on the clock of time.monotonic
    latency_s: float
    error: str | None


@dataclass(frozen=True)
class Latencies:
    """The requests of one kind that were due in a window."""

    kind: str
    samples: Sequence[Sample]

    @property
    def errors(self) -> list[str]:
        return [sample.error for sample in self.samples if sample.error]

    def percentile_s(self, percent: float) -> float:
        """Return a percentile of the latencies; infinity where there are none."""
        if not self.samples:
            return float("inf")
        return float(np.percentile([sample.latency_s for sample in self.samples], percent))

    def __str__(self) -> str:
        p50, p95, p99, most = (f"{self.percentile_s(percent) * 1e3:,.0f}" for percent in (50, 95, 99, 100))
        failed = f", {len(self.errors)} failed: {self.errors[0]}" if self.errors else ""
        return f"{self.kind}: {len(self.samples)} requests, p50 {p50}, p95 {p95}, p99 {p99}, max {most} ms{failed}"


class ProbeProcess:
    """The clients, from the start of the block to its end.

    Args:
        url: the server's.
        grpc_address: host:port.
        model: takes 32x32 pixels; asked for in every request that is not /healthz.
        kinds: which requests, of KINDS.
        log: where the samples go.
        expect: what each response of the model has to contain; for an all red image.
    """

    def __init__(
        self, url: str, grpc_address: str, *, model: str, kinds: Sequence[str], log: Path, expect: str = ""
    ) -> None:
        self._log = log
        self._kinds = kinds
        self._position = 0
        self._samples: list[Sample] = []
        command = [sys.executable, "-m", "benchmarks.probe", "--url", url, "--grpc", grpc_address, "--model", model]
        command += [*(word for kind in kinds for word in ("--kind", kind)), "--expect", expect, "--log", str(log)]
        log.touch()
        self._process = subprocess.Popen(command, cwd=PROJECT, start_new_session=True)
        while not log.stat().st_size:
            if self._process.poll() is not None:
                raise RuntimeError(f"the probe ended with {self._process.returncode}")
            time.sleep(0.05)

    def read_finished(self, since_s: float) -> dict[str, Latencies]:
        """Return the requests due since then that have their responses already, by kind."""
        self._read_log()
        kinds = {sample.kind for sample in self._samples}
        return {k: Latencies(k, [s for s in self._samples if s.kind == k and s.due_s >= since_s]) for k in kinds}

    def read(self, since_s: float, until_s: float) -> dict[str, Latencies]:
        """Return the requests that were due in a window of `time.monotonic`, by kind, once all have their responses."""
        give_up_s = time.monotonic() + TIMEOUT_S + 5
        while True:
            self._read_log()
            last_due_s = {(sample.kind, sample.connection): sample.due_s for sample in self._samples}
            # Each connection works in order, so what it has still to note is due later than its last sample.
            is_complete = all(due_s + interval_s(kind) >= until_s for (kind, _), due_s in last_due_s.items())
            if is_complete and len(last_due_s) == CONNECTIONS * len(self._kinds):
                break
            if self._process.poll() is not None or time.monotonic() > give_up_s:
                raise RuntimeError(f"the probe has stopped: {last_due_s}, now {time.monotonic()}")
            time.sleep(0.05)
        window = [sample for sample in self._samples if since_s <= sample.due_s < until_s]
        return {kind: Latencies(kind, [s for s in window if s.kind == kind]) for kind, _ in last_due_s}

    def _read_log(self) -> None:
        with self._log.open() as file:
            file.seek(self._position)
            text = file.read()
        whole = text[: text.rfind("\n") + 1]
        self._position += len(whole.encode())
        self._samples += [Sample(**json.loads(line)) for line in whole.splitlines()]

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def make_http_client(url: str, kind: str, model: str, expect: bytes) -> Callable[[], None]:
    """Return a function that sends one request and raises where the response is not as it should be."""
    image = payloads.make_small_image()
    red = b"[" + b",".join([b"[" + b",".join([b"[255,0,0]"] * 32) + b"]"] * 32) + b"]"
    pixels = b"\xff\0\0" * 32 * 32
    tensor = b'{"name":"images","datatype":"UINT8","shape":[1,32,32,3],"parameters":{"binary_data_size":3072}}'
    head = b'{"inputs":[%s]}' % tensor
    json_kind = {"Content-Type": "application/json"}
    v2_headers = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(len(head))}
    requests: dict[str, tuple[str, str, bytes, dict[str, str]]] = {
        "healthz": ("GET", "/healthz", b"", {}),
        "upload": ("POST", f"/predict?model={model}", image, {"Content-Type": "image/png"}),
        "json": ("POST", f"/v1/models/{model}:predict", payloads.make_v1_json(b"[" + red + b"]"), json_kind),
        "base64": ("POST", f"/v1/models/{model}:predict", payloads.make_b64_json([image]), json_kind),
        "v2": ("POST", f"/v2/models/{model}/infer", head + pixels, v2_headers),
        "large": (
            "POST",
            f"/v1/models/{model}:predict",
            payloads.make_v1_json(b"[" + b",".join([red] * LARGE_ROWS) + b"]"),
            json_kind,
        ),
    }
    address = urlsplit(url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=TIMEOUT_S)
    request = requests[kind]
    wanted = b"" if kind == "healthz" else expect

    def send() -> None:
        try:
            connection.request(*request)
            response = connection.getresponse()
            body = response.read()
        except (OSError, http.client.HTTPException):
            connection.close()
            raise
        if response.status != 200 or wanted not in body:
            raise ValueError(f"{response.status} {body[:200]!r}")

    return send


def make_grpc_client(address: str, model: str, expect: bytes) -> Callable[[], None]:
    import grpc

    from client.protos import prediction_pb2

    tensor = prediction_pb2.Tensor(dtype=4, tensor_content=b"\xff\0\0" * 32 * 32)
    for size in (1, 32, 32, 3):
        tensor.tensor_shape.dim.add(size=size)
    message = payloads.make_message(model, tensor)
    # A server that was away is asked again at once, as a new client would.
    call = grpc.insecure_channel(address, options=[("grpc.max_reconnect_backoff_ms", 200)]).unary_unary(PREDICT)

    def send() -> None:
        try:
            body = call(message, timeout=TIMEOUT_S)
        except grpc.RpcError as error:
            raise ValueError(f"{error.code().name} {error.details()}") from error
        if expect not in body:
            raise ValueError(f"{body[:200]!r}")

    return send


def interval_s(kind: str) -> float:
    """Return the time between two requests of one connection."""
    return CONNECTIONS / PER_S.get(kind, DEFAULT_PER_S)


def send_on_time(kind: str, connection: int, send: Callable[[], None], note: Callable[[Sample], None]) -> None:
    """Send every so many-th request of one kind when it is due, for ever."""
    due_s = time.monotonic() + connection * interval_s(kind) / CONNECTIONS
    while True:
        time.sleep(max(0.0, due_s - time.monotonic()))
        error = None
        try:
            send()
        except Exception as problem:  # whatever it is, it is the result of this request
            error = f"{type(problem).__name__}: {problem}"
        now_s = time.monotonic()
        note(Sample(kind, connection, due_s, now_s - due_s, error))
        due_s += interval_s(kind)


@click.command(context_settings={"show_default": True})
@click.option("--url", required=True)
@click.option("--grpc", "grpc_address", required=True)
@click.option("--model", required=True)
@click.option("--kind", "kinds", type=click.Choice(KINDS), multiple=True, default=KINDS)
@click.option("--expect", default="", help="What each response of the model has to contain.")
@click.option("--log", type=click.Path(path_type=Path), required=True, help="A line of JSON for each request.")
def main(url: str, grpc_address: str, model: str, kinds: Sequence[str], expect: str, log: Path) -> None:
    """Send small requests at fixed times until killed."""
    lock = threading.Lock()
    with log.open("a", buffering=1) as file:

        def note(sample: Sample) -> None:
            line = json.dumps(sample.__dict__) + "\n"
            with lock:
                file.write(line)

        threads = []
        for kind in kinds:
            wanted = expect.encode()
            for connection in range(CONNECTIONS):
                if kind == "grpc":
                    send = make_grpc_client(grpc_address, model, wanted)
                else:
                    send = make_http_client(url, kind, model, wanted)
                threads.append(threading.Thread(target=send_on_time, args=(kind, connection, send, note)))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


if __name__ == "__main__":
    main()
