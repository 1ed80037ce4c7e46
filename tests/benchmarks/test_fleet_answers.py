"""Answers about fleets: monotone where they have to be, and no failed request where there must be none."""

from __future__ import annotations

import dataclasses

import pytest

from benchmarks.fleet_answers import (
    Machine,
    Rollout,
    count_replicas,
    find_largest_load,
    plan_fleet,
    simulate_rollout,
    simulate_slice,
    simulate_zone_loss,
    wire_bytes,
)
from benchmarks.simulation import ServiceTimes
from benchmarks.worker_measurement import Form

# Slower than the service, so that fewer requests make a load.
TIMES = ServiceTimes(request_s=5e-3, call_s=2e-3, rows=(1, 64), model_s=(10e-3, 120e-3))
JSON = Form(requests_per_s=500, cpu_s=1e-3, rows_per_call=1.5, request_bytes=13_200, response_bytes=330)
MACHINE = Machine(32, 0.04, network_gbit=10, network_share=0.5, balancer_per_s=100_000, balancer_gbit=25)


def test_a_looser_bar_allows_more_load_and_a_larger_load_needs_more_replicas() -> None:
    largest = [find_largest_load(TIMES, p99_s=bar_s, requests=1_500) for bar_s in (0.001, 0.05, 0.1, 0.2)]
    assert largest[0] == 0  # a request takes longer alone
    assert 0 < largest[1] < largest[2] < largest[3]
    needed = [count_replicas(load, largest[2]) for load in (1, 100, 1_000, 10_000)]
    assert needed[0] == 1
    assert needed == sorted(needed)
    assert count_replicas(10_000, largest[3]) <= needed[3]
    assert (needed[3] - 1) * largest[2] < 10_000 <= needed[3] * largest[2]


def test_a_slice_of_a_fleet_has_the_latency_of_one_worker() -> None:
    one, many = (simulate_slice(TIMES, workers=n, per_worker_per_s=50, seconds=200 / n) for n in (1, 8))
    assert many == pytest.approx(one, rel=0.2)


def test_an_update_fails_no_request_if_ending_replicas_accept_until_the_balancer_knows() -> None:
    rollout = Rollout(surge=1, unavailable=0, ready_s=2.0)
    done = simulate_rollout(TIMES, rollout, replicas=3, per_replica_per_s=40)
    assert done.during.requests > 500
    assert done.during.failed == done.before.failed == 0
    assert done.most_running == 4
    hasty = simulate_rollout(TIMES, dataclasses.replace(rollout, pre_stop_s=0.0), replicas=3, per_replica_per_s=40)
    assert 0 < hasty.during.failed < hasty.during.requests / 3
    assert hasty.before.failed == 0


def test_an_update_without_surge_overloads_the_others() -> None:
    surge, none = (
        simulate_rollout(TIMES, Rollout(surge=s, unavailable=u, ready_s=3.0), replicas=3, per_replica_per_s=75)
        for s, u in ((1, 0), (0, 1))
    )
    assert none.most_running == 3
    assert none.during.failed == 0
    assert none.during.p99_s > 2 * surge.during.p99_s


@pytest.mark.parametrize("retries", [0, 1])
def test_a_lost_zone_fails_its_share_until_it_is_detected_unless_requests_are_retried(retries: int) -> None:
    lost = simulate_zone_loss(TIMES, zones=3, per_zone=2, load_per_s=240, detect_s=5, retries=retries)
    assert lost.before.failed < 10  # in flight when the zone was lost
    assert lost.after.failed == 0
    share = lost.undetected.failed / lost.undetected.requests
    assert share == pytest.approx(1 / 3 if retries == 0 else 1 / 9, abs=0.05)


def test_without_headroom_a_lost_zone_overloads_the_others() -> None:
    largest = find_largest_load(TIMES, p99_s=0.1, requests=1_500)
    roomy, full = (
        simulate_zone_loss(TIMES, zones=3, per_zone=2, load_per_s=share * largest * 6, detect_s=2, retries=0)
        for share in (2 / 3, 1.0)
    )
    assert roomy.after.p99_s < 0.15
    assert full.after.p99_s > 2 * roomy.after.p99_s


def test_a_plan_is_limited_by_what_is_scarcer() -> None:
    by_processor = plan_fleet(1_000_000, per_core_per_s=1_000, form=JSON, machine=MACHINE, zones=3)
    assert by_processor.cores == 1_500
    assert (by_processor.machines, by_processor.bottleneck) == (47, "processor")
    assert by_processor.cost_per_hour == pytest.approx(47 * 32 * 0.04)
    slow = dataclasses.replace(MACHINE, network_gbit=1.0)
    by_network = plan_fleet(1_000_000, per_core_per_s=1_000, form=JSON, machine=slow, zones=3)
    assert by_network.bottleneck == "network"
    assert by_network.machine_gbit <= 0.5
    assert by_network.machines == by_network.machines_by_network > 47


def test_bytes_on_the_wire_are_counted_with_their_headers() -> None:
    to_service, from_service = wire_bytes(JSON)
    assert to_service == 13_200 + 10 * 90 + 90  # ten segments, and an acknowledgement of the response
    assert from_service == 330 + 90 + 5 * 90
