"""A model that is asked for four times what it can do: what is accepted is served in time, the rest is refused at once.

Load comes from one event loop, in which each request is a coroutine with a connection of its own.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
import uvloop

from benchmarks.busy_model import save_busy_model
from benchmarks.service import Service

ROW_S = 0.005
TIMEOUT_S = 1.0
FACTOR = 4
OVERLOAD_S = 6.0
FULL_S = 2.0
# Of the throughput of a closed loop.
MIN_GOODPUT = 0.9
CONNECTIONS = 32

BODY = b'{"instances":[[0.5,0.25]]}'


@dataclass(frozen=True)
class Reply:
    """A response, and how long after the request was due it came."""

    status: int
    retry_after: bool
    seconds: float


class Load:
    """Requests with one row each for the model `busy`."""

    def __init__(self, service: Service, headers: Mapping[str, str]) -> None:
        address = urlsplit(service.url)
        self._address = address.hostname, address.port
        head = f"POST /v1/models/busy:predict HTTP/1.1\r\nHost: service\r\nContent-Length: {len(BODY)}\r\n"
        head += "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        self._request = head.encode() + b"\r\n" + BODY
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def send(self, due_s: float) -> Reply:
        reader, writer = self._idle.pop() if self._idle else await asyncio.open_connection(*self._address)
        writer.write(self._request)
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = int(head.split(b"\r\ncontent-length:")[1].split(b"\r\n")[0])
        await reader.readexactly(length)
        if b"\r\nconnection: close" in head:
            writer.close()
        else:
            self._idle.append((reader, writer))
        return Reply(int(head[9:12]), b"\r\nretry-after:" in head, time.perf_counter() - due_s)

    async def send_in_turn(self, until_s: float) -> list[Reply]:
        replies = []
        while (now_s := time.perf_counter()) < until_s:
            replies.append(await self.send(now_s))
        return replies

    async def run_closed_loop(self, *, connections: int, seconds: float) -> list[Reply]:
        until_s = time.perf_counter() + seconds
        parts = await asyncio.gather(*(self.send_in_turn(until_s) for _ in range(connections)))
        return [reply for part in parts for reply in part]

    async def run_open_loop(self, *, per_s: float, seconds: float) -> list[Reply]:
        tasks = []
        started_s = time.perf_counter()
        for number in range(int(per_s * seconds)):
            due_s = started_s + number / per_s
            await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
            tasks.append(asyncio.create_task(self.send(due_s)))
        return await asyncio.wait_for(asyncio.gather(*tasks), 60)


@dataclass(frozen=True)
class Measured:
    """What a service does alone, at its limit and beyond it."""

    unloaded_p99_s: float
    closed_loop_per_s: float
    overload: Sequence[Reply]


async def measure(service: Service, headers: Mapping[str, str]) -> Measured:
    load = Load(service, headers)
    await load.run_closed_loop(connections=1, seconds=0.5)
    alone = await load.run_closed_loop(connections=1, seconds=1)
    full = await load.run_closed_loop(connections=CONNECTIONS, seconds=FULL_S)
    assert {reply.status for reply in [*alone, *full]} == {200}, "refused although the load is no more than it can do"
    per_s = len(full) / FULL_S
    overload = await load.run_open_loop(per_s=FACTOR * per_s, seconds=OVERLOAD_S)
    return Measured(percentile([reply.seconds for reply in alone], 99), per_s, overload)


def percentile(seconds: Sequence[float], percent: float) -> float:
    return float(np.percentile(seconds, percent))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("overload") / "models"
    save_busy_model(folder / "busy" / "1", row_s=ROW_S)
    return folder


@pytest.fixture(scope="module", params=["header", "option"])
def measured(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, models: Path) -> Measured:
    """One call at a time, so that a core is left for the service and one for the load."""
    by_header = request.param == "header"
    options = () if by_header else ("--request-timeout-s", f"{TIMEOUT_S:g}")
    headers = {"X-Request-Timeout-S": f"{TIMEOUT_S:g}"} if by_header else {}
    log = tmp_path_factory.mktemp("overload") / "log"
    with Service(models, log, "--concurrency", "1", "--log-level", "error", *options) as service:
        measured = uvloop.run(measure(service, headers))
    good = [reply.seconds for reply in measured.overload if reply.status == 200]
    in_time = sum(seconds <= TIMEOUT_S for seconds in good)
    refused = [reply.seconds for reply in measured.overload if reply.status != 200]
    print(f"{request.param}: closed loop {measured.closed_loop_per_s:.0f}/s, alone p99 {measured.unloaded_p99_s:.3f} s")
    print(f"overload: {in_time / OVERLOAD_S:.0f}/s in time, {len(good)} of {len(measured.overload)} accepted")
    for name, times in (("accepted", good), ("refused", refused)):
        if times:
            print(f"{name}: p50 {percentile(times, 50):.3f} s, p99 {percentile(times, 99):.3f} s")
    return measured


def test_goodput_stays_at_what_the_model_can_do(measured: Measured) -> None:
    in_time = sum(reply.status == 200 and reply.seconds <= TIMEOUT_S for reply in measured.overload)
    goodput_per_s = in_time / OVERLOAD_S
    assert goodput_per_s >= MIN_GOODPUT * measured.closed_loop_per_s, (
        f"{goodput_per_s:.0f} of {measured.closed_loop_per_s:.0f} requests/s were served within {TIMEOUT_S} s"
    )


def test_what_is_refused_is_refused_at_once_with_retry_after(measured: Measured) -> None:
    refused = [reply for reply in measured.overload if reply.status != 200]
    # Three of four cannot be served.
    assert len(refused) > len(measured.overload) / 2
    assert {reply.status for reply in refused} == {503}
    assert all(reply.retry_after for reply in refused)
    assert percentile([reply.seconds for reply in refused], 50) < 0.25
    assert percentile([reply.seconds for reply in refused], 99) < TIMEOUT_S


def test_what_is_accepted_is_served_in_time(measured: Measured) -> None:
    accepted = [reply.seconds for reply in measured.overload if reply.status == 200]
    assert accepted
    assert percentile(accepted, 99) < 5 * measured.unloaded_p99_s + TIMEOUT_S


@pytest.fixture(scope="module")
def busy(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Iterator[Service]:
    with Service(models, tmp_path_factory.mktemp("deadline") / "log", "--concurrency", "1") as service:
        uvloop.run(Load(service, {}).run_closed_loop(connections=1, seconds=0.5))
        yield service


@pytest.mark.parametrize("timeout", ["abc", "-1", "nan", "inf", "1,5", "1 s"])
def test_a_timeout_that_is_none_is_refused(busy: Service, timeout: str) -> None:
    reply = uvloop.run(Load(busy, {"X-Request-Timeout-S": timeout}).send(time.perf_counter()))
    assert reply.status == 400


@pytest.mark.parametrize("timeout", ["0.5", "2", "30", "86400"])
def test_a_timeout_that_can_be_kept_is_accepted(busy: Service, timeout: str) -> None:
    reply = uvloop.run(Load(busy, {"X-Request-Timeout-S": timeout}).send(time.perf_counter()))
    assert reply.status == 200


def test_a_short_timeout_behind_a_queue_is_refused_at_once_and_a_long_one_waits(busy: Service) -> None:
    async def send_behind_a_queue() -> tuple[list[Reply], Reply, Reply]:
        load = Load(busy, {})
        queue = [asyncio.create_task(load.send(time.perf_counter())) for _ in range(400)]  # two seconds of work
        await asyncio.sleep(0.3)
        hasty = await Load(busy, {"X-Request-Timeout-S": "0.2"}).send(time.perf_counter())
        patient = await Load(busy, {"X-Request-Timeout-S": "10"}).send(time.perf_counter())
        return await asyncio.gather(*queue), hasty, patient

    queue, hasty, patient = uvloop.run(send_behind_a_queue())
    assert {reply.status for reply in queue} == {200}
    assert (hasty.status, hasty.retry_after) == (503, True)
    assert hasty.seconds < 0.5
    assert patient.status == 200
