"""A connection to a node, tried before anything is asked, so that its absence is told at once."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import time
from concurrent.futures import ThreadPoolExecutor

import grpc

from fluxion_core.config.addresses import Address, address_of
from fluxion_core.config.settings import ClientSettings, ClientTlsSettings
from fluxion_core.errors import AuthenticationError, PeerUnavailableError
from fluxion_core.wire.channel import check_client, open_blocking_channel, open_channel


def check_target(address: str, settings: ClientSettings) -> Address:
    """The address taken apart, and all that is wrong with it or with credentials told.

    Raises:
        ConfigError: the address is malformed, or a file named in `settings` cannot be used.
    """
    peer = address_of(address, "address")
    check_client(settings, [address], "client")
    return peer


async def connect(peer: Address, settings: ClientSettings) -> grpc.aio.Channel:
    """A channel that is connected. Close it.

    A plain connection is tried first, with a TLS handshake if the channel will make one: it fails
    at once and says why, while a channel goes on trying. Both get connect_seconds together.

    Raises:
        PeerUnavailableError: the address refuses, or does not answer in connect_seconds.
        AuthenticationError: the certificate of one side does not satisfy the other.
    """
    channel = open_channel(str(peer), settings)
    try:
        async with asyncio.timeout(settings.connect_seconds):
            await _try_connection(peer, settings.tls)
            await channel.channel_ready()
    except TimeoutError:
        await channel.close()
        raise _no_answer(peer, settings) from None
    except BaseException:
        await channel.close()
        raise
    return channel


def connect_blocking(peer: Address, settings: ClientSettings) -> grpc.Channel:
    """A channel that is connected, for threads; also where an event loop runs in this one.

    Raises:
        FluxionError: see `connect`.
    """

    async def try_in_time() -> None:
        async with asyncio.timeout(settings.connect_seconds):
            await _try_connection(peer, settings.tls)

    deadline = time.monotonic() + settings.connect_seconds
    channel = open_blocking_channel(str(peer), settings)
    try:
        with ThreadPoolExecutor(max_workers=1) as thread:
            thread.submit(asyncio.run, try_in_time()).result()
        left = max(0.0, deadline - time.monotonic())
        grpc.channel_ready_future(channel).result(timeout=left)
    except (TimeoutError, grpc.FutureTimeoutError):
        channel.close()
        raise _no_answer(peer, settings) from None
    except BaseException:
        channel.close()
        raise
    return channel


def _no_answer(peer: Address, settings: ClientSettings) -> PeerUnavailableError:
    return PeerUnavailableError(
        f"{peer} does not answer within {settings.connect_seconds:g} s; check the "
        f"address, and that TLS is wanted by both sides or by neither"
    )


async def _try_connection(peer: Address, tls: ClientTlsSettings) -> None:
    """Connect as a channel will, and hang up.

    Raises:
        FluxionError: nobody listens, or one side does not accept the other's certificate.
    """
    try:
        await _connect_once(peer, tls)
    except TimeoutError:
        # The system's; an OSError too.
        raise
    except ssl.SSLError as error:
        raise AuthenticationError(f"{peer}: no TLS connection: {_tls_reason(error)}") from None
    except OSError as error:
        raise PeerUnavailableError(
            f"no node accepts connections at {peer} ({_reason(error)}); start one with "
            f"`fluxion up`, or give the address of one that runs"
        ) from None


async def _connect_once(peer: Address, tls: ClientTlsSettings) -> None:
    """A connection, with its handshake, for a moment.

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
                f"{peer} wants a certificate; give tls.certificate and tls.key (--tls-cert and "
                f"--tls-key)"
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
        return (
            f"the node's certificate is not accepted by tls.authority (--tls-ca): "
            f"{error.verify_message}"
        )
    if error.reason in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE"):
        return "the node does not speak TLS; leave out tls.authority (--tls-ca)"
    return error.reason or str(error)


def _reason(error: OSError) -> str:
    """The system's words. asyncio's own text repeats the address, or lists several failures."""
    if isinstance(error, socket.gaierror):
        return str(error.strerror)
    return os.strerror(error.errno) if error.errno else "unreachable"
