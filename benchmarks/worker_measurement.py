"""Measures one worker on one core: what `benchmarks/simulation.py` needs, and the latencies that it has to reproduce.

The service is pinned to one core and the load generator to another, so neither takes time from the other. Load levels
alternate over several rounds, so that a slow moment of the machine meets all of them.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path

import click
import httpx
import numpy as np

from benchmarks.load import Target, run_closed_loop
from benchmarks.open_loop import OpenLoop, draw_poisson, send_on_time
from benchmarks.serve import Contestant, export_article_model, make_path, make_target, start_ours

FORMS = ("json", "base64", "upload", "v2")
FITTED = (0.2, 0.45, 0.7)  # load levels, as shares of the closed loop's rate
VALIDATED = (0.25, 0.3, 0.4, 0.5, 0.6)
FORM_LEVEL = 0.5  # at which the forms are compared
CONNECTIONS = 32  # of the closed loop
WARM_S = 2.0
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)
STALL_S = 5e-5  # a shorter gap is not counted
MAX_RATIO = 0.98  # quantile of the model's calls, above which there are stalls, which are counted on their own
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Level:
    """One load level: what was sent and what came back."""

    share: float
    requests_per_s: float
    seconds: float  # of each round
    seeds: Sequence[int]  # of each round's arrivals: see `draw_poisson`
    failed: int
    kept_up: bool  # the generator
    mean_s: float  # of the latencies, as `summarize` returns them
    p50_s: float
    p99_s: float
    cpu_s: float  # of the service, a request
    rows_per_call: float

    @property
    def is_fitted(self) -> bool:
        return self.share in FITTED


@dataclass(frozen=True)
class Form:
    """Requests of one form: what they cost and how large they are."""

    requests_per_s: float
    cpu_s: float  # of the service, a request
    rows_per_call: float
    request_bytes: int  # with HTTP's head, without TCP's
    response_bytes: int


@dataclass(frozen=True)
class Measurement:
    """One worker on one core of one machine."""

    machine: Mapping[str, object]
    form: str
    ready_s: float  # from its start until it is ready
    closed_loop_per_s: float
    rows: Sequence[int]
    model_s: Sequence[float]  # median time of a call with so many rows
    model_ratios: Sequence[float]  # quantiles of the calls' times, relative to their median
    stalls_per_s: float
    stall_s: Sequence[float]
    other_share: float  # of the service's core, that other processes or the host took during the rounds
    levels: Sequence[Level]
    forms: Mapping[str, Form]
    fitted: Mapping[str, float] = field(default_factory=dict)  # by `benchmarks.fleet validate`

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @staticmethod
    def load(path: Path) -> Measurement:
        """Read what `save` has written.

        Raises:
            click.ClickException: the file is missing, or is not a measurement.
        """
        try:
            document = json.loads(path.read_text())
            document["levels"] = [Level(**level) for level in document["levels"]]
            document["forms"] = {name: Form(**form) for name, form in document["forms"].items()}
            return Measurement(**document)
        except FileNotFoundError as error:
            raise click.ClickException(f"there is no {path}; run `python -m benchmarks.fleet measure` first") from error
        except (ValueError, KeyError, TypeError) as error:
            raise click.ClickException(f"{path} was not written by `python -m benchmarks.fleet measure`") from error


def measure_worker(form: str, *, rounds: int, seconds: float) -> Measurement:
    """Measure the service with the article's network.

    Raises:
        click.ClickException: there is one core only.
    """
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise click.ClickException("two cores are needed: one for the service, one for the load generator")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        version = export_article_model(folder / "models")
        click.echo("measuring the model and the core alone ...", err=True)
        spawn = get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=spawn) as process:
            # The other core is busy, as it is with the load generator: cores can share a processor's caches and power.
            busy = spawn.Process(target=_spin, args=(cores[-1],))
            busy.start()
            try:
                model_s, ratios, stalls_per_s, stall_s = process.submit(_measure_core, cores[0], version).result()
            finally:
                busy.kill()
                busy.join()
        service = start_ours(form, folder / "models", folder / "log", cores=cores[:1])
        assert service.process
        with service.process:
            os.sched_setaffinity(0, cores[-1:])
            try:
                probe = _Probe(service, cores[0])
                rate, levels, other_share = probe.measure_levels(rounds=rounds, seconds=seconds)
                forms = {each: probe.measure_form(each, seconds=2 * seconds) for each in FORMS}
            finally:
                os.sched_setaffinity(0, cores)
        return Measurement(
            {
                "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
                "cores": len(cores),
                "processor": _read_processor(),
                "python": platform.python_version(),
            },
            form, service.process.ready_after_s, rate, BATCH_SIZES, model_s, ratios, stalls_per_s, stall_s,
            other_share, levels, forms,
        )  # fmt: skip


class _Probe:
    """Loads a running service, and reads its processor time and its batches before and after."""

    def __init__(self, service: Contestant, core: int) -> None:
        self._service = service
        self._core = core
        self._url = str(httpx.URL(service.target.url).copy_with(path="")).rstrip("/")

    def measure_levels(self, *, rounds: int, seconds: float) -> tuple[float, list[Level], float]:
        """Return the closed loop's rate, every level, and the share of the core that others took meanwhile."""
        target = self._service.target
        run_closed_loop(target, connections=CONNECTIONS, seconds=WARM_S)
        rate = run_closed_loop(target, connections=CONNECTIONS, seconds=seconds).requests_per_s
        shares = sorted({*FITTED, *VALIDATED})
        runs: dict[float, list[tuple[OpenLoop, float, float]]] = {share: [] for share in shares}
        seeds: dict[float, list[int]] = {share: [] for share in shares}
        started_s, busy_s, own_s = time.perf_counter(), _core_busy_s(self._core), self._cpu_s()
        for number in range(rounds):
            click.echo(f"round {number + 1} of {rounds} ...", err=True)
            for index, share in enumerate(shares if number % 2 == 0 else shares[::-1]):
                seed = 100 * number + index
                runs[share].append(self._send(target, share * rate, seconds, seed))
                seeds[share].append(seed)
        others_s = (_core_busy_s(self._core) - busy_s) - (self._cpu_s() - own_s)
        other_share = max(0.0, others_s / (time.perf_counter() - started_s))
        return rate, [_join(share, share * rate, seconds, seeds[share], runs[share]) for share in shares], other_share

    def measure_form(self, form: str, *, seconds: float) -> Form:
        target = make_target(self._url + make_path(form), form)
        run_closed_loop(target, connections=CONNECTIONS, seconds=WARM_S)
        rate = FORM_LEVEL * run_closed_loop(target, connections=CONNECTIONS, seconds=seconds / 2).requests_per_s
        _, cpu_s, rows = self._send(target, rate, seconds, 0)
        request = httpx.Request("POST", target.url, headers=dict(target.headers), content=target.bodies[0])
        response = httpx.Client().send(request)
        sizes = [_http_bytes(each.headers, each.read()) for each in (request, response)]
        return Form(rate, cpu_s, rows, *sizes)

    def _send(self, target: Target, requests_per_s: float, seconds: float, seed: int) -> tuple[OpenLoop, float, float]:
        """Send for so long; returns the requests, the CPU time of each, and how many there were a model call."""
        due_s = draw_poisson(np.random.default_rng(seed), requests_per_s=requests_per_s, seconds=seconds)
        calls, cpu_s = self._calls(), self._cpu_s()
        done = send_on_time(target, due_s)
        cpu_s = self._cpu_s() - cpu_s
        return done, cpu_s / len(due_s), len(due_s) / max(1.0, self._calls() - calls)

    def _cpu_s(self) -> float:
        assert self._service.process
        return self._service.process.cpu_s()

    def _calls(self) -> float:
        lines = httpx.get(f"{self._url}/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith("serving_call_rows_count"))


def _join(
    share: float, rate: float, seconds: float, seeds: Sequence[int], runs: Sequence[tuple[OpenLoop, float, float]]
) -> Level:
    mean_s, p50_s, p99_s = summarize([run.latencies_s[~run.failed] for run, _, _ in runs])
    return Level(
        share, rate, seconds, seeds,
        failed=sum(int(run.failed.sum()) for run, _, _ in runs),
        kept_up=all(run.kept_up for run, _, _ in runs),
        mean_s=mean_s, p50_s=p50_s, p99_s=p99_s,
        cpu_s=float(np.mean([cpu_s for _, cpu_s, _ in runs])),
        rows_per_call=float(np.mean([rows for _, _, rows in runs])),
    )  # fmt: skip


def summarize(latencies_s: Sequence[np.ndarray]) -> tuple[float, float, float]:
    """Return mean, p50 and p99 of the latencies of several rounds: of each, the median of the rounds.

    One bad moment of the machine, such as 100 ms in which the host takes the core away, changes one round.
    """
    mean_s, p50_s, p99_s = np.median(
        [(each.mean(), *np.percentile(each, [50, 99])) for each in latencies_s], axis=0
    ).tolist()
    return mean_s, p50_s, p99_s


def _http_bytes(headers: httpx.Headers, body: bytes) -> int:
    return len(body) + sum(len(name) + len(value) + 4 for name, value in headers.raw) + 40  # first line


def _measure_core(core: int, version: Path) -> tuple[list[float], list[float], float, list[float]]:
    """Measure the model's calls and the core's stalls, in a process of its own, as the service calls the model."""
    os.sched_setaffinity(0, [core])
    from serving.inference.saved_model import SavedModelPredictor
    from serving.process import configure_tensorflow
    from serving.process_memory import keep_freed_memory

    keep_freed_memory()
    configure_tensorflow()
    predictor = SavedModelPredictor(version)
    times_s: dict[int, list[float]] = {rows: [] for rows in BATCH_SIZES}
    rng = np.random.default_rng(0)
    inputs = {rows: {"images": rng.integers(0, 256, (rows, 32, 32, 3), np.uint8)} for rows in BATCH_SIZES}
    until_s = time.perf_counter() + 10
    while time.perf_counter() < until_s:
        for rows in BATCH_SIZES:
            for _ in range(max(1, 32 // rows)):
                started_s = time.perf_counter()
                predictor.predict("serving_default", inputs[rows])
                times_s[rows].append(time.perf_counter() - started_s)
    model_s = [float(np.median(times_s[rows])) for rows in BATCH_SIZES]
    ratios = np.concatenate([np.array(times_s[rows]) / np.median(times_s[rows]) for rows in BATCH_SIZES])
    stall_s, seconds = _find_stalls(10.0)
    kept = np.quantile(ratios, np.linspace(0, MAX_RATIO, 99)).tolist()
    return model_s, kept, len(stall_s) / seconds, stall_s


def _spin(core: int) -> None:
    os.sched_setaffinity(0, [core])
    while True:
        time.perf_counter()


def _find_stalls(seconds: float) -> tuple[list[float], float]:
    """Return for how long the core was taken away, each time, while a program did nothing but read the clock."""
    stalls_ns: list[int] = []
    started_ns = last_ns = time.perf_counter_ns()
    while last_ns - started_ns < seconds * 1e9:
        now_ns = time.perf_counter_ns()
        if now_ns - last_ns > STALL_S * 1e9:
            stalls_ns.append(now_ns - last_ns)
        last_ns = now_ns
    return [each / 1e9 for each in stalls_ns] or [0.0], seconds


def _core_busy_s(core: int) -> float:
    """Return the seconds that a core was not idle, the host's theft (steal) included."""
    for line in Path("/proc/stat").read_text().splitlines():
        name, *fields = line.split()
        if name == f"cpu{core}":
            user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields[:8])
            return (user + nice + system + irq + softirq + steal) / _TICKS
    return 0.0


def _read_processor() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()
