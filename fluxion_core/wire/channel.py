"""Client channels: to a prefill node, or to a decode node."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import grpc

from fluxion_core.config.addresses import is_loopback
from fluxion_core.config.settings import ClientSettings
from fluxion_core.errors import ConfigError
from fluxion_core.wire.credential_files import WatchedFiles
from fluxion_core.wire.frame_limits import MAX_FRAME_PAYLOAD_BYTES, PREFIX_BYTES
from fluxion_core.wire.tls import channel_credentials
from fluxion_core.wire.tokens import read_token

KEEPALIVE_MS = 20_000
"""An idle connection is probed this often, so that a peer that vanished is noticed."""

KEEPALIVE_TIMEOUT_MS = 10_000

_OPTIONS: tuple[tuple[str, int | str], ...] = (
    # Nodes, and the command, reach each other directly, whatever http_proxy says.
    ("grpc.enable_http_proxy", 0),
    # The largest message on any of our methods is a KV frame.
    ("grpc.max_receive_message_length", MAX_FRAME_PAYLOAD_BYTES + PREFIX_BYTES),
    ("grpc.keepalive_time_ms", KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
    # Retrying is ours to decide: a hand-off is retried on another node, not on the same one.
    ("grpc.enable_retries", 0),
    # A channel that is opened anew gets a connection of its own, not that of the last one.
    ("grpc.use_local_subchannel_pool", 1),
    # A node that comes back is found within a second, not within two minutes.
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.initial_reconnect_backoff_ms", 100),
    # Frames are 1 MiB: reading the socket in larger pieces moves 1.3 GB/s in the place of 1.0.
    ("grpc.experimental.tcp_read_chunk_size", 1 << 20),
    ("grpc.experimental.tcp_max_read_chunk_size", 4 << 20),
)


def open_channel(
    address: str,
    settings: ClientSettings,
    *,
    server_name: str | None = None,
    credentials: grpc.ChannelCredentials | None = None,
) -> grpc.aio.Channel:
    """A channel to `address` (host:port); connects when first used. Close it.

    Args:
        address: host:port.
        settings: how to call.
        server_name: whose certificate is expected there, if `address` is what a name resolved to.
        credentials: those of settings.tls, if they have been read.

    Raises:
        ConfigError: see `check_client`; what has expired is left to the node to refuse.
    """
    check_token_is_safe(address, settings)
    interceptors: list[grpc.aio.ClientInterceptor] = []
    if settings.token_file is not None:
        token = _BearerToken(settings.token_file)
        interceptors += [_UnaryToken(token), _StreamToken(token)]
    options = _options(settings)
    if server_name is not None:
        options += (
            ("grpc.default_authority", server_name),
            ("grpc.ssl_target_name_override", server_name),
        )
    # A certificate that expires while a node runs is refused by the other node, which says so.
    credentials = credentials or channel_credentials(settings.tls, "tls", must_be_valid=False)
    if credentials is None:
        return grpc.aio.insecure_channel(address, options=options, interceptors=interceptors)
    return grpc.aio.secure_channel(address, credentials, options=options, interceptors=interceptors)


def open_blocking_channel(address: str, settings: ClientSettings) -> grpc.Channel:
    """A channel for threads, in place of an event loop; otherwise as `open_channel`'s.

    Raises:
        ConfigError: see `check_client`; what has expired is left to the node to refuse.
    """
    check_token_is_safe(address, settings)
    credentials = channel_credentials(settings.tls, "tls", must_be_valid=False)
    if credentials is None:
        channel = grpc.insecure_channel(address, options=_options(settings))
    else:
        channel = grpc.secure_channel(address, credentials, options=_options(settings))
    if settings.token_file is None:
        return channel
    return grpc.intercept_channel(channel, _BlockingToken(_BearerToken(settings.token_file)))


def check_client(settings: ClientSettings, addresses: Sequence[str], section: str) -> None:
    """Find what is wrong with credentials before they are needed.

    Args:
        settings: how nodes are called.
        addresses: host:port of the nodes.
        section: what the errors call the settings.

    Raises:
        ConfigError: a file is missing, malformed, expired or readable by others, the key does not
            belong to the certificate, or the token would travel unencrypted.
    """
    channel_credentials(settings.tls, f"{section}.tls", must_be_valid=True)
    if settings.token_file is not None:
        read_token(settings.token_file, f"{section}.token_file")
    for address in addresses:
        check_token_is_safe(address, settings)


def check_token_is_safe(address: str, settings: ClientSettings) -> None:
    """Refuse to send a token without TLS to another machine.

    Raises:
        ConfigError: the token would travel unencrypted.
    """
    is_sent = settings.token_file is not None and settings.tls.authority is None
    if is_sent and not is_loopback(address):
        raise ConfigError(
            f"the token of {settings.token_file} would travel to {address} unencrypted; give the "
            f"authority of the node's certificate, which turns TLS on"
        )


def _options(settings: ClientSettings) -> tuple[tuple[str, int | str], ...]:
    # An attempt to connect may take so long; the pause after one that failed is the backoff's.
    return (*_OPTIONS, ("grpc.min_reconnect_backoff_ms", int(settings.connect_seconds * 1000)))


class _BearerToken:
    """Adds `authorization: Bearer …` to a call."""

    def __init__(self, path: Path) -> None:
        self._token = WatchedFiles([path], lambda: read_token(path, "token_file"))

    def added_to(self, details: grpc.aio.ClientCallDetails) -> grpc.aio.ClientCallDetails:
        """The call with the token."""
        entry = ("authorization", f"Bearer {self._token.current()}")
        return details._replace(metadata=[*(details.metadata or ()), entry])


# gRPC takes an interceptor for one kind of call only, whatever else it is.
class _UnaryToken(grpc.aio.UnaryUnaryClientInterceptor):  # type: ignore[misc]
    def __init__(self, token: _BearerToken) -> None:
        self._token = token

    async def intercept_unary_unary(self, continuation, details, request):  # type: ignore[no-untyped-def]
        return await continuation(self._token.added_to(details), request)


class _StreamToken(grpc.aio.UnaryStreamClientInterceptor):  # type: ignore[misc]
    def __init__(self, token: _BearerToken) -> None:
        self._token = token

    async def intercept_unary_stream(self, continuation, details, request):  # type: ignore[no-untyped-def]
        return await continuation(self._token.added_to(details), request)


class _BlockingToken(grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor):  # type: ignore[misc]
    def __init__(self, token: _BearerToken) -> None:
        self._token = token

    def intercept_unary_unary(self, continuation, details, request):  # type: ignore[no-untyped-def]
        return continuation(self._token.added_to(details), request)

    def intercept_unary_stream(self, continuation, details, request):  # type: ignore[no-untyped-def]
        return continuation(self._token.added_to(details), request)
