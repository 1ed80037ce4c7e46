"""Fits the simulation's free parameters to some load levels of a measurement, and validates it against the others."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import click
import numpy as np

from benchmarks.open_loop import draw_poisson
from benchmarks.simulation import Outcome, ServiceTimes, simulate_worker
from benchmarks.worker_measurement import Level, Measurement, summarize

BAR = 0.15  # on the error of mean, p50 and p99
# What is fitted, in logarithms: the rest is measured directly. The stalls, too, but on a core without load.
FREE = ("request_s", "call_s", "wake_s", "cooling_s", "request_sigma", "offset_s", "stalls_per_s")
FITTED_REQUESTS = 4_000  # at least so many of each level are simulated for a fit, if there are
MAX_STEPS = 10
DIFFERENCE = 0.1  # for the derivatives
DAMPINGS = (0.01, 0.1, 1.0, 10.0)
LARGEST_STEP = 1.0
LEAST_S = 5e-5  # of an estimate


@dataclass(frozen=True)
class Prediction:
    """One load level, simulated with the arrivals of its measurement."""

    level: Level
    mean_s: float
    p50_s: float
    p99_s: float
    cpu_s: float
    rows_per_call: float

    def errors(self) -> Mapping[str, float]:
        """Return the relative error of each latency."""
        names = {"mean": "mean_s", "p50": "p50_s", "p99": "p99_s"}
        return {name: getattr(self, latency) / getattr(self.level, latency) - 1 for name, latency in names.items()}

    @property
    def holds(self) -> bool:
        return all(abs(error) <= BAR for error in self.errors().values())


def predict(times: ServiceTimes, level: Level) -> Prediction:
    """Simulate every round of a level, with the same requests due at the same times."""
    outcomes = [_simulate_round(times, level, seed) for seed in level.seeds]
    mean_s, p50_s, p99_s = summarize([outcome.latencies_s for outcome in outcomes])
    cpu_s = float(np.mean([outcome.busy_share for outcome in outcomes])) / level.requests_per_s
    rows = float(np.mean([outcome.rows_per_call for outcome in outcomes]))
    return Prediction(level, mean_s, p50_s, p99_s, cpu_s, rows)


def _simulate_round(times: ServiceTimes, level: Level, seed: int) -> Outcome:
    due_s = draw_poisson(np.random.default_rng(seed), requests_per_s=level.requests_per_s, seconds=level.seconds)
    return simulate_worker(times, due_s, seed=seed)


def fit(measurement: Measurement) -> ServiceTimes:
    """Return the service times whose simulation is closest to the fitted levels: latencies and CPU time.

    Least squares of the logarithms of predicted to measured, by the method of Levenberg and Marquardt. The random
    numbers are the same in every simulation.
    """
    levels = [_shorten(level) for level in measurement.levels if level.is_fitted]
    times = estimate(measurement)
    logs = np.log([getattr(times, name) for name in FREE])
    with ProcessPoolExecutor() as processes:

        def compute_errors(points: Sequence[np.ndarray]) -> np.ndarray:
            """Simulate each point on all levels; returns an array (points, errors)."""
            pairs = [(_change(times, point), level) for point in points for level in levels]
            errors = [_log_errors(each) for each in processes.map(predict, *zip(*pairs, strict=True))]
            return np.array(errors).reshape(len(points), -1)

        (errors,) = compute_errors([logs])
        for _ in range(MAX_STEPS):
            moved = compute_errors(list(logs + DIFFERENCE * np.eye(len(FREE))))
            slopes = (moved - errors) / DIFFERENCE  # (parameters, errors)
            steps = [
                np.linalg.solve(slopes @ slopes.T + damping * np.eye(len(FREE)), -slopes @ errors)
                for damping in DAMPINGS
            ]
            points = [logs + np.clip(step, -LARGEST_STEP, LARGEST_STEP) for step in steps]
            tried = compute_errors(points)
            best = int(np.argmin((tried**2).sum(axis=1)))
            if (tried[best] ** 2).sum() >= 0.99 * (errors**2).sum():
                break
            logs, errors = points[best], tried[best]
    return _change(times, logs)


def _change(times: ServiceTimes, logs: np.ndarray) -> ServiceTimes:
    return replace(times, **dict(zip(FREE, np.exp(logs).tolist(), strict=True)))


def _shorten(level: Level) -> Level:
    """Return a level with as many of its rounds as a fit needs."""
    rounds = math.ceil(FITTED_REQUESTS / (level.requests_per_s * level.seconds))
    return replace(level, seeds=level.seeds[:rounds])


def estimate(measurement: Measurement) -> ServiceTimes:
    """Return the service times as they are measured directly, with estimates for what is not."""
    levels = [level for level in measurement.levels if level.is_fitted]
    times = ServiceTimes(
        request_s=0.0,
        call_s=0.0,
        rows=measurement.rows,
        model_s=measurement.model_s,
        model_ratios=measurement.model_ratios,
        request_sigma=0.3,
        wake_s=3e-4,
        cooling_s=2e-3,
        offset_s=1e-4,
        stalls_per_s=max(0.1, measurement.stalls_per_s),
        stall_s=measurement.stall_s,
    )
    # CPU time of a request, beside the model: a part for each request and a part for each call.
    calls = np.array([1 / level.rows_per_call for level in levels])
    beside_s = np.array([level.cpu_s - times.model_call_s(1) / level.rows_per_call for level in levels])
    call_s, request_s = np.polyfit(calls, beside_s, 1)
    return replace(times, request_s=max(LEAST_S, float(request_s)), call_s=max(LEAST_S, float(call_s)))


def _log_errors(prediction: Prediction) -> list[float]:
    level = prediction.level
    return [
        math.log(prediction.mean_s / level.mean_s),
        math.log(prediction.p50_s / level.p50_s),
        math.log(prediction.p99_s / level.p99_s),
        math.log(prediction.cpu_s / level.cpu_s),
    ]


def read_fitted(measurement: Measurement) -> ServiceTimes:
    """Return the fitted service times.

    Raises:
        click.ClickException: the measurement has none yet.
    """
    if set(measurement.fitted) != set(FREE):
        raise click.ClickException(
            "the measurement was not fitted yet; run `python -m benchmarks.fleet validate` first"
        )
    values: dict[str, Any] = {**measurement.fitted}
    return replace(estimate(measurement), **values)


def times_of(measurement: Measurement, form: str) -> ServiceTimes:
    """Return the fitted service times for requests of any form: the event loop's follow from the CPU time of both."""
    times = read_fitted(measurement)
    forms = (measurement.forms[measurement.form], measurement.forms[form])
    call_s = times.call_s + times.model_call_s(1)
    reference_s, form_s = (each.cpu_s - call_s / each.rows_per_call for each in forms)
    return replace(times, request_s=max(LEAST_S, times.request_s + form_s - reference_s))


def format_table(predictions: Iterable[Prediction]) -> str:
    lines = [
        "| load | requests/s | | mean, simulated / measured, ms | error | p50 | error | p99 | error | rows a call |",
        "|---:|---:|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for each in predictions:
        level, errors = each.level, each.errors()
        cells = [
            f"{predicted * 1e3:.2f} / {measured * 1e3:.2f} | {errors[name]:+.0%}"
            for name, predicted, measured in (
                ("mean", each.mean_s, level.mean_s),
                ("p50", each.p50_s, level.p50_s),
                ("p99", each.p99_s, level.p99_s),
            )
        ]
        used = "fitted" if level.is_fitted else "holds" if each.holds else "misses"
        rows = f"{each.rows_per_call:.1f} / {level.rows_per_call:.1f}"
        lines.append(f"| {level.share:.0%} | {level.requests_per_s:,.0f} | {used} | {' | '.join(cells)} | {rows} |")
    return "\n".join(lines)
