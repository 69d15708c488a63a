"""Client channels: to a prefill node, or to a decode node."""

from __future__ import annotations

import grpc

from fluxion_core.config import ClientSettings
from fluxion_core.wire.frame_limits import MAX_FRAME_PAYLOAD_BYTES, PREFIX_BYTES

KEEPALIVE_MS = 20_000
"""An idle connection is probed this often, so that a peer that vanished is noticed."""

KEEPALIVE_TIMEOUT_MS = 10_000

_OPTIONS: tuple[tuple[str, int | str], ...] = (
    # The largest message on any of our methods is a KV frame.
    ("grpc.max_receive_message_length", MAX_FRAME_PAYLOAD_BYTES + PREFIX_BYTES),
    ("grpc.keepalive_time_ms", KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
    # Retrying is ours to decide: a hand-off is retried on another node, not on the same one.
    ("grpc.enable_retries", 0),
    # A node that comes back is found within a second, not within two minutes.
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    # Frames are 1 MiB: reading the socket in larger pieces moves 1.3 GB/s instead of 1.0 (FACTS).
    ("grpc.experimental.tcp_read_chunk_size", 1 << 20),
    ("grpc.experimental.tcp_max_read_chunk_size", 4 << 20),
)


def open_channel(
    address: str, settings: ClientSettings, *, server_name: str | None = None
) -> grpc.aio.Channel:
    """A channel to `address` (host:port); connects when first used. Close it.

    Args:
        address: host:port.
        settings: how to call.
        server_name: whose certificate is expected there, if `address` is what a name resolved to.

    Raises:
        OSError: a TLS file or the token file cannot be read.
    """
    interceptors = []
    if settings.bearer_token_file is not None:
        interceptors.append(_BearerToken(settings.bearer_token_file.read_text().strip()))
    options = _OPTIONS
    if server_name is not None:
        options += (
            ("grpc.default_authority", server_name),
            ("grpc.ssl_target_name_override", server_name),
        )
    if settings.tls_authority is None:
        return grpc.aio.insecure_channel(address, options=options, interceptors=interceptors)
    credentials = grpc.ssl_channel_credentials(
        settings.tls_authority.read_bytes(),
        settings.tls_key.read_bytes() if settings.tls_key else None,
        settings.tls_certificate.read_bytes() if settings.tls_certificate else None,
    )
    return grpc.aio.secure_channel(address, credentials, options=options, interceptors=interceptors)


class _BearerToken(
    grpc.aio.UnaryUnaryClientInterceptor,  # type: ignore[misc]
    grpc.aio.UnaryStreamClientInterceptor,  # type: ignore[misc]
):
    """Adds `authorization: Bearer …` to every call."""

    def __init__(self, token: str) -> None:
        self._entry = ("authorization", f"Bearer {token}")

    async def intercept_unary_unary(self, continuation, details, request):  # type: ignore[no-untyped-def]
        return await continuation(self._with_token(details), request)

    async def intercept_unary_stream(self, continuation, details, request):  # type: ignore[no-untyped-def]
        return await continuation(self._with_token(details), request)

    def _with_token(self, details: grpc.aio.ClientCallDetails) -> grpc.aio.ClientCallDetails:
        return details._replace(metadata=[*(details.metadata or ()), self._entry])
