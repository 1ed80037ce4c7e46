"""The fit on a measurement that was simulated itself, so that what it has to find is known."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks import fleet
from benchmarks.simulation import ServiceTimes
from benchmarks.worker_fit import FREE, predict, read_fitted, times_of
from benchmarks.worker_measurement import FITTED, VALIDATED, Form, Level, Measurement, summarize

TRUE = ServiceTimes(
    request_s=400e-6, call_s=250e-6, wake_s=60e-6, cooling_s=1e-3, rows=(1, 8, 64), model_s=(0.4e-3, 1.1e-3, 6e-3),
    request_sigma=0.4, offset_s=150e-6, stalls_per_s=20, stall_s=(1e-4, 5e-4),
)  # fmt: skip
RATE_PER_S = 1_500.0  # of the closed loop
REQUESTS = 800  # of each level


def simulate_level(share: float, number: int) -> Level:
    rate = share * RATE_PER_S
    empty = Level(share, rate, REQUESTS / rate, [number], 0, True, 1.0, 1.0, 1.0, 1.0, 1.0)
    found = predict(TRUE, empty)
    names = ("mean_s", "p50_s", "p99_s", "cpu_s", "rows_per_call")
    return dataclasses.replace(empty, **{name: getattr(found, name) for name in names})


@pytest.fixture(scope="module")
def measurement() -> Measurement:
    levels = [simulate_level(share, number) for number, share in enumerate(sorted({*FITTED, *VALIDATED}))]
    forms = {"json": Form(500, 1e-3, 1.5, 13_000, 300), "v2": Form(500, 0.8e-3, 1.5, 3_400, 600)}
    stalls = (TRUE.stalls_per_s, TRUE.stall_s)
    return Measurement({}, "json", 3.0, RATE_PER_S, TRUE.rows, TRUE.model_s, (1.0,), *stalls, 0.0, levels, forms)


def test_the_fit_predicts_other_load_levels_and_the_exit_code_says_so(
    measurement: Measurement, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "fleet.json"
    measurement.save(path)
    done = CliRunner().invoke(fleet.main, ["validate", "--measurement", str(path)])
    assert "5 of 5 load levels that were not fitted are within 15 %" in done.output, done.output
    assert done.exit_code == 0
    fitted = read_fitted(Measurement.load(path))
    # Several combinations of the parameters have nearly the same latencies; the sum of the work is what counts.
    found, true = (each.request_s + each.call_s for each in (fitted, TRUE))
    assert found == pytest.approx(true, rel=0.1), fitted
    slower = [dataclasses.replace(level, p99_s=1.4 * level.p99_s) for level in measurement.levels]
    dataclasses.replace(measurement, levels=slower).save(path)
    monkeypatch.setattr(fleet, "fit", lambda _: fitted)
    done = CliRunner().invoke(fleet.main, ["validate", "--measurement", str(path)])
    assert done.exit_code == 1
    assert "0 of 5 load levels" in done.output


def test_one_bad_round_changes_no_latency() -> None:
    rounds = [np.linspace(1, 2, 101) * each for each in (1.0, 1.1, 0.9)]
    assert summarize(rounds) == pytest.approx((1.5, 1.5, 1.99))
    assert summarize([*rounds[:2], 100 * rounds[2]]) == pytest.approx((1.65, 1.65, 2.189))


def test_a_form_that_costs_less_is_faster(measurement: Measurement) -> None:
    fitted = dataclasses.replace(measurement, fitted={name: getattr(TRUE, name) for name in FREE})
    assert times_of(fitted, "json").request_s == pytest.approx(TRUE.request_s)
    assert times_of(fitted, "v2").request_s == pytest.approx(200e-6)


def test_files_that_are_missing_or_not_fitted_are_explained(measurement: Measurement, tmp_path: Path) -> None:
    path = tmp_path / "fleet.json"
    done = CliRunner().invoke(fleet.main, ["replicas", "--measurement", str(path)])
    assert (done.exit_code, "benchmarks.fleet measure" in done.output) == (1, True)
    measurement.save(path)
    done = CliRunner().invoke(fleet.main, ["replicas", "--measurement", str(path)])
    assert (done.exit_code, "benchmarks.fleet validate" in done.output) == (1, True)
    path.write_text("[]")
    done = CliRunner().invoke(fleet.main, ["replicas", "--measurement", str(path)])
    assert (done.exit_code, "was not written by" in done.output) == (1, True)
