"""`fluxion health`, and waiting for a node to be ready: the standard gRPC health service."""

from __future__ import annotations

import asyncio

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fluxion_core.client import NO_RETRIES, AsyncClient
from fluxion_core.config.settings import ClientSettings
from fluxion_core.errors import FluxionError, PeerUnavailableError

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
    seconds = client.connect_seconds
    async with AsyncClient(address, client, retry=NO_RETRIES) as node:
        live = await node.health("", deadline_seconds=seconds)
        rows.append(("node", live or "UNKNOWN"))
        for service in (DECODE_SERVICE, PREFILL_SERVICE):
            status = await node.health(service, deadline_seconds=seconds)
            if status is not None:
                rows.append((service, status))
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, status in rows:
        table.add_row(name, Text(status, style="green" if status == "SERVING" else "red"))
    Console().print(table)
    is_healthy = len(rows) > 1 and all(status == "SERVING" for _, status in rows)
    return 0 if is_healthy else 1


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
