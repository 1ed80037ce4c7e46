"""The service under the memory limit of its manifest, during attacks that would need many times that limit."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.hostile import HostileProcess, Outcome, Server, count_outcomes
from benchmarks.memory_cgroup import MemoryCgroup, parse_bytes
from benchmarks.probe import ProbeProcess
from benchmarks.service import PROJECT, Service
from tests.serving.conftest import requires_cgroups
from tests.serving.speed import measure_slowdown

MANIFEST = PROJECT / "deploy" / "kubernetes" / "service.yaml"

# p99 of small requests during an attack. They take 1 to 5 ms without load; the bound only rules out queues of seconds.
MAX_P99_S = 1.0
# All attacks at once keep both cores busy.
MAX_P99_OF_ALL_S = 1.0
# One thread of the gRPC library handles all messages, so a gigabyte of large ones delays small ones.
MAX_P99_GRPC_S = 3.0
# Growth after a burst: allocator caches and thread stacks, but neither bodies nor images.
KEPT_MB = 300
RETURNED_WITHIN_S = 15

# Without a memory budget, each of them would exceed the limit.
ATTACKS = (
    "gzip_for_no_model",
    "gzip_json",
    "v2_compressed_json",
    "tall_png",
    "giant_pngs",
    "photos",
    "large_json",
    "large_v2_json",
    "chunked_json",
    "many_images",
    "grpc_messages",
    "grpc_compressed",
    "stalled_uploads",
    "scan_bombs",
)

pytestmark = requires_cgroups


class LimitedService:
    """A service under the manifest's limit with well-behaved clients; restarted after it was killed."""

    def __init__(self, models: Path, folder: Path) -> None:
        self._models = models
        self._folder = folder
        self._starts = 0
        self.service: Service | None = None

    def ensure(self) -> tuple[Service, ProbeProcess, Server]:
        if self.service is None or not self.service.is_alive():
            self.stop()
            self._starts += 1
            folder = self._folder / str(self._starts)
            folder.mkdir()
            self._cgroup = MemoryCgroup(read_memory_limit())
            self.service = service = Service(self._models, folder / "service.log", cgroup=self._cgroup)
            self._server = Server(service.url, service.grpc_address, "colours")
            kinds = ("healthz", "upload", "json", "base64", "v2", "grpc")
            self._probe = ProbeProcess(
                service.url,
                service.grpc_address,
                model="colours",
                kinds=kinds,
                log=folder / "probe",
                # Each response must have the label of its own image.
                expect="red",
            )
            time.sleep(1)  # the first requests of each kind take longer
            self.resting_mb = service.resident_mb()
        return self.service, self._probe, self._server

    def stop(self) -> None:
        if self.service is not None:
            self._probe.stop()
            self.service.stop()
            self._cgroup.remove()
            self.service = None


def read_memory_limit() -> int:
    """Return the limit that the Kubernetes manifest sets, in bytes."""
    limit = re.search(r"limits:\s*\{[^}]*memory:\s*\"?([0-9]+[KMG]i?)", MANIFEST.read_text())
    assert limit, f"{MANIFEST} sets no memory limit as `limits: {{memory: 2Gi}}`"
    return parse_bytes(limit[1])


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory, colours: Path) -> Iterator[LimitedService]:
    folder = tmp_path_factory.mktemp("limited")
    shutil.copytree(colours, folder / "models" / "colours" / "7")
    limited = LimitedService(folder / "models", folder)
    yield limited
    limited.stop()


@pytest.fixture(scope="module")
def hostile() -> Iterator[HostileProcess]:
    with HostileProcess() as hostile:
        yield hostile


def attack(
    limited: LimitedService,
    hostile: HostileProcess,
    names: Sequence[str],
    *,
    seconds: float = 0,
    max_p99_s: float = MAX_P99_S,
) -> Mapping[str, Sequence[Outcome]]:
    """Run attacks; fails if the service ends, responds incorrectly, or delays the well-behaved clients."""
    service, probe, server = limited.ensure()
    hostile.prepare(names, server)
    started_s = time.monotonic()
    attacking = hostile.start(names, server, seconds=seconds)
    while not attacking.done():
        if not service.is_alive():
            pytest.fail(f"{', '.join(names)}: {service.describe_end()}")
        time.sleep(0.05)
    outcomes = attacking.result()
    ended_s = time.monotonic()
    assert service.is_alive(), f"{', '.join(names)}: {service.describe_end()}"
    for name, of_attack in outcomes.items():
        print(name, count_outcomes(of_attack), f"{max(outcome.seconds for outcome in of_attack):.1f} s at most")
    latencies = probe.read(started_s, ended_s)
    for of_kind in latencies.values():
        print(of_kind)
    faults = [f"{name}: {o}: {o.fault}" for name, of_attack in outcomes.items() for o in of_attack if o.fault]
    assert not faults, "\n".join(faults[:10])
    failed = [f"{of_kind.kind}: {error}" for of_kind in latencies.values() for error in of_kind.errors]
    assert not failed, f"{len(failed)} well-behaved requests failed:\n" + "\n".join(failed[:10])
    late, slowdown = [], measure_slowdown()
    for of_kind in latencies.values():
        most_s = slowdown * (max(MAX_P99_GRPC_S, max_p99_s) if of_kind.kind == "grpc" else max_p99_s)
        if of_kind.samples and of_kind.percentile_s(99) > most_s:
            late.append(f"more than {most_s:.1f} s: {of_kind}")
    assert not late, "well-behaved requests waited too long:\n" + "\n".join(late)
    return outcomes


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_neither_ends_the_service_nor_delays_other_clients(
    limited: LimitedService, hostile: HostileProcess, name: str
) -> None:
    outcomes = attack(limited, hostile, [name])[name]
    if name == "photos":
        # Sixteen photos are a legitimate load: they are queued, and all are served.
        assert count_outcomes(outcomes) == {"200": 16}


def test_all_attacks_at_once(limited: LimitedService, hostile: HostileProcess) -> None:
    attack(limited, hostile, ATTACKS, seconds=10, max_p99_s=MAX_P99_OF_ALL_S)
    service, _, _ = limited.ensure()
    waited_until_s = time.monotonic() + RETURNED_WITHIN_S
    while service.resident_mb() > limited.resting_mb + KEPT_MB:
        assert time.monotonic() < waited_until_s, (
            f"{service.resident_mb():,.0f} MB are resident {RETURNED_WITHIN_S} s after the burst; "
            f"before it, {limited.resting_mb:,.0f} MB were"
        )
        time.sleep(0.2)


def test_the_log_has_no_tracebacks(limited: LimitedService) -> None:
    service, _, _ = limited.ensure()
    log: Any = service.log.read_text(errors="replace")
    assert "Traceback" not in log, log[-3000:]
