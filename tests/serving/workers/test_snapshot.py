"""The sums of the metrics of several processes."""

from __future__ import annotations

import pickle

import pytest

from serving.inference.statistics import Statistics
from serving.metrics import Metrics
from serving.metrics.snapshot import EndedProcesses, Snapshot
from serving.request_context import RequestContext


def count(requests: int, *, version: int = 1) -> Metrics:
    """Return the metrics of a process that has responded to so many requests."""
    metrics = Metrics()
    for number in range(requests):
        context = RequestContext(0.0)
        context.route, context.model, context.version, context.status = "/v1", "pets", version, "200"
        metrics.requests.observe(context, 0.25 * (number + 1))
    metrics.requests.in_flight.set(requests)
    return metrics


def take(metrics: Metrics) -> Snapshot:
    snapshot: Snapshot = pickle.loads(pickle.dumps(metrics.take_snapshot({})))  # as over the channel
    return snapshot


def read(page: bytes, series: str) -> float:
    (value,) = (line.rpartition(" ")[2] for line in page.decode().splitlines() if line.startswith(series + " "))
    return float(value)


def test_counters_histograms_and_gauges_are_summed() -> None:
    metrics = count(2)
    alone = metrics.render()
    metrics.read_others = lambda: [take(count(3)), take(count(0))]
    page = metrics.render()
    assert read(page, 'serving_requests_total{model="pets",route="/v1",status="200"}') == 5
    seconds = 'serving_request_seconds_bucket{le="%s",model="pets",route="/v1",version="1"}'
    assert [read(page, seconds % bound) for bound in ("0.2", "0.5", "1.0", "+Inf")] == [0, 4, 5, 5]
    assert read(page, 'serving_request_seconds_sum{model="pets",route="/v1",version="1"}') == pytest.approx(2.25)
    assert read(page, "serving_requests_in_flight") == 5
    for name, combine in (("process_start_time_seconds", 1), ("process_max_fds", 1), ("process_threads", 3)):
        assert read(page, name) == pytest.approx(combine * read(alone, name), rel=0.2), name
    # The same metrics in the same order, with each series once.
    names = [[line.rpartition(" ")[0] for line in text.decode().splitlines()] for text in (alone, page)]
    assert names[0] == names[1]


def test_counters_of_ended_processes_stay_until_their_version_has_gone() -> None:
    ended = EndedProcesses()
    ended.add(take(count(2)))
    ended.add(take(count(3, version=2)))
    series = 'serving_request_seconds_count{model="pets",route="/v1",version="%d"}'
    metrics = count(1)

    def render() -> bytes:
        metrics.read_others = lambda: [ended.snapshot]
        return metrics.render()

    assert (read(render(), series % 1), read(render(), series % 2)) == (3, 3)
    assert read(render(), "serving_requests_in_flight") == 1
    known: set[tuple[str, int | None]] = {("pets", None), ("pets", 1)}
    ended.forget(known)  # the scrape that finds it gone still has it
    assert read(render(), series % 2) == 3
    ended.forget(known)
    assert series % 2 not in render().decode()
    assert read(render(), series % 1) == 3
    assert read(render(), 'serving_requests_total{model="pets",route="/v1",status="200"}') == 6


def test_statistics_are_summed_and_survive_the_channel() -> None:
    one, other = Statistics(), Statistics()
    one.record_success(3, seconds=0.5, queue_s=0.1, model_s=0.3)
    other.record_success(4, seconds=1.5, queue_s=0.2, model_s=0.4)
    other.record_failure(0.25)
    for statistics, rows in ((one, 3), (other, 3), (other, 1)):
        statistics.record_call(rows, 0.25)
    one.add(pickle.loads(pickle.dumps(other)))
    assert (one.rows, one.succeeded.count, one.succeeded.total_s, one.failed.count) == (7, 2, 2.0, 1)
    assert {rows: duration.count for rows, duration in one.calls.items()} == {3: 2, 1: 1}
    assert other.succeeded.count == 1
