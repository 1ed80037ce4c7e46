"""`make bench-serve`: this service beside the plain Flask script, LitServe, BentoML and TensorFlow Serving.

One model, the same requests, every server a real process, alternating rounds in one run. Medians of the rounds are
printed as a table and written as JSON.
"""

from __future__ import annotations

import base64
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import click
import httpx
import numpy as np
from PIL import Image

from benchmarks.load import Measured, Target, run_closed_loop, run_closed_loop_grpc
from benchmarks.open_loop import run_open_loop
from benchmarks.server_process import ServerProcess, free_port, resident_mb

PROJECT = Path(__file__).parents[1]
PEERS_ENV = PROJECT / ".venv-peers"
FORMS = ("json", "base64", "upload", "v2", "grpc", "v2 x64", "grpc x64")
BODIES = 16  # different ones, sent in turn
MODEL = "article"
OURS = "this service"


@dataclass
class Contestant:
    """A running server: its requests for one form, and what the rounds gave, by connections."""

    name: str
    target: Target
    process: ServerProcess | None  # None: started by someone else
    rounds: dict[int | str, list[Measured]] = field(default_factory=dict)
    cpu_ms: dict[int | str, list[float]] = field(default_factory=dict)  # per request
    memory_mb: float = 0.0

    def measure(self, key: int | str, run: Callable[[], Measured]) -> None:
        before = self.process.cpu_s() if self.process else 0.0
        measured = run()
        self.rounds.setdefault(key, []).append(measured)
        if self.process:
            self.cpu_ms.setdefault(key, []).append((self.process.cpu_s() - before) / max(1, measured.requests) * 1e3)
            self.memory_mb = self.process.memory_mb()


def make_images(count: int, side: int = 32) -> np.ndarray:
    """Return pictures with something in them: smooth colours and noise, uint8 (count, side, side, 3)."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    smooth = [np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC)) for image in coarse]
    return np.clip(np.stack(smooth) + rng.normal(0, 12, (count, side, side, 3)), 0, 255).astype(np.uint8)


def encode_png(image: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return stream.getvalue()


def as_multipart(png: bytes, *, field_name: str) -> tuple[bytes, str]:
    request = httpx.Request("POST", "http://x", files={field_name: ("image.png", png, "image/png")})
    return request.read(), request.headers["content-type"]


def make_target(url: str, form: str, *, key: str = "instances", field_name: str = "image", side: int = 32) -> Target:
    """Make the requests of one form, as one server wants them, with images of `side` x `side` pixels."""
    if form.startswith(("v2", "grpc")):
        return _make_tensor_target(url, form, side)
    images = make_images(BODIES, side)
    if form == "upload":
        # One boundary for all, so that all can have one header.
        bodies, kinds = zip(*(as_multipart(encode_png(image), field_name=field_name) for image in images), strict=True)
        boundary = kinds[0].partition("boundary=")[2]
        bodies = tuple(
            body.replace(kind.partition("boundary=")[2].encode(), boundary.encode())
            for body, kind in zip(bodies, kinds, strict=True)
        )
        return Target(url, {"Content-Type": kinds[0]}, bodies)
    documents: list[dict[str, object]] = []
    for image in images:
        text = base64.b64encode(encode_png(image)).decode()
        if form == "json":
            documents.append({key: [image.tolist()]})
        else:
            documents.append({key: [text if key == "images" else {"b64": text}]})
    if form == "base64" and ":predict" in url:
        documents = [{"signature_name": "image_bytes", **document} for document in documents]
    bodies = tuple(json.dumps(document, separators=(",", ":")).encode() for document in documents)
    return Target(url, {"Content-Type": "application/json"}, bodies)


def _make_tensor_target(url: str, form: str, side: int) -> Target:
    rows = 64 if form.endswith("x64") else 1
    batches = make_images(BODIES * rows, side).reshape(BODIES, rows, side, side, 3)
    if form.startswith("grpc"):
        from client.protos import prediction_pb2

        bodies = []
        for batch in batches:
            tensor = prediction_pb2.Tensor(dtype=4, tensor_content=batch.tobytes())
            for size in batch.shape:
                tensor.tensor_shape.dim.add(size=size)
            spec = prediction_pb2.ModelSpec(name=MODEL)
            request = prediction_pb2.PredictRequest(model_spec=spec, inputs={"images": tensor})
            bodies.append(request.SerializeToString())
        return Target(url, {}, bodies, images=rows)
    parameters = {"binary_data_size": batches[0].nbytes}
    tensor = {"name": "images", "shape": batches.shape[1:], "datatype": "UINT8", "parameters": parameters}
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    headers = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(len(head))}
    return Target(url, headers, [head + batch.tobytes() for batch in batches], images=rows)


def answers(url: str, *, wanted: str = "") -> Callable[[], bool]:
    """Say whether a server answers 200 at `url`, with these words."""

    def ask() -> bool:
        try:
            reply = httpx.get(url, timeout=2)
        except httpx.HTTPError:
            return False
        return reply.status_code == 200 and wanted in reply.text

    return ask


def accepts(target: Target) -> Callable[[], bool]:
    """Say whether a server answers the first request well."""

    def ask() -> bool:
        try:
            reply = httpx.post(target.url, content=target.bodies[0], headers=dict(target.headers), timeout=30)
        except httpx.HTTPError:
            return False
        return reply.status_code == 200

    return ask


def make_path(form: str) -> str:
    """Return this service's path for requests of a form over HTTP."""
    paths = {"upload": "/predict", "v2": f"/v2/models/{MODEL}/infer"}
    return paths.get(form.split()[0], f"/v1/models/{MODEL}:predict")


def start_ours(
    form: str,
    models: Path,
    log: Path,
    *,
    project: Path = PROJECT,
    options: Sequence[str] = (),
    cores: Sequence[int] = (),
) -> Contestant:
    """Start this service, or that of another checkout, with what it does by itself or with other `options`.

    With `cores`, it may use only these.
    """
    port, grpc_port = free_port(), free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "serving", "--models-dir", str(models), "--rest-port", str(port)]
    process = ServerProcess(
        [*command, "--grpc-port", str(grpc_port), "--log-level", "warning", *options],
        is_ready=answers(url + "/readyz"),
        env={},
        log=log,
        cwd=project,
        cores=cores,
    )
    address = f"127.0.0.1:{grpc_port}" if form.startswith("grpc") else url + make_path(form)
    return Contestant(OURS, make_target(address, form), process)


def start_flask_script(form: str, model: Path, log: Path) -> Contestant:
    port = free_port()
    command = [str(PEERS_ENV / "bin" / "gunicorn"), "-w", "2", "-b", f"127.0.0.1:{port}"]
    target = make_target(f"http://127.0.0.1:{port}/predict", form)
    app = "benchmarks.peers.flask_script:app"
    process = ServerProcess([*command, app], is_ready=accepts(target), env={"MODEL": str(model)}, log=log)
    return Contestant("Flask script, gunicorn", target, process)


def start_litserve(form: str, model: Path, log: Path) -> Contestant:
    port = free_port()
    target = make_target(f"http://127.0.0.1:{port}/predict", form, field_name="request")
    command = [str(PEERS_ENV / "bin" / "python"), "-m", "benchmarks.peers.litserve_server"]
    env = {"MODEL": str(model), "FORM": form, "PORT": str(port)}
    return Contestant("LitServe", target, ServerProcess(command, is_ready=accepts(target), env=env, log=log))


def start_bentoml(form: str, model: Path, log: Path) -> Contestant:
    port = free_port()
    path = {"json": "pixels", "base64": "base64", "upload": "upload"}[form]
    target = make_target(f"http://127.0.0.1:{port}/{path}", form, key="images", field_name="images")
    command = [str(PEERS_ENV / "bin" / "bentoml"), "serve", "benchmarks.peers.bentoml_service:Classifier"]
    process = ServerProcess(
        [*command, "--host", "127.0.0.1", "--port", str(port)],
        is_ready=accepts(target),
        env={"MODEL": str(model), "BENTOML_DO_NOT_TRACK": "1", "BENTOML_HOME": str(log.parent / "bentoml")},
        log=log,
    )
    return Contestant("BentoML", target, process)


PEERS = {"flask": start_flask_script, "litserve": start_litserve, "bentoml": start_bentoml}


def name_tensorflow_serving(form: str) -> Contestant | None:
    """Return the TensorFlow Serving that TFSERVING_URL names (and TFSERVING_GRPC), which serves the model already."""
    url = os.environ.get("TFSERVING_GRPC" if form.startswith("grpc") else "TFSERVING_URL")
    if not url or form in ("upload", "v2", "v2 x64"):
        return None
    address = url if form.startswith("grpc") else f"{url}/v1/models/{MODEL}:predict"
    return Contestant("TensorFlow Serving", make_target(address, form), None)


def install_peers() -> None:
    if (PEERS_ENV / "bin" / "bentoml").exists():
        return
    click.echo(f"installing the peers into {PEERS_ENV.name} (once, minutes) ...", err=True)
    subprocess.run([sys.executable, "-m", "venv", str(PEERS_ENV)], check=True)
    requirements = str(PROJECT / "benchmarks" / "peers" / "requirements.txt")
    subprocess.run([str(PEERS_ENV / "bin" / "pip"), "install", "--quiet", "-r", requirements], check=True)


def export_article_model(models: Path) -> Path:
    """Export the article's network, its weights drawn at random: speed does not depend on them."""
    program = (
        "import sys; from pathlib import Path; from benchmarks.exported import draw_network, publish; "
        f"publish(draw_network('sequential'), 'sequential', Path(sys.argv[1]), name='{MODEL}')"
    )
    subprocess.run([sys.executable, "-c", program, str(models)], check=True, cwd=PROJECT, capture_output=True)
    return models / MODEL / "1"


def measure_model_alone(model: Path, seconds: float) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.model_alone", str(model), str(seconds)]
    done = subprocess.run(command, check=True, cwd=PROJECT, capture_output=True, text=True)
    alone: dict[str, float] = json.loads(done.stdout)
    return alone


def measure_start(models: Path, version: Path, folder: Path, *, rounds: int) -> dict[str, float]:
    """Start the service, and a process that imports TensorFlow and loads the model, in turn; return the medians."""
    starts: list[dict[str, float]] = []
    for _ in range(rounds):
        alone = measure_model_alone(version, 0)
        ours = start_ours("v2", models, folder / "start.log").process
        assert ours
        with ours as process:
            ready = {"ready_s": process.ready_after_s, "ready_mb": resident_mb(process.pid)}
        starts.append({"import_s": alone["import_s"], "loaded_mb": alone["memory_mb"], **ready})
    return {name: round(statistics.median(start[name] for start in starts), 2) for name in starts[0]}


def run_form(
    form: str, contestants: Sequence[Contestant], *, connections: Sequence[int], rounds: int, seconds: float
) -> None:
    run = run_closed_loop_grpc if form.startswith("grpc") else run_closed_loop
    for contestant in contestants:
        run(contestant.target, connections=8, seconds=2)  # warm
    measures = [(contestant, count) for count in connections for contestant in contestants]
    for number in range(rounds):
        for contestant, count in measures if number % 2 == 0 else measures[::-1]:
            contestant.measure(count, partial(run, contestant.target, connections=count, seconds=seconds))
    if form.startswith("grpc"):
        return
    for contestant in contestants:
        # Half of what it sustains: what its users see on an ordinary day.
        rate = statistics.median(m.requests_per_s for m in contestant.rounds[max(connections)]) / 2
        for _ in range(rounds):
            send = partial(run_open_loop, contestant.target, requests_per_s=rate, seconds=seconds)
            contestant.measure("open", send)


def summarize(contestant: Contestant) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for key, rounds in contestant.rounds.items():
        rates = [m.requests_per_s for m in rounds]
        rate = statistics.median(rates)
        cpu = contestant.cpu_ms.get(key)
        rows.append(
            {
                "server": contestant.name,
                "connections": key,
                "requests_per_s": round(rate, 1),
                "images_per_s": round(rate * contestant.target.images, 1),
                "spread": round(
                    (max(m.requests_per_s for m in rounds) - min(m.requests_per_s for m in rounds)) / rate, 3
                ),
                "p50_ms": round(statistics.median(m.p50_ms for m in rounds), 3),
                "p99_ms": round(statistics.median(m.p99_ms for m in rounds), 3),
                "errors": sum(m.errors for m in rounds),
                "cpu_s_per_1000": round(statistics.median(cpu), 3) if cpu else None,
                "memory_mb": round(contestant.memory_mb) or None,
            }
        )
    return rows


def format_table(results: dict[str, list[dict[str, object]]]) -> str:
    lines = [
        "| form | connections | server | requests/s | images/s | p50 ms | p99 ms | errors | CPU s/1,000 | memory MB |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for form, rows in results.items():
        for row in sorted(rows, key=lambda row: str(row["connections"]).zfill(4)):
            where = "half rate, open" if row["connections"] == "open" else row["connections"]
            cpu = "" if row["cpu_s_per_1000"] is None else f"{row['cpu_s_per_1000']:.2f}"
            lines.append(
                f"| {form} | {where} | {row['server']} | {row['requests_per_s']:,.0f} | {row['images_per_s']:,.0f} | "
                f"{row['p50_ms']:.2f} | {row['p99_ms']:.1f} | {row['errors']} | {cpu} | {row['memory_mb'] or ''} |"
            )
    return "\n".join(lines)


@click.command(context_settings={"show_default": True})
@click.option("--form", "forms", type=click.Choice(FORMS), multiple=True, default=FORMS, help="What requests hold.")
@click.option("--peer", "peers", type=click.Choice([*PEERS, "none"]), multiple=True, default=tuple(PEERS))
@click.option("--connections", type=int, multiple=True, default=(1, 32, 256))
@click.option("--rounds", type=int, default=3, help="Alternating; the median counts.")
@click.option("--seconds", type=click.IntRange(1), default=4, help="Of each round.")
@click.option("--model", type=click.Path(path_type=Path), help="A version folder.  [default: the article's network]")
@click.option("--output", type=click.Path(path_type=Path), default=Path("benchmarks/results/serve.json"))
def main(
    forms: Sequence[str],
    peers: Sequence[str],
    connections: Sequence[int],
    rounds: int,
    seconds: int,
    model: Path | None,
    output: Path,
) -> None:
    """Measure this service beside its peers, and beside the TensorFlow Serving that TFSERVING_URL names."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if set(peers) - {"none"}:
        install_peers()
    results: dict[str, list[dict[str, object]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models = folder / "models"
        if model is None:
            version = export_article_model(models)
        else:
            version = models / MODEL / "1"
            version.parent.mkdir(parents=True)
            version.symlink_to(model.resolve())
        start = measure_start(models, version, folder, rounds=rounds)
        alone = [measure_model_alone(version, seconds)]
        for form in forms:
            click.echo(f"measuring {form} ...", err=True)
            with ExitStack() as stack:
                contestants = [start_ours(form, models, folder / "ours.log")]
                if form in ("json", "base64", "upload"):
                    starts = [PEERS[peer] for peer in peers if peer != "none"]
                    contestants += [start(form, version, folder / f"{start.__name__}.log") for start in starts]
                if theirs := name_tensorflow_serving(form):
                    contestants.append(theirs)
                for contestant in contestants:
                    if contestant.process:
                        stack.enter_context(contestant.process)
                counts = [4] if form.endswith("x64") else connections
                run_form(form, contestants, connections=counts, rounds=rounds, seconds=seconds)
                results[form] = [row for contestant in contestants for row in summarize(contestant)]
            alone.append(measure_model_alone(version, seconds))
    one_ms = statistics.median(b["one_ms"] for b in alone)
    images_per_s = statistics.median(b["images_per_s"] for b in alone)
    click.echo(format_table(results))
    click.echo(f"\nbare signature: {one_ms:.2f} ms for one image, {images_per_s:,.0f} images/s in batches of 64")
    click.echo(
        f"TensorFlow imported after {start['import_s']:.1f} s, the service ready after {start['ready_s']:.1f} s; "
        f"{start['loaded_mb']:.0f} MB with the model loaded by TensorFlow alone, "
        f"{start['ready_mb']:.0f} MB in the service"
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    machine = {"cores": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version()}
    document = {
        "machine": machine,
        "start": start,
        "model_alone": {"one_ms": one_ms, "images_per_s": images_per_s},
        "forms": results,
    }
    output.write_text(json.dumps(document, indent=2) + "\n")
    click.echo(f"written to {output}", err=True)


if __name__ == "__main__":
    main()
