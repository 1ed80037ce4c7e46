"""`make bench-client`: 10,000 pictures from a folder through the running service, by the client's two ways.

Beside it, what the service sustains when a load generator sends it the same requests.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click

from benchmarks.load import Target, run_closed_loop, run_closed_loop_grpc
from benchmarks.serve import BODIES, MODEL, answers, encode_png, export_article_model, make_images
from benchmarks.server_process import ServerProcess, free_port
from client import Client, GrpcClient, find_images
from client.client import REQUESTS_IN_FLIGHT, BatchingClient
from client.grpc import FILES_INPUT, FILES_SIGNATURE
from client.options import DEFAULT_BATCH_SIZE
from client.protos import prediction_pb2


def write_pictures(folder: Path, count: int) -> list[bytes]:
    """Write PNG files of 32 x 32 pixels; returns what is in the first of them."""
    folder.mkdir()
    files = [encode_png(image) for image in make_images(count)]
    for index, data in enumerate(files):
        (folder / f"{index:05}.png").write_bytes(data)
    return files[: BODIES * DEFAULT_BATCH_SIZE]


def make_upload_target(url: str, files: list[bytes]) -> Target:
    """Make the requests that `Client` sends: multipart forms of a batch of files."""
    boundary = "b" * 32
    bodies = []
    for start in range(0, len(files), DEFAULT_BATCH_SIZE):
        parts = [
            b'--%b\r\nContent-Disposition: form-data; name="image"; filename="%05d.png"\r\n'
            b"Content-Type: application/octet-stream\r\n\r\n%b\r\n" % (boundary.encode(), start + offset, data)
            for offset, data in enumerate(files[start : start + DEFAULT_BATCH_SIZE])
        ]
        bodies.append(b"".join(parts) + f"--{boundary}--\r\n".encode())
    headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    return Target(url + "/predict", headers, bodies, images=DEFAULT_BATCH_SIZE)


def make_grpc_target(address: str, files: list[bytes]) -> Target:
    """Make the requests that `GrpcClient` sends."""
    bodies = []
    for start in range(0, len(files), DEFAULT_BATCH_SIZE):
        batch = files[start : start + DEFAULT_BATCH_SIZE]
        tensor = prediction_pb2.Tensor(dtype=7, string_val=batch)
        tensor.tensor_shape.dim.add(size=len(batch))
        spec = prediction_pb2.ModelSpec(name=MODEL, signature_name=FILES_SIGNATURE)
        request = prediction_pb2.PredictRequest(
            model_spec=spec, inputs={FILES_INPUT: tensor}, output_filter=("probabilities", "class_id", "label")
        )
        bodies.append(request.SerializeToString())
    return Target(address, {}, bodies, images=DEFAULT_BATCH_SIZE)


def time_client(client: BatchingClient, folder: Path) -> float:
    """Return the pictures a second that a client gets through a folder with."""
    started_s = time.perf_counter()
    count = sum(1 for _ in client.predict_iter(find_images(folder)))
    return count / (time.perf_counter() - started_s)


@click.command(context_settings={"show_default": True})
@click.option("--pictures", type=int, default=10_000)
@click.option("--rounds", type=int, default=3, help="Alternating; the median counts.")
@click.option("--output", type=click.Path(path_type=Path), default=Path("benchmarks/results/client.json"))
def main(pictures: int, rounds: int, output: Path) -> None:
    """Measure the client beside a load generator that sends the same requests."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        export_article_model(folder / "models")
        files = write_pictures(folder / "pictures", pictures)
        port, grpc_port = free_port(), free_port()
        url, address = f"http://127.0.0.1:{port}", f"127.0.0.1:{grpc_port}"
        command = [sys.executable, "-m", "serving", "--models-dir", str(folder / "models"), "--log-level", "warning"]
        server = ServerProcess(
            [*command, "--rest-port", str(port), "--grpc-port", str(grpc_port)],
            is_ready=answers(url + "/readyz"),
            env={},
            log=folder / "log",
        )
        rates: dict[str, list[float]] = {}

        def measure(what: str, run: Callable[[], float]) -> None:
            click.echo(f"{what} ...", err=True)
            rates.setdefault(what, []).append(run())

        upload, predict = make_upload_target(url, files), make_grpc_target(address, files)
        with server, Client(url) as rest, GrpcClient(address, model=MODEL) as grpc:
            for _ in range(rounds):
                measure("HTTP client", lambda: time_client(rest, folder / "pictures"))
                measure("HTTP load", lambda: _images_per_s(run_closed_loop, upload))
                measure("gRPC client", lambda: time_client(grpc, folder / "pictures"))
                measure("gRPC load", lambda: _images_per_s(run_closed_loop_grpc, predict))
    medians = {what: statistics.median(values) for what, values in rates.items()}
    click.echo("| way | client, images/s | load generator, images/s | ratio |\n|---|---:|---:|---:|")
    for way in ("HTTP", "gRPC"):
        client, load = medians[f"{way} client"], medians[f"{way} load"]
        click.echo(f"| {way} | {client:,.0f} | {load:,.0f} | {client / load:.2f} |")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({"images_per_s": rates, "pictures": pictures}, indent=2) + "\n")


def _images_per_s(run: Callable[..., object], target: Target) -> float:
    measured = run(target, connections=REQUESTS_IN_FLIGHT, seconds=4)
    assert not measured.errors
    return measured.requests_per_s * target.images


if __name__ == "__main__":
    main()
