"""Latency against load, simulated and measured, as a plot."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator, StrMethodFormatter

from benchmarks.simulation import ServiceTimes, simulate_worker
from benchmarks.worker_measurement import Level, Measurement

REQUESTS = 10_000  # of each point of a curve
POINTS = 12
COLORS = {"p99": "#b5452c", "p50": "#1f5f8b"}
GREY = "#555555"


def plot_latencies(times: ServiceTimes, measured: Measurement, path: Path) -> None:
    """Draw the simulated p50 and p99 as curves and the measured ones as points, and write them as PNG."""
    loads = np.linspace(0.1, max(level.share for level in measured.levels) + 0.05, POINTS) * measured.closed_loop_per_s
    arrivals = np.cumsum(np.random.default_rng(0).exponential(1.0, REQUESTS))
    outcomes = [simulate_worker(times, arrivals / load) for load in loads]
    figure, axes = plt.subplots(figsize=(7.2, 4.4), layout="constrained")
    for name, percent in (("p99", 99), ("p50", 50)):
        curve_ms = [outcome.percentile_s(percent) * 1e3 for outcome in outcomes]
        axes.plot(loads, curve_ms, color=COLORS[name], linewidth=1.8)
        axes.annotate(
            name, (loads[-1], curve_ms[-1]), (6, 0), textcoords="offset points", color=COLORS[name], va="center"
        )
        for is_fitted, face in ((True, "white"), (False, COLORS[name])):
            points = [level for level in measured.levels if level.is_fitted == is_fitted]
            axes.plot(
                [level.requests_per_s for level in points], [_latency_ms(level, name) for level in points], "o",
                color=COLORS[name], markerfacecolor=face, markersize=6,
            )  # fmt: skip
    _add_legend(axes)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_xlim(left=0)
    axes.set_xlabel("requests/s, open loop")
    axes.set_title("Latency of one worker on one core, ms", loc="left", fontsize=11)
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)
    plt.close(figure)


def _latency_ms(level: Level, name: str) -> float:
    return (level.p99_s if name == "p99" else level.p50_s) * 1e3


def _add_legend(axes: Axes) -> None:
    handles = [
        Line2D([], [], color=GREY, linewidth=1.8, label="simulated"),
        Line2D([], [], color=GREY, marker="o", linestyle="", label="measured"),
        Line2D([], [], color=GREY, marker="o", linestyle="", markerfacecolor="white", label="measured, fitted to"),
    ]
    axes.legend(handles=handles, loc="upper left", frameon=False)
