"""`fluxion health`, and waiting for a node to be ready: the standard gRPC health service."""

from __future__ import annotations

import asyncio

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fluxion_core.config.settings import ClientSettings
from fluxion_core.errors import FluxionError, PeerUnavailableError
from fluxion_core.wire.status import error_from_rpc
from services.cli.connection import connect

DECODE_SERVICE = "fluxion.v1.Generation"
"""Serving when a decode node has its model loaded, is not draining, and a prefill node answers, if
it has any."""
PREFILL_SERVICE = "fluxion.v1.Handoff"
"""Serving when a prefill node has its model loaded and is not draining."""

_RETRY_SECONDS = 0.2


async def run_health(address: str, client: ClientSettings) -> int:
    """Print whether the node is alive and ready.

    Returns:
        0 if it is both, else 1.

    Raises:
        FluxionError: the node cannot be reached within client.connect_seconds, or it refuses.
    """
    rows: list[tuple[str, str]] = []
    async with connect(address, client) as channel:
        live = await check_service(channel, "", seconds=client.connect_seconds)
        rows.append(("node", live or "UNKNOWN"))
        for service in (DECODE_SERVICE, PREFILL_SERVICE):
            status = await check_service(channel, service, seconds=client.connect_seconds)
            if status is not None:
                rows.append((service, status))
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, status in rows:
        table.add_row(name, Text(status, style="green" if status == "SERVING" else "red"))
    Console().print(table)
    is_healthy = len(rows) > 1 and all(status == "SERVING" for _, status in rows)
    return 0 if is_healthy else 1


async def check_service(channel: grpc.aio.Channel, service: str, *, seconds: float) -> str | None:
    """Ask once for a service's health.

    Returns:
        SERVING or NOT_SERVING; None if the node does not know the service.

    Raises:
        FluxionError: the node does not answer within `seconds`, or it refuses.
    """
    stub = health_pb2_grpc.HealthStub(channel)
    try:
        response = await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=seconds)
    except grpc.aio.AioRpcError as error:
        if error.code() == grpc.StatusCode.NOT_FOUND:
            return None
        raise error_from_rpc(error) from None
    name: str = health_pb2.HealthCheckResponse.ServingStatus.Name(response.status)
    return name


async def wait_until_ready(
    address: str, service: str, client: ClientSettings, *, seconds: float
) -> None:
    """Return as soon as the node at `address` serves `service`.

    Raises:
        PeerUnavailableError: it does not within `seconds`.
    """
    try:
        async with asyncio.timeout(seconds):
            # A node that is not up yet can announce nothing: asking again is all there is.
            while not await _is_ready(address, service, client):  # noqa: ASYNC110
                await asyncio.sleep(_RETRY_SECONDS)
    except TimeoutError:
        raise PeerUnavailableError(
            f"{address} was not ready within {seconds:g} s; its log says what it waits for"
        ) from None


async def _is_ready(address: str, service: str, client: ClientSettings) -> bool:
    """One question on a channel of its own: an old one would sit out its reconnection delay."""
    try:
        async with connect(address, client) as channel:
            return (
                await check_service(channel, service, seconds=client.connect_seconds) == "SERVING"
            )
    except FluxionError:
        return False
