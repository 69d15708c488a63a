"""`fluxion health`, and waiting for a node to be ready: the standard gRPC health service."""

from __future__ import annotations

import asyncio

from rich.table import Table
from rich.text import Text

from fluxion_core.client import NO_RETRIES, AsyncClient
from fluxion_core.config.commands import FAILED, OK
from fluxion_core.config.settings import ClientSettings
from fluxion_core.errors import FluxionError, PeerUnavailableError
from services.cli.commands.health import Health

DECODE_SERVICE = "fluxion.v1.Generation"
"""Serving when a decode node has its model loaded, is not draining, and a prefill node answers, if
it has any."""
PREFILL_SERVICE = "fluxion.v1.Handoff"
"""Serving when a prefill node has its model loaded and is not draining."""

_RETRY_SECONDS = 0.2


async def run_health(options: Health) -> int:
    """Print whether the node is alive and ready; keep it as JSON if that is wanted.

    Returns:
        0 if it is both, else 1.

    Raises:
        FluxionError: the node cannot be reached within client.connect_seconds, or it refuses.
    """
    client = options.connection.settings()
    seconds = client.connect_seconds
    services: dict[str, str] = {}
    async with AsyncClient(options.address, client, retry=NO_RETRIES) as node:
        services[""] = await node.health("", deadline_seconds=seconds) or "UNKNOWN"
        for service in (DECODE_SERVICE, PREFILL_SERVICE):
            status = await node.health(service, deadline_seconds=seconds)
            if status is not None:
                services[service] = status
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, status in services.items():
        style = "green" if status == "SERVING" else "red"
        table.add_row(name or "node", Text(status, style=style))
    options.console().print(table)
    is_healthy = len(services) > 1 and set(services.values()) == {"SERVING"}
    options.write({"address": options.address, "healthy": is_healthy, "services": services})
    return OK if is_healthy else FAILED


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
        async with AsyncClient(address, client, retry=NO_RETRIES) as node:
            status = await node.health(service, deadline_seconds=client.connect_seconds)
            return status == "SERVING"
    except FluxionError:
        return False
