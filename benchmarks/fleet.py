"""From one measured worker to a fleet, by simulation: `python -m benchmarks.fleet measure`, `validate`, then questions.

`measure` writes what one worker on one core takes. `validate` fits the simulation to three load levels, and compares it
with five others; its exit code is 1 where a latency is off by more than 15 %. The other commands answer questions with
the fitted simulation. docs/scaling.md has the answers and what they assume.
"""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import click

from benchmarks.fleet_answers import (
    Machine,
    Rollout,
    Window,
    count_replicas,
    find_largest_load,
    find_largest_loads,
    plan_fleet,
    simulate_rollout,
    simulate_slice,
    simulate_zone_loss,
)
from benchmarks.worker_fit import FREE, fit, format_table, predict, read_fitted, times_of
from benchmarks.worker_measurement import FORMS, Measurement, measure_worker

QUIET_SHARE = 0.05  # of the core, that others may take during a measurement
SLICE_SHARE = 0.8  # of the largest load, at which slices are compared: near that load, a p99 is mostly chance

_file = click.option(
    "--measurement",
    "path",
    type=click.Path(path_type=Path),
    default=Path("benchmarks/results/fleet.json"),
    help="Of `measure`; `validate` adds what it fits.",
)
_load = click.option("--load", "load_per_s", type=click.FloatRange(1), default=10_000.0, help="Requests a second.")
_bar = click.option("--p99-ms", type=click.FloatRange(0.001), default=50.0, help="The bar on the p99.")
_zones = click.option("--zones", type=click.IntRange(2), default=3)


@click.group(context_settings={"show_default": True})
def main() -> None:
    """Measure one worker on one core, validate a simulation of it, and answer questions about fleets of them."""


@main.command()
@_file
@click.option("--form", type=click.Choice(FORMS), default="json", help="What the requests of the load levels hold.")
@click.option("--rounds", type=click.IntRange(2), default=9, help="Alternating.")
@click.option("--seconds", type=click.IntRange(1), default=3, help="Of each load level in each round.")
def measure(path: Path, form: str, rounds: int, seconds: int) -> None:
    """Measure the service on one core with an open-loop load from another (needs wrk, and a quiet machine)."""
    measured = measure_worker(form, rounds=rounds, seconds=seconds)
    measured.save(path)
    click.echo(f"{measured.machine['processor']}, {measured.machine['date']}: one worker on one core, {form}")
    click.echo(f"closed loop, 32 connections: {measured.closed_loop_per_s:,.0f} requests/s")
    click.echo(f"ready after {measured.ready_s:.1f} s")
    calls = ", ".join(f"{rows}: {each * 1e3:.2f}" for rows, each in zip(measured.rows, measured.model_s, strict=True))
    click.echo(f"model call by images, ms: {calls}")
    _warn(measured)
    click.echo(f"written to {path}", err=True)


@main.command()
@_file
@click.option("--plot", type=click.Path(path_type=Path), help="Write a plot of latency against load, as PNG.")
def validate(path: Path, plot: Path | None) -> None:
    """Fit the simulation to three load levels and compare it with five others; exit code 1 if one misses the bar."""
    measured = Measurement.load(path)
    click.echo("fitting ...", err=True)
    times = fit(measured)
    dataclasses.replace(measured, fitted={name: getattr(times, name) for name in FREE}).save(path)
    predictions = [predict(times, level) for level in measured.levels]
    click.echo(format_table(predictions))
    fitted = ", ".join(f"{name} {getattr(times, name):.3g}" for name in FREE)
    click.echo(f"\nfitted: {fitted}")
    _warn(measured)
    if plot:
        from benchmarks.fleet_plot import plot_latencies

        plot_latencies(times, measured, plot)
        click.echo(f"plotted to {plot}", err=True)
    compared = [each for each in predictions if not each.level.is_fitted]
    held = sum(each.holds and each.level.kept_up for each in compared)
    click.echo(f"{held} of {len(compared)} load levels that were not fitted are within 15 %")
    sys.exit(0 if held == len(compared) else 1)


def _warn(measured: Measurement) -> None:
    late = [f"{level.share:.0%}" for level in measured.levels if not level.kept_up]
    if late:
        click.echo(f"warning: the load generator did not keep up at {', '.join(late)}; measure again", err=True)
    if measured.other_share > QUIET_SHARE:
        click.echo(
            f"warning: other processes took {measured.other_share:.0%} of the service's core; measure again on a "
            "quiet machine",
            err=True,
        )


@main.command()
@_file
@_load
@click.option("--p99-ms", "bars_ms", type=click.FloatRange(0.001), multiple=True, default=(10.0, 50.0, 100.0))
def replicas(path: Path, load_per_s: float, bars_ms: Sequence[float]) -> None:
    """Print how many replicas of one core a load needs for bars on the p99, by what requests hold."""
    measured = Measurement.load(path)
    click.echo(f"| requests | p99, ms | largest load of a replica, requests/s | replicas for {load_per_s:,.0f}/s |")
    click.echo("|---|---:|---:|---:|")
    cases = [(form, bar_ms) for form in FORMS for bar_ms in bars_ms]
    loads = find_largest_loads([(times_of(measured, form), bar_ms / 1e3) for form, bar_ms in cases])
    for (form, bar_ms), largest in zip(cases, loads, strict=True):
        needed = f"{count_replicas(load_per_s, largest):,}" if largest else "not possible"
        click.echo(f"| {form} | {bar_ms:g} | {largest:,.0f} | {needed} |")


def _format(window: Window) -> str:
    share = window.failed / max(1, window.requests)
    p99 = "none" if window.p99_s == math.inf else f"{window.p99_s * 1e3:,.1f}"
    return f"{window.failed:,} ({share:.1%}) | {p99}"


@main.command("rolling-update")
@_file
@_bar
@click.option("--replicas", type=click.IntRange(2), default=4)
@click.option("--propagation-s", type=click.FloatRange(0), default=1.0, help="Until the balancer knows of a change.")
def rolling_update(path: Path, p99_ms: float, replicas: int, propagation_s: float) -> None:
    """Simulate updates of replicas that have the largest load for a p99, by surge and preStop."""
    measured = Measurement.load(path)
    times = read_fitted(measured)
    largest = find_largest_load(times, p99_s=p99_ms / 1e3)
    click.echo(f"{replicas} replicas with {largest:,.0f} requests/s each, ready after {measured.ready_s:.1f} s\n")
    click.echo(
        "| surge | unavailable | preStop, s | failed during it | p99, ms | p99 before it, ms | duration, s | "
        "most replicas |"
    )
    click.echo("|---:|---:|---:|---:|---:|---:|---:|---:|")
    for surge, unavailable, pre_stop_s in ((1, 0, 5.0), (replicas, 0, 5.0), (0, 1, 5.0), (1, 0, 0.0)):
        rollout = Rollout(surge, unavailable, measured.ready_s, propagation_s=propagation_s, pre_stop_s=pre_stop_s)
        done = simulate_rollout(times, rollout, replicas=replicas, per_replica_per_s=largest)
        click.echo(
            f"| {surge} | {unavailable} | {pre_stop_s:g} | {_format(done.during)} | {done.before.p99_s * 1e3:,.1f} | "
            f"{done.seconds:,.0f} | {done.most_running} |"
        )


@main.command("zone-loss")
@_file
@_bar
@_zones
@click.option("--per-zone", type=click.IntRange(1), default=2, help="Replicas in each zone.")
@click.option("--detect-s", type=click.FloatRange(0), default=10.0, help="Until the balancer knows of the loss.")
def zone_loss(path: Path, p99_ms: float, zones: int, per_zone: int, detect_s: float) -> None:
    """Simulate the loss of a zone, with and without headroom and retries."""
    times = read_fitted(Measurement.load(path))
    largest = find_largest_load(times, p99_s=p99_ms / 1e3)
    kept = (zones - 1) / zones
    click.echo(
        f"{zones} zones with {per_zone} replicas each; the largest load of a replica for a p99 of {p99_ms:g} ms is "
        f"{largest:,.0f} requests/s\n"
    )
    click.echo(
        "| load of a replica | retries | failed before | p99, ms | failed until it is detected | p99, ms | "
        "failed after | p99, ms |"
    )
    click.echo("|---|---:|---:|---:|---:|---:|---:|---:|")
    for share, name in ((kept, f"{kept:.0%} of the largest"), (1.0, "the largest")):
        for retries in (0, 1):
            done = simulate_zone_loss(
                times, zones=zones, per_zone=per_zone, load_per_s=share * largest * zones * per_zone,
                detect_s=detect_s, retries=retries,
            )  # fmt: skip
            windows = " | ".join(_format(window) for window in (done.before, done.undetected, done.after))
            click.echo(f"| {name} | {retries} | {windows} |")


@main.command()
@_file
@click.option("--load", "load_per_s", type=click.FloatRange(1), default=1_000_000.0, help="Requests a second.")
@_bar
@_zones
@click.option("--cores", type=click.IntRange(1), default=32, help="Of a machine.")
@click.option("--price", type=click.FloatRange(0), default=0.04, help="Of a core for an hour, in any currency.")
@click.option("--network-gbit", type=click.FloatRange(0.1), default=10.0, help="Of a machine, in each direction.")
@click.option("--network-share", type=click.FloatRange(0.01, 1), default=0.5, help="Of a network link that is used.")
@click.option("--balancer-per-s", type=click.FloatRange(1), default=100_000.0, help="Requests/s of a balancer node.")
@click.option("--balancer-gbit", type=click.FloatRange(0.1), default=25.0, help="Of a balancer node.")
def plan(
    path: Path,
    load_per_s: float,
    p99_ms: float,
    zones: int,
    cores: int,
    price: float,
    network_gbit: float,
    network_share: float,
    balancer_per_s: float,
    balancer_gbit: float,
) -> None:
    """Print the machines, the cost and the bottleneck for a load, by what requests hold."""
    measured = Measurement.load(path)
    machine = Machine(cores, price, network_gbit, network_share, balancer_per_s, balancer_gbit)
    click.echo(
        f"{load_per_s:,.0f} requests/s with a p99 of {p99_ms:g} ms after the loss of one of {zones} zones; machines of "
        f"{cores} cores\n"
    )
    click.echo(
        "| requests | bytes in / out | requests/s a core | cores | machines | bottleneck | "
        "network of a machine, Gbit/s | balancer nodes | cost an hour |"
    )
    click.echo("|---|---:|---:|---:|---:|---|---:|---:|---:|")
    loads = dict(
        zip(FORMS, find_largest_loads([(times_of(measured, form), p99_ms / 1e3) for form in FORMS]), strict=True)
    )
    for name, per_core in loads.items():
        form = measured.forms[name]
        if not per_core:
            click.echo(f"| {name} | no load has this p99 | | | | | | | |")
            continue
        needed = plan_fleet(load_per_s, per_core_per_s=per_core, form=form, machine=machine, zones=zones)
        click.echo(
            f"| {name} | {form.request_bytes:,} / {form.response_bytes:,} | {per_core:,.0f} | {needed.cores:,} | "
            f"{needed.machines:,} | {needed.bottleneck} | {needed.machine_gbit:.1f} of {network_gbit:g} | "
            f"{needed.balancers:,} | {needed.cost_per_hour:,.0f} |"
        )
    share = SLICE_SHARE * loads[measured.form]
    click.echo(f"\n{share:,.0f} requests/s a worker ({measured.form}), simulated with more workers at once:\n")
    click.echo("| workers | p99, ms |\n|---:|---:|")
    for workers in (1, 2, 4, 8):
        p99_s = simulate_slice(read_fitted(measured), workers=workers, per_worker_per_s=share, seconds=60 / workers)
        click.echo(f"| {workers} | {p99_s * 1e3:.1f} |")


if __name__ == "__main__":
    main()
