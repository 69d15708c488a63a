"""A connection to a node, made before anything is asked, so that its absence is told at once."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
from pydantic import ValidationError

from fluxion_core.config.addresses import Address, address_of
from fluxion_core.config.setting_errors import problems_of
from fluxion_core.config.settings import ClientSettings, ClientTlsSettings
from fluxion_core.errors import AuthenticationError, ConfigError, PeerUnavailableError
from fluxion_core.wire.channel import check_client, open_channel


def client_settings(
    connect_seconds: float,
    tls_ca: Path | None,
    tls_cert: Path | None,
    tls_key: Path | None,
    token_file: Path | None,
) -> ClientSettings:
    """Settings of the flags that commands share.

    Raises:
        ConfigError: flags that go together were not given together.
    """
    if (tls_cert is None) != (tls_key is None):
        raise ConfigError("--tls-cert and --tls-key go together; give both or neither")
    if tls_cert is not None and tls_ca is None:
        raise ConfigError("--tls-cert needs --tls-ca, which turns TLS on")
    try:
        return ClientSettings(
            connect_seconds=connect_seconds,
            tls=ClientTlsSettings(authority=tls_ca, certificate=tls_cert, key=tls_key),
            token_file=token_file,
        )
    except ValidationError as error:
        raise ConfigError("; ".join(problems_of(error, {}))) from None


@asynccontextmanager
async def connect(
    address: str, client: ClientSettings, *, flag: str = "--address"
) -> AsyncIterator[grpc.aio.Channel]:
    """Open a channel to `address` and wait until it is connected.

    A plain connection is tried first, with a TLS handshake if the channel will make one: it fails
    at once and says why, while a channel goes on trying.

    Args:
        address: host:port.
        client: how to call; both attempts together get its connect_seconds.
        flag: where the address was given, for the error.

    Raises:
        PeerUnavailableError: the address refuses, or does not answer in client.connect_seconds.
        AuthenticationError: the certificate of one side does not satisfy the other.
        ConfigError: the address is malformed, or a file named in `client` cannot be used.
    """
    peer = address_of(address, flag)
    check_client(client, [address], "client")
    async with open_channel(address, client) as channel:
        try:
            async with asyncio.timeout(client.connect_seconds):
                await _try_connection(peer, client.tls)
                await channel.channel_ready()
        except TimeoutError:
            raise PeerUnavailableError(
                f"{address} does not answer within {client.connect_seconds:g} s; check the "
                f"address, and that TLS is wanted by both sides or by neither"
            ) from None
        except ssl.SSLError as error:
            raise AuthenticationError(
                f"{address}: no TLS connection: {_tls_reason(error)}"
            ) from None
        except OSError as error:
            raise PeerUnavailableError(
                f"no node accepts connections at {address} ({_reason(error)}); start one with "
                f"`fluxion up`, or give the address of one that runs"
            ) from None
        yield channel


async def _try_connection(peer: Address, tls: ClientTlsSettings) -> None:
    """Connect as the channel will, and hang up.

    Raises:
        OSError: nobody listens, or an SSLError: the handshake failed.
        AuthenticationError: the node hung up after the handshake.
    """
    context = None
    if tls.authority is not None:
        context = ssl.create_default_context(cafile=str(tls.authority))
        context.set_alpn_protocols(["h2"])
        if tls.certificate is not None:
            context.load_cert_chain(tls.certificate, tls.key)
    reader, writer = await asyncio.open_connection(peer.host, peer.port, ssl=context)
    try:
        # A node that takes a connection speaks first; with TLS 1.3 it looks at the client's
        # certificate, or the want of one, when the client thinks that it is connected.
        if context is not None and not await _first_byte(reader):
            raise AuthenticationError(
                f"{peer} wants a certificate; give --tls-cert and --tls-key"
                if tls.certificate is None
                else f"{peer} does not accept the certificate of {tls.certificate}: it is "
                f"of an authority that the node does not know, or has expired"
            )
    finally:
        writer.transport.abort()


async def _first_byte(reader: asyncio.StreamReader) -> bytes:
    """What the node says first; nothing if it hangs up."""
    try:
        return await reader.read(1)
    except ConnectionResetError:
        return b""


def _tls_reason(error: ssl.SSLError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the node's certificate is not accepted by --tls-ca: {error.verify_message}"
    if error.reason in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE"):
        return "the node does not speak TLS; leave out --tls-ca"
    return error.reason or str(error)


def _reason(error: OSError) -> str:
    """The system's words. asyncio's own text repeats the address, or lists several failures."""
    if isinstance(error, socket.gaierror):
        return str(error.strerror)
    return os.strerror(error.errno) if error.errno else "unreachable"
