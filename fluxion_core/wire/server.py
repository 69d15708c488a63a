"""A node's gRPC server: health, reflection, TLS, and bounds on connections and messages.

Who may call, and how a service's errors become statuses: call_guard.py.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Sequence
from dataclasses import replace

import grpc
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from fluxion_core.config.addresses import Address, is_loopback
from fluxion_core.config.settings import ServerSettings
from fluxion_core.errors import ConfigError
from fluxion_core.observe.log import event
from fluxion_core.wire.call_guard import HEALTH_SERVICE, CallGuard
from fluxion_core.wire.callers import Callers
from fluxion_core.wire.channel import KEEPALIVE_MS, KEEPALIVE_TIMEOUT_MS
from fluxion_core.wire.client_limits import ClientLimits
from fluxion_core.wire.frame_limits import MAX_FRAME_PAYLOAD_BYTES, PREFIX_BYTES
from fluxion_core.wire.node_health import NodeHealth
from fluxion_core.wire.tls import server_credentials

_log = logging.getLogger(__name__)

HANDSHAKE_MS = 10_000
"""A connection that has not finished its TLS and HTTP/2 handshakes by then is closed."""

IDLE_MS = 30 * 60_000
"""A connection without calls for so long is closed; clients connect again by themselves."""


class NodeServer:
    """A grpc.aio server with the services that every node has.

    Args:
        settings: addresses, limits, TLS, who may call.
        service_name: fully qualified name whose health says "ready"; "" says "live".
        reflected: names of further services in the committed .proto files, for reflection.

    Services are registered on this object as on a gRPC server (`add_…Servicer_to_server(service,
    node_server)`), also after `start`, once what they need is there. Until `set_ready`, and again
    while draining, calls other than health and reflection are refused with UNAVAILABLE.

    Raises:
        ConfigError: a certificate, key or token file cannot be used.
    """

    def __init__(
        self, settings: ServerSettings, service_name: str, *, reflected: Sequence[str] = ()
    ) -> None:
        self._settings = settings
        self._service_name = service_name
        self._credentials = server_credentials(settings.tls)
        self.callers = Callers(settings)
        """Names a call's client."""
        self.limits = ClientLimits(settings.client_limits)
        """What each client has going."""
        self._guard = CallGuard(
            self.callers,
            self.limits,
            request_seconds=settings.request_seconds,
            unread_seconds=settings.unread_seconds,
        )
        self._late = _LateHandlers()
        self._server = grpc.aio.server(
            handlers=(self._late,), interceptors=(self._guard,), options=_options(settings)
        )
        self._health = NodeHealth(unread_seconds=settings.unread_seconds)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = {*reflected, HEALTH_SERVICE, reflection.SERVICE_NAME}
        reflection.enable_server_reflection(sorted(names), self._server)
        self._health_server: grpc.aio.Server | None = None
        if settings.health_listen:
            self._health_server = grpc.aio.server(options=_options(settings))
            health_pb2_grpc.add_HealthServicer_to_server(self._health, self._health_server)

    @property
    def unread_calls(self) -> int:
        """Calls that were ended because their client did not take the answer. From any thread."""
        return self._guard.unread_calls

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """Register handlers; what the generated `add_…_to_server` functions call."""
        self._late.handlers += handlers

    def add_registered_method_handlers(
        self, service_name: str, method_handlers: dict[str, grpc.RpcMethodHandler]
    ) -> None:
        """Ignore the same methods by name, which a server that has started does not take."""

    async def start(self) -> str:
        """Listen; live but not yet ready. Returns host:port as bound.

        Raises:
            ConfigError: an address cannot be bound.
        """
        address = _listen(self._server, self._settings.listen, self._credentials, "server.listen")
        if self._health_server is not None:
            _listen(self._health_server, self._settings.health_listen, None, "server.health_listen")
        self._health.set(self._service_name, is_serving=False)
        self._health.set("", is_serving=True)
        await self._server.start()
        if self._health_server is not None:
            await self._health_server.start()
        self._warn_if_open(address)
        return address

    async def set_ready(self, *, is_ready: bool) -> None:
        """Set whether the service takes requests: model loaded, warmed up, not draining."""
        self._guard.is_open = is_ready
        await self.set_serving(is_serving=is_ready)

    def open(self) -> None:
        """Take calls, whatever health says."""
        self._guard.is_open = True

    async def set_serving(self, *, is_serving: bool) -> None:
        """Set what health says of the service; calls are taken or refused as before."""
        self._health.set(self._service_name, is_serving=is_serving)

    async def stop(self, grace_seconds: float) -> None:
        """Take no new calls; running ones have `grace_seconds`, then are cancelled."""
        self._health.end()
        await self._server.stop(grace_seconds)
        if self._health_server is not None:
            await self._health_server.stop(0)

    def _warn_if_open(self, address: str) -> None:
        settings = self._settings
        is_closed = settings.tls.client_authority or settings.auth.token_file
        if not is_closed and not is_loopback(address):
            _log.warning(
                event("everybody who reaches this address may call", address=address)
                + "; set server.auth.token_file or server.tls.client_authority"
            )


class _LateHandlers(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Handlers that may come after the server has started."""

    def __init__(self) -> None:
        self.handlers: list[grpc.GenericRpcHandler] = []

    def service(
        self, handler_call_details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler | None:
        for handler in self.handlers:
            if (found := handler.service(handler_call_details)) is not None:
                return found
        return None


def _options(settings: ServerSettings) -> tuple[tuple[str, int], ...]:
    """Bounds of each connection; what exceeds them ends the call or the connection."""
    return (
        ("grpc.max_receive_message_length", settings.max_request_bytes),
        ("grpc.max_send_message_length", MAX_FRAME_PAYLOAD_BYTES + PREFIX_BYTES),
        # gRPC refuses a share of the calls between the two at random: there is no between.
        ("grpc.max_metadata_size", settings.max_metadata_bytes),
        ("grpc.absolute_max_metadata_size", settings.max_metadata_bytes),
        ("grpc.max_concurrent_streams", settings.max_streams_per_connection),
        ("grpc.max_allowed_incoming_connections", settings.max_connections),
        ("grpc.server_handshake_timeout_ms", HANDSHAKE_MS),
        ("grpc.max_connection_idle_ms", IDLE_MS),
        # A second node on the same port is a mistake, not a second worker.
        ("grpc.so_reuseport", 0),
        ("grpc.keepalive_time_ms", KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
        # Who pings more often than this, or without a call, is disconnected at the third ping.
        ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_MS // 2),
        ("grpc.http2.max_ping_strikes", 2),
    )


def _listen(
    server: grpc.aio.Server,
    address: str,
    credentials: grpc.ServerCredentials | None,
    setting: str,
) -> str:
    """Bind host:port; returns it as bound.

    Raises:
        ConfigError: it cannot be bound.
    """
    try:
        if credentials is None:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, credentials)
    except (RuntimeError, OSError):
        raise ConfigError(f"{setting} {address}: {_why_not_bound(address)}") from None
    return str(replace(Address.parse(address, may_choose_port=True), port=port))


def _why_not_bound(address: str) -> str:
    """In the system's words, which gRPC keeps to itself."""
    where = Address.parse(address, may_choose_port=True)
    try:
        for family, kind, protocol, _, place in socket.getaddrinfo(
            where.host, where.port, type=socket.SOCK_STREAM
        ):
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(place)
    except OSError as error:
        return error.strerror or str(error)
    return "it cannot be listened on now"
