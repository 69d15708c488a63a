"""Whoever watches a node's health is told of changes, whatever the others do."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from grpc_health.v1 import health_pb2

from fluxion_core.wire import node_health
from fluxion_core.wire.node_health import NodeHealth

Statuses = health_pb2.HealthCheckResponse
REQUEST = health_pb2.HealthCheckRequest(service="s")


class EndedCallError(Exception):
    """A call was ended with a status."""


class Client:
    """A call's context: takes what is written, or nothing."""

    def __init__(self, *, takes: bool = True) -> None:
        self._takes = takes
        self.told: asyncio.Queue[int] = asyncio.Queue()

    async def write(self, response) -> None:
        if not self._takes:
            await asyncio.Event().wait()
        self.told.put_nowait(response.status)

    async def abort(self, status: grpc.StatusCode, details: str) -> None:
        raise EndedCallError(status, details)


async def test_a_watcher_that_takes_nothing_holds_up_nobody_and_is_let_go():
    health = NodeHealth(unread_seconds=0.1)
    reads, deaf = Client(), Client(takes=False)
    watching = [asyncio.ensure_future(health.Watch(REQUEST, client)) for client in (reads, deaf)]
    assert await reads.told.get() == Statuses.SERVICE_UNKNOWN
    health.set("s", is_serving=False)
    assert await reads.told.get() == Statuses.NOT_SERVING
    health.set("s", is_serving=True)
    assert await reads.told.get() == Statuses.SERVING
    assert (await health.Check(REQUEST, Client())).status == Statuses.SERVING
    health.end()
    assert await reads.told.get() == Statuses.NOT_SERVING
    health.set("s", is_serving=True)
    assert (await health.Check(REQUEST, Client())).status == Statuses.NOT_SERVING
    with pytest.raises(EndedCallError, match="ABORTED"):
        await watching[1]
    watching[0].cancel()


async def test_watchers_are_bounded_and_checks_are_not(monkeypatch):
    monkeypatch.setattr(node_health, "MAX_WATCHERS", 1)
    health = NodeHealth(unread_seconds=60)
    health.set("s", is_serving=True)
    first = Client()
    watching = asyncio.ensure_future(health.Watch(REQUEST, first))
    assert await first.told.get() == Statuses.SERVING
    with pytest.raises(EndedCallError, match="RESOURCE_EXHAUSTED"):
        await health.Watch(REQUEST, Client())
    assert (await health.Check(REQUEST, Client())).status == Statuses.SERVING
    with pytest.raises(EndedCallError, match="NOT_FOUND"):
        await health.Check(health_pb2.HealthCheckRequest(service="other"), Client())
    watching.cancel()
    await asyncio.wait({watching})
    again = Client()
    watching = asyncio.ensure_future(health.Watch(REQUEST, again))
    assert await again.told.get() == Statuses.SERVING
    watching.cancel()
