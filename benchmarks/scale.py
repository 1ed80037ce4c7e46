"""`make bench-scale`: requests a second against cores, workers and TensorFlow's threads.

On 1, 2, 4, ... cores, servers of one model run at the same time, with one worker and with a worker for each core, and
are measured in turn, so that a slow moment of the machine meets all. Printed are medians, and the ratio to one worker
with one thread on the same cores: the median of the rounds, with the quartiles. The load generator runs on all cores,
those of the servers too, as in `make bench-serve`.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import click

from benchmarks.load import Measured, run_closed_loop, run_closed_loop_grpc
from benchmarks.serve import MODEL, PROJECT, export_article_model, make_path, make_target
from benchmarks.service import Service

FORMS = ("json", "base64", "upload", "v2", "grpc")
DRAWN = ("mobilenetv2", "efficientnetb0")
WARM_S = 1
CORES_PER_GENERATOR_THREAD = 8


@dataclass(frozen=True)
class Setting:
    """How a server is started."""

    cores: int
    workers: int
    threads: int  # TensorFlow's, of a call


@dataclass(frozen=True)
class Row:
    """What the rounds of one setting gave."""

    model: str
    form: str
    setting: Setting
    requests_per_s: float
    quartiles: Sequence[float]  # of the ratio to one worker with one thread on the same cores
    p99_ms: float

    def __str__(self) -> str:
        low, median, high = self.quartiles
        setting = self.setting
        return (
            f"| {self.model} | {self.form} | {setting.cores} | {setting.workers} | {setting.threads} | "
            f"{self.requests_per_s:,.0f} | {median:.2f} | {low:.2f} to {high:.2f} | {self.p99_ms:.1f} |"
        )


def choose_settings(cores: int, threads: Sequence[int]) -> list[list[Setting]]:
    """Return the settings to compare, for 1, 2, 4, ... cores and for all; the ratios are to the first of each."""
    counts = sorted({*(2**power for power in range(cores.bit_length())), cores})
    return [
        [Setting(count, workers, each) for workers in sorted({1, count}) for each in sorted({1, *threads})]
        for count in counts
    ]


def prepare_models(versions: Sequence[Path], drawn: Sequence[str], folder: Path) -> dict[str, tuple[Path, int]]:
    """Make a models folder for each model, where it has the name of the requests; also returns its images' side."""
    found = {f"{version.parent.name}/{version.name}": version for version in versions}
    for name in drawn:
        click.echo(f"exporting {name} ...", err=True)
        command = [sys.executable, "-m", "benchmarks.draw_network", name, str(folder / "drawn")]
        subprocess.run(command, check=True, cwd=PROJECT, capture_output=True)
        found[name] = folder / "drawn" / name / "1"
    if not found:
        found["the article's network"] = export_article_model(folder / "article")
    prepared = {}
    for number, (name, version) in enumerate(found.items()):
        link = folder / str(number) / MODEL / "1"
        link.parent.mkdir(parents=True)
        link.symlink_to(version.resolve())
        prepared[name] = (folder / str(number), _read_side(version))
    return prepared


def _read_side(version: Path) -> int:
    """Return the side of a model's square images.

    Raises:
        click.ClickException: the folder is not an exported version, or its images are not square.
    """
    try:
        info = json.loads((version / "assets.extra" / "model.json").read_text())
        height, width, _ = info["input_shape"]
    except (OSError, ValueError, KeyError) as error:
        raise click.ClickException(f"{version} is not a version of an exported model, such as models/pets/1") from error
    if height != width:
        raise click.ClickException(f"{version} takes images of {height}x{width}; square ones are needed")
    return int(height)


def measure(
    name: str,
    models: Path,
    settings: Sequence[Setting],
    *,
    side: int,
    forms: Sequence[str],
    connections: int,
    rounds: int,
    seconds: float,
) -> list[Row]:
    """Run a server of each setting, and measure them in alternating rounds."""
    cores = sorted(os.sched_getaffinity(0))
    rows = []
    with ExitStack() as stack:
        servers = {}
        for number, setting in enumerate(settings):
            # The number of workers is not given where it is 1, so that earlier commits can be measured, too.
            options = ["--workers", str(setting.workers)] if setting.workers > 1 else []
            options += ["--intra-op-threads", str(setting.threads), "--log-level", "warning"]
            log = models / f"{number}.log"
            service = Service(models, log, *options, cores=cores[: setting.cores])
            servers[setting] = stack.enter_context(service)
        for form in forms:
            results = _run_rounds(servers, form, side=side, connections=connections, rounds=rounds, seconds=seconds)
            base = results[settings[0]]
            for setting, measured in results.items():
                ratios = [new.requests_per_s / old.requests_per_s for new, old in zip(measured, base, strict=True)]
                rate = statistics.median(each.requests_per_s for each in measured)
                p99_ms = statistics.median(each.p99_ms for each in measured)
                rows.append(Row(name, form, setting, rate, statistics.quantiles(ratios, n=4), p99_ms))
                click.echo(rows[-1])
    return rows


def _run_rounds(
    servers: Mapping[Setting, Service], form: str, *, side: int, connections: int, rounds: int, seconds: float
) -> dict[Setting, list[Measured]]:
    run = run_closed_loop_grpc if form == "grpc" else run_closed_loop
    threads = max(1, len(os.sched_getaffinity(0)) // CORES_PER_GENERATOR_THREAD)
    targets = {
        setting: make_target(server.grpc_address if form == "grpc" else server.url + make_path(form), form, side=side)
        for setting, server in servers.items()
    }
    for target in targets.values():
        run(target, connections=connections, seconds=WARM_S, threads=threads)
    results: dict[Setting, list[Measured]] = {setting: [] for setting in servers}
    for number in range(rounds):
        for setting in servers if number % 2 == 0 else reversed(servers):
            measured = run(targets[setting], connections=connections, seconds=seconds, threads=threads)
            if measured.errors:
                raise click.ClickException(f"{form}, {setting}: {measured.errors} requests failed")
            if not measured.requests:
                raise click.ClickException(
                    f"{form}, {setting}: no request was finished in {seconds:g} s; raise --seconds"
                )
            results[setting].append(measured)
    return results


@click.command(context_settings={"show_default": True})
@click.option(
    "--model",
    "versions",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    multiple=True,
    help="A version folder, such as models/pets/1; may be repeated.  [default: the article's network]",
)
@click.option(
    "--draw",
    "drawn",
    type=click.Choice(DRAWN),
    multiple=True,
    help="Also a network with random weights; repeatable.",
)
@click.option("--form", "forms", type=click.Choice(FORMS), multiple=True, default=FORMS, help="What requests hold.")
@click.option("--threads", type=click.IntRange(1), multiple=True, default=(1, 2), help="TensorFlow's, of a call.")
@click.option("--connections", type=click.IntRange(1), default=32)
@click.option("--rounds", type=click.IntRange(3), default=9, help="Alternating.")
@click.option("--seconds", type=click.IntRange(1), default=1, help="Of each round.")
@click.option("--output", type=click.Path(path_type=Path), default=Path("benchmarks/results/scale.json"))
def main(
    versions: Sequence[Path],
    drawn: Sequence[str],
    forms: Sequence[str],
    threads: Sequence[int],
    connections: int,
    rounds: int,
    seconds: int,
    output: Path,
) -> None:
    """Print requests a second against cores, workers and threads (needs wrk and h2load)."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        models = prepare_models(versions, drawn, Path(name))
        click.echo("| model | requests | cores | workers | threads | requests/s | ratio | quartiles | p99, ms |")
        click.echo("|---|---|---:|---:|---:|---:|---:|---|---:|")
        for model, (folder, side) in models.items():
            for settings in choose_settings(len(os.sched_getaffinity(0)), threads):
                rows += measure(
                    model, folder, settings, side=side, forms=forms, connections=connections, rounds=rounds,
                    seconds=seconds,
                )  # fmt: skip
    output.parent.mkdir(parents=True, exist_ok=True)
    machine = {"cores": len(os.sched_getaffinity(0)), "machine": platform.machine()}
    output.write_text(json.dumps({"machine": machine, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    click.echo(f"written to {output}", err=True)


if __name__ == "__main__":
    main()
