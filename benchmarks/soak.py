"""`make bench-soak`: minutes of hostile and normal traffic at the same time, on the service under a memory limit.

The attacks take turns, several at a time, in a random order that `--seed` fixes. After each round all of them pause,
and the memory that is resident then is compared. Well-behaved clients send small requests all the time.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import click

from benchmarks.attacks import ATTACKS
from benchmarks.hostile import HostileProcess, Outcome, Server, count_outcomes
from benchmarks.memory_cgroup import CgroupsUnavailableError, MemoryCgroup, parse_bytes
from benchmarks.probe import KINDS, Latencies, ProbeProcess
from benchmarks.serve import MODEL, PROJECT, export_article_model
from benchmarks.service import Service

MAX_P99_S = 0.5
SINGLE_IMAGES = ("upload", "json", "base64", "v2", "grpc")
MAX_GROWTH_MB = 100  # of the memory at rest, from after the warm-up to the end
REST_S = 4.0
PROGRESS_S = 10.0
SLOW_CALL_S = 0.3


@dataclass
class Record:
    """What came of the traffic so far."""

    outcomes: dict[str, list[Outcome]] = field(default_factory=dict)
    resting_mb: list[tuple[float, float]] = field(default_factory=list)  # seconds since the start, resident MB
    peak_mb: float = 0.0

    @property
    def faults(self) -> list[str]:
        return [f"{name}: {o}: {o.fault}" for name, outcomes in self.outcomes.items() for o in outcomes if o.fault]


class Soak:
    """The service, its clients and the attacks, until the time is up or the service ends."""

    def __init__(self, service: Service, probe: ProbeProcess, hostile: HostileProcess, server: Server) -> None:
        self._service = service
        self._probe = probe
        self._hostile = hostile
        self._server = server
        self._started_s = self._progress_s = time.monotonic()
        self.record = Record()

    def run(self, *, seconds: float, slice_s: float, at_once: int, seed: int) -> bool:
        """Make all attacks in turn, each at least once, until the time is up; returns whether the service is alive."""
        for names in draw_groups(at_once, seed):
            if self.record.resting_mb and time.monotonic() - self._started_s >= seconds:
                break
            if not names:
                alive = self._rest()
            else:
                attacking = self._hostile.start(names, self._server, seconds=slice_s)
                alive = self._watch(attacking.done)
                if alive:
                    for name, outcomes in attacking.result().items():
                        self.record.outcomes.setdefault(name, []).extend(outcomes)
            if not alive:
                return False
        return self._rest()

    def _rest(self) -> bool:
        """Let the service give back what it can, and note what stays."""
        until_s = time.monotonic() + REST_S
        if not self._watch(lambda: time.monotonic() >= until_s):
            return False
        self.record.resting_mb.append((time.monotonic() - self._started_s, self._service.resident_mb()))
        return True

    def _watch(self, is_over: Callable[[], bool]) -> bool:
        """Wait until it is over, and print how things stand; returns whether the service is alive."""
        while not is_over():
            if not self._service.is_alive():
                return False
            resident_mb = self._service.resident_mb()
            self.record.peak_mb = max(self.record.peak_mb, resident_mb)
            if time.monotonic() - self._progress_s >= PROGRESS_S:
                click.echo(self._describe_progress(resident_mb))
                self._progress_s = time.monotonic()
            time.sleep(0.1)
        return self._service.is_alive()

    def _describe_progress(self, resident_mb: float) -> str:
        recent = self._probe.read_finished(self._progress_s)
        images = [sample for kind in SINGLE_IMAGES if kind in recent for sample in recent[kind].samples]
        errors = sum(len(of_kind.errors) for of_kind in recent.values())
        hostile = sum(len(outcomes) for outcomes in self.record.outcomes.values())
        elapsed_s = time.monotonic() - self._started_s
        p99_ms = Latencies("images", images).percentile_s(99) * 1e3
        return (
            f"{elapsed_s:4.0f} s: {resident_mb:6,.0f} MB, single images in the last {PROGRESS_S:.0f} s: {len(images)}, "
            f"p99 {p99_ms:,.0f} ms, {errors} failed; {hostile} hostile requests, {len(self.record.faults)} faults"
        )


def draw_groups(at_once: int, seed: int) -> Iterator[list[str]]:
    """Return groups of attacks, for ever: every attack once in each round, and an empty group behind each round."""
    generator = random.Random(seed)
    while True:
        names = list(ATTACKS)
        generator.shuffle(names)
        yield from (names[start : start + at_once] for start in range(0, len(names), at_once))
        yield []


def make_models(models: Path) -> None:
    """Write the article's network, and models that are slow, have no batch dimension or a large output."""
    program = (
        "import sys; from pathlib import Path; from benchmarks.busy_model import save_busy_model, save_wide_model; "
        "models = Path(sys.argv[1]); "
        f"save_busy_model(models / 'slow' / '1', call_s={SLOW_CALL_S}); "
        f"save_busy_model(models / 'unbatched' / '1', call_s={SLOW_CALL_S}, batched=False); "
        "save_wide_model(models / 'wide' / '1')"
    )
    command = [sys.executable, "-c", program, str(models)]
    with subprocess.Popen(command, cwd=PROJECT, stderr=subprocess.DEVNULL) as making:
        export_article_model(models)
    if making.returncode != 0:
        raise subprocess.CalledProcessError(making.returncode, command)


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Align columns: the first to the left, the others to the right."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = []
    for row in [header, *rows]:
        first, *others = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        lines.append("  ".join([first.strip().ljust(widths[0]), *others]))
    return "\n".join(lines)


def describe(record: Record, latencies: Mapping[str, Latencies]) -> str:
    """Return the tables of requests, attacks and memory."""
    clients = [
        [
            kind,
            f"{len(latencies[kind].samples):,}",
            f"{len(latencies[kind].errors)}",
            *(f"{latencies[kind].percentile_s(percent) * 1e3:,.0f}" for percent in (50, 95, 99, 100)),
        ]
        for kind in KINDS
        if kind in latencies
    ]
    attacks = [
        [
            name,
            f"{len(record.outcomes[name]):,}",
            f"{sum(bool(outcome.fault) for outcome in record.outcomes[name])}",
            ", ".join(f"{status} {count}" for status, count in sorted(count_outcomes(record.outcomes[name]).items())),
        ]
        for name in sorted(record.outcomes)
    ]
    resting = ", ".join(f"{mb:,.0f} ({after_s:.0f} s)" for after_s, mb in record.resting_mb)
    return "\n\n".join(
        [
            format_table(["well-behaved", "requests", "failed", "p50 ms", "p95 ms", "p99 ms", "max ms"], clients),
            format_table(["attack", "requests", "faults", "responses"], attacks),
            f"resident MB at rest, after each round: {resting}; at most: {record.peak_mb:,.0f}",
        ]
    )


def find_missed(record: Record, latencies: Mapping[str, Latencies], *, warm_up_s: float, max_p99_s: float) -> list[str]:
    """Return what each bar that is missed was and what came instead."""
    missed = []
    errors = [f"{of_kind.kind}: {error}" for of_kind in latencies.values() for error in of_kind.errors]
    if errors:
        missed.append(f"no well-behaved request fails: {len(errors)} did, the first {errors[0]}")
    for kind in SINGLE_IMAGES:
        p99_s = latencies[kind].percentile_s(99) if kind in latencies else float("inf")
        if p99_s >= max_p99_s:
            missed.append(f"p99 of single images (here {kind}) is below {max_p99_s} s: it was {p99_s:.3f} s")
    if record.faults:
        missed.append(f"every attack gets a proper response: {len(record.faults)} did not, first {record.faults[0]}")
    warm = [mb for after_s, mb in record.resting_mb if after_s >= warm_up_s]
    if len(warm) < 2:
        missed.append("the memory is compared at least twice after the warm-up: let it run longer")
    elif warm[-1] - warm[0] > MAX_GROWTH_MB:
        missed.append(f"the memory at rest grows by at most {MAX_GROWTH_MB} MB: from {warm[0]:,.0f} to {warm[-1]:,.0f}")
    return missed


@click.command(context_settings={"show_default": True})
@click.option("--seconds", type=click.IntRange(10), default=600, help="How long the traffic goes on.")
@click.option("--memory", default="2Gi", help="The limit of the service's cgroup: 2Gi, 2G, 512M or a number of bytes.")
@click.option("--slice-seconds", type=click.FloatRange(0), default=5.0, help="How long each group of attacks goes on.")
@click.option("--at-once", type=click.IntRange(1), default=6, help="Attacks in a group.")
@click.option("--warm-up-seconds", type=click.IntRange(0), default=60, help="From when on the memory is compared.")
@click.option("--seed", type=int, default=0, help="Of the attacks' order.")
@click.option("--max-p99-s", type=float, default=MAX_P99_S, help="The bar for single images.")
@click.option("--log", type=click.Path(path_type=Path), help="Where to keep the service's log.")
@click.argument("options", nargs=-1)
def main(
    seconds: int,
    memory: str,
    slice_seconds: float,
    at_once: int,
    warm_up_seconds: int,
    seed: int,
    max_p99_s: float,
    log: Path | None,
    options: Sequence[str],
) -> None:
    """Soak the service in hostile and normal traffic under a memory limit; exit with 1 when a bar is missed.

    OPTIONS, behind --, go to the service: python -m benchmarks.soak -- --memory-budget 500000000
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        cgroup = MemoryCgroup(parse_bytes(memory))
    except (CgroupsUnavailableError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    with cgroup, tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        click.echo("making the models ...", err=True)
        make_models(folder / "models")
        service_log = folder / "service.log"
        with Service(folder / "models", service_log, *options, cgroup=cgroup) as service, HostileProcess() as hostile:
            server = Server(service.url, service.grpc_address, MODEL, "slow", "unbatched", "wide")
            click.echo("making the requests ...", err=True)
            hostile.prepare(list(ATTACKS), server)
            probe = ProbeProcess(
                service.url, service.grpc_address, model=MODEL, kinds=KINDS, log=folder / "probe", expect=""
            )
            with probe:
                time.sleep(1)  # the first requests of each kind, which take longer
                started_s = time.monotonic()
                soak = Soak(service, probe, hostile, server)
                alive = soak.run(seconds=seconds, slice_s=slice_seconds, at_once=at_once, seed=seed)
                latencies = probe.read(started_s, time.monotonic()) if alive else probe.read_finished(started_s)
            missed = find_missed(soak.record, latencies, warm_up_s=warm_up_seconds, max_p99_s=max_p99_s)
            if not alive:
                missed.insert(0, f"the service lives: {service.describe_end()}")
            elif "Traceback" in service_log.read_text(errors="replace"):
                missed.append("the service's log has no tracebacks: see --log")
        if log:
            shutil.copy(service_log, log)
        click.echo("\n" + describe(soak.record, latencies) + "\n")
    for line in missed:
        click.echo(f"MISSED: {line}")
    if missed:
        sys.exit(1)
    click.echo(f"all bars held for {seconds} s under {memory}")


if __name__ == "__main__":
    main()
