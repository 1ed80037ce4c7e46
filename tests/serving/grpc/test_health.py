"""`HealthService` without a server."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from grpc_health.v1 import health_pb2

from serving.grpc.health import HealthService


def test_a_watch_that_begins_between_two_changes_reports_both(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second change is back to what the service computed before the watch began."""

    async def receive(_: Any, call: Any) -> str:  # noqa: ARG001
        return ""

    async def watch() -> list[int]:
        states = [False]
        service: Any = HealthService(("",), lambda: states[-1], receiver=None, budget=None)  # type: ignore[arg-type]
        responses = service.make_watch_handler().stream_stream(None, None)
        await asyncio.sleep(0)  # the service computes the first state
        reported = []
        for state in (True, False):
            states.append(state)
            data = await asyncio.wait_for(anext(responses), 30)
            reported.append(health_pb2.HealthCheckResponse.FromString(data).status)
        await service.drain(0)
        return reported

    monkeypatch.setattr(HealthService, "_receive_service", receive)
    states = health_pb2.HealthCheckResponse
    assert asyncio.run(watch()) == [states.SERVING, states.NOT_SERVING]
