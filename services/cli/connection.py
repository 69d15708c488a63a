"""A connection to a node, made before anything is asked, so that its absence is told at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc

from fluxion_core.config import ClientSettings
from fluxion_core.errors import PeerUnavailableError
from fluxion_core.wire.channel import open_channel


@asynccontextmanager
async def connect(address: str, client: ClientSettings) -> AsyncIterator[grpc.aio.Channel]:
    """Open a channel to `address` and wait until it is connected.

    Raises:
        PeerUnavailableError: the address refuses, or does not answer in client.connect_seconds.
        ConfigError: a certificate or token file of `client` cannot be read.
    """
    async with open_channel(address, client) as channel:
        try:
            async with asyncio.timeout(client.connect_seconds):
                is_connected = await _first_outcome(channel)
        except TimeoutError:
            raise PeerUnavailableError(
                f"{address} does not answer within {client.connect_seconds:g} s; check the "
                f"address, and that TLS is wanted by both sides or by neither"
            ) from None
        if not is_connected:
            raise PeerUnavailableError(
                f"no node accepts connections at {address}; start one with `fluxion up`, or give "
                f"the address of one that runs"
            )
        yield channel


async def _first_outcome(channel: grpc.aio.Channel) -> bool:
    """Whether the first attempt to connect succeeds."""
    state = channel.get_state(try_to_connect=True)
    while state is not grpc.ChannelConnectivity.READY:
        if state is grpc.ChannelConnectivity.TRANSIENT_FAILURE:
            return False
        await channel.wait_for_state_change(state)
        state = channel.get_state(try_to_connect=True)
    return True
