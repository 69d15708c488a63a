"""A connection to a node, made before anything is asked, so that its absence is told at once."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc

from fluxion_core.config import ClientSettings
from fluxion_core.errors import ConfigError, PeerUnavailableError
from fluxion_core.wire.channel import open_channel
from services.cli.addresses import split_address


@asynccontextmanager
async def connect(
    address: str, client: ClientSettings, *, flag: str = "--address"
) -> AsyncIterator[grpc.aio.Channel]:
    """Open a channel to `address` and wait until it is connected.

    A plain TCP connection is tried first: it fails at once where nobody listens, while a channel
    goes on trying.

    Args:
        address: host:port.
        client: how to call; both attempts together get its connect_seconds.
        flag: where the address was given, for the error.

    Raises:
        PeerUnavailableError: the address refuses, or does not answer in client.connect_seconds.
        ConfigError: the address is malformed, or a file named in `client` cannot be read.
    """
    host, port = split_address(address, flag=flag)
    try:
        channel = open_channel(address, client)
    except OSError as error:
        raise ConfigError(f"{error.filename}: {error.strerror}; give a PEM or token file") from None
    async with channel:
        try:
            async with asyncio.timeout(client.connect_seconds):
                _, writer = await asyncio.open_connection(host.strip("[]"), port)
                writer.close()
                await channel.channel_ready()
        except TimeoutError:
            raise PeerUnavailableError(
                f"{address} does not answer within {client.connect_seconds:g} s; check the "
                f"address, and that TLS is wanted by both sides or by neither"
            ) from None
        except OSError as error:
            raise PeerUnavailableError(
                f"no node accepts connections at {address} ({_reason(error)}); start one with "
                f"`fluxion up`, or give the address of one that runs"
            ) from None
        yield channel


def _reason(error: OSError) -> str:
    """The system's words. asyncio's own text repeats the address, or lists several failures."""
    if isinstance(error, socket.gaierror):
        return str(error.strerror)
    return os.strerror(error.errno) if error.errno else "unreachable"
