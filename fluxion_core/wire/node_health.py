"""`grpc.health.v1.Health` of a node, which anybody may ask.

In the place of grpcio-health-checking's own servicer: there a watcher that takes nothing of its
answer keeps every other from being told of a change, and the node from getting ready and from
ending.
"""

from __future__ import annotations

import asyncio

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

MAX_WATCHERS = 1024
"""At a time; further ones are refused. Check is always answered."""


class NodeHealth(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """Health of each service, and who watches it. On the event loop only.

    Args:
        unread_seconds: a watcher that does not take a change for so long is let go.
    """

    def __init__(self, *, unread_seconds: float) -> None:
        self._unread_seconds = unread_seconds
        self._is_serving: dict[str, bool] = {}
        self._changed = asyncio.Event()
        self._num_watchers = 0
        self._is_ending = False

    def set(self, service: str, *, is_serving: bool) -> None:
        """Change a service's health; after `end` nothing changes any more."""
        if self._is_ending:
            return
        self._is_serving[service] = is_serving
        self._changed.set()
        self._changed = asyncio.Event()

    def end(self) -> None:
        """No service serves any more. Idempotent."""
        for service in self._is_serving:
            self.set(service, is_serving=False)
        self._is_ending = True

    async def Check(  # noqa: N802 - the rpc's name
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext
    ) -> health_pb2.HealthCheckResponse:
        """The health now; NOT_FOUND for a service that is not known."""
        if request.service not in self._is_serving:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no service {request.service!r}")
        return health_pb2.HealthCheckResponse(status=self._status(request.service))

    async def Watch(  # noqa: N802 - the rpc's name
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext
    ) -> None:
        """The health now, and each time that it changes; some changes may be left out."""
        if self._num_watchers >= MAX_WATCHERS:
            await context.abort(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"{MAX_WATCHERS} clients watch this node's health already; use Check",
            )
        self._num_watchers += 1
        try:
            told: int | None = None
            while True:
                changed, status = self._changed, self._status(request.service)
                if status != told:
                    async with asyncio.timeout(self._unread_seconds):
                        await context.write(health_pb2.HealthCheckResponse(status=status))
                    told = status
                await changed.wait()
        except TimeoutError:
            await context.abort(
                grpc.StatusCode.ABORTED,
                f"the client took nothing of the answer for {self._unread_seconds:g} s "
                f"(server.unread_seconds)",
            )
        finally:
            self._num_watchers -= 1

    def _status(self, service: str) -> int:
        statuses = health_pb2.HealthCheckResponse
        if service not in self._is_serving:
            return int(statuses.SERVICE_UNKNOWN)
        is_serving = self._is_serving[service]
        return int(statuses.SERVING if is_serving else statuses.NOT_SERVING)
