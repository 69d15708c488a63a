"""A node's gRPC server: health, reflection, TLS, bearer token, and errors as statuses.

A service raises FluxionErrors; this is the edge where they become statuses, and where anything else
is logged once with its traceback and shown to the client as INTERNAL with a request id.
"""

from __future__ import annotations

import hmac
import inspect
import logging
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from typing import Any, NoReturn

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from fluxion_core.config import ServerSettings
from fluxion_core.errors import (
    AuthenticationError,
    ConfigError,
    FluxionError,
    PeerUnavailableError,
)
from fluxion_core.telemetry import event
from fluxion_core.wire.channel import KEEPALIVE_MS, KEEPALIVE_TIMEOUT_MS
from fluxion_core.wire.frame_limits import MAX_FRAME_PAYLOAD_BYTES, PREFIX_BYTES
from fluxion_core.wire.status import status_of

_log = logging.getLogger(__name__)

_HEALTH_SERVICE = "grpc.health.v1.Health"

_Method = Callable[..., Any]
"""A handler as grpc passes it: its types are those of the service it belongs to."""


class NodeServer:
    """A grpc.aio server with the services that every node has.

    Args:
        settings: address, limits, TLS.
        service_name: fully qualified name whose health says "ready"; "" says "live".
        reflected: names of further services in the committed .proto files, for reflection.

    Services are registered on this object as on a gRPC server (`add_…Servicer_to_server(service,
    node_server)`), also after `start`, once what they need is there. Until `set_ready`, and again
    while draining, calls other than health and reflection are refused with UNAVAILABLE.
    """

    def __init__(
        self, settings: ServerSettings, service_name: str, *, reflected: Sequence[str] = ()
    ) -> None:
        self._settings = settings
        self._service_name = service_name
        self._gate = _Gate()
        interceptors: list[grpc.aio.ServerInterceptor] = [self._gate, _ErrorsToStatuses()]
        if settings.bearer_token_file is not None:
            token = settings.bearer_token_file.read_text().strip()
            if not token:
                raise ConfigError(f"server.bearer_token_file {settings.bearer_token_file} is empty")
            interceptors.insert(0, _RequireBearerToken(token))
        self._late = _LateHandlers()
        self._server = grpc.aio.server(
            handlers=(self._late,),
            interceptors=interceptors,
            options=(
                ("grpc.max_receive_message_length", settings.max_request_bytes),
                ("grpc.max_send_message_length", MAX_FRAME_PAYLOAD_BYTES + PREFIX_BYTES),
                # A second node on the same port is a mistake, not a second worker.
                ("grpc.so_reuseport", 0),
                ("grpc.keepalive_time_ms", KEEPALIVE_MS),
                ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
                ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_MS // 2),
            ),
        )
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = {*reflected, _HEALTH_SERVICE, reflection.SERVICE_NAME}
        reflection.enable_server_reflection(sorted(names), self._server)

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """Register handlers; what the generated `add_…_to_server` functions call."""
        self._late.handlers += handlers

    def add_registered_method_handlers(
        self, service_name: str, method_handlers: dict[str, grpc.RpcMethodHandler]
    ) -> None:
        """The same methods again, by name, which a server that has started does not take."""

    async def start(self) -> str:
        """Listen; live but not yet ready. Returns host:port as bound.

        Raises:
            ConfigError: the address cannot be bound, or a TLS file is missing.
        """
        host, _, _ = self._settings.listen.rpartition(":")
        try:
            credentials = self._credentials()
            if credentials is None:
                port = self._server.add_insecure_port(self._settings.listen)
            else:
                port = self._server.add_secure_port(self._settings.listen, credentials)
        except (RuntimeError, OSError) as error:
            raise ConfigError(f"server.listen {self._settings.listen}: {error}") from None
        await self._set(self._service_name, is_serving=False)
        await self._set("", is_serving=True)
        await self._server.start()
        return f"{host}:{port}"

    async def set_ready(self, *, is_ready: bool) -> None:
        """Whether the service takes requests: model loaded, warmed up, not draining."""
        self._gate.is_open = is_ready
        await self._set(self._service_name, is_serving=is_ready)

    async def stop(self, grace_seconds: float) -> None:
        """Take no new calls; running ones have `grace_seconds`, then are cancelled."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_seconds)

    async def _set(self, name: str, *, is_serving: bool) -> None:
        statuses = health_pb2.HealthCheckResponse
        status = statuses.SERVING if is_serving else statuses.NOT_SERVING
        await self._health.set(name, status)

    def _credentials(self) -> grpc.ServerCredentials | None:
        settings = self._settings
        if settings.tls_certificate is None and settings.tls_key is None:
            return None
        if settings.tls_certificate is None or settings.tls_key is None:
            raise ConfigError("server.tls_certificate and server.tls_key go together")
        authority = settings.tls_client_authority
        return grpc.ssl_server_credentials(
            [(settings.tls_key.read_bytes(), settings.tls_certificate.read_bytes())],
            root_certificates=authority.read_bytes() if authority else None,
            require_client_auth=authority is not None,
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


class _Gate(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Refuses calls while the node is not ready."""

    def __init__(self) -> None:
        self.is_open = False

    async def intercept_service(self, continuation, call):  # type: ignore[no-untyped-def]
        handler = await continuation(call)
        if self.is_open or call.method.startswith(("/grpc.health.", "/grpc.reflection.")):
            return handler
        return _refusing(
            handler, PeerUnavailableError("this node is not ready: it is starting or draining")
        )


class _RequireBearerToken(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Refuses calls without the token; health checks need none."""

    def __init__(self, token: str) -> None:
        self._expected = f"Bearer {token}".encode()

    async def intercept_service(self, continuation, call):  # type: ignore[no-untyped-def]
        handler = await continuation(call)
        if handler is None or call.method.startswith(f"/{_HEALTH_SERVICE}/"):
            return handler
        metadata = dict(call.invocation_metadata)
        given = str(metadata.get("authorization", "")).encode()
        if hmac.compare_digest(given, self._expected):
            return handler
        return _refusing(handler, AuthenticationError("missing or wrong bearer token"))


class _ErrorsToStatuses(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Turns what a handler raises into the status that the table says."""

    async def intercept_service(self, continuation, call):  # type: ignore[no-untyped-def]
        handler = await continuation(call)
        if handler is None:
            return None
        if handler.unary_unary is not None:
            return grpc.unary_unary_rpc_method_handler(
                _guard_unary(handler.unary_unary, call.method),
                handler.request_deserializer,
                handler.response_serializer,
            )
        if handler.unary_stream is not None:
            return grpc.unary_stream_rpc_method_handler(
                _guard_stream(handler.unary_stream, call.method),
                handler.request_deserializer,
                handler.response_serializer,
            )
        # Only reflection streams requests; it raises nothing of ours.
        return handler


def _guard_unary(method: _Method, name: str) -> _Method:
    async def guarded(request: object, context: grpc.aio.ServicerContext) -> object:
        try:
            return await method(request, context)
        except Exception as error:
            await _abort(context, error, name, request)

    return guarded


def _guard_stream(method: _Method, name: str) -> _Method:
    async def guarded(request: object, context: grpc.aio.ServicerContext) -> AsyncIterator[object]:
        try:
            responses = method(request, context)
            if inspect.isawaitable(responses):
                # A handler that writes to the context itself, as the health service's Watch does.
                await responses
                return
            async with aclosing(responses):
                async for response in responses:
                    yield response
        except Exception as error:
            await _abort(context, error, name, request)

    return guarded


def _refusing(handler: grpc.RpcMethodHandler | None, error: FluxionError) -> grpc.RpcMethodHandler:
    async def refuse(request: object, context: grpc.aio.ServicerContext) -> object:
        del request
        return await context.abort(status_of(error), str(error))

    if handler is not None and handler.stream_stream is not None:
        return grpc.stream_stream_rpc_method_handler(refuse)
    return grpc.unary_unary_rpc_method_handler(refuse)


async def _abort(
    context: grpc.aio.ServicerContext, error: Exception, method: str, request: object
) -> NoReturn:
    """End the call with the error's status; never returns."""
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if isinstance(error, FluxionError):
        status = status_of(error)
        if status is not grpc.StatusCode.INTERNAL:
            await context.abort(status, str(error))
    request_id = getattr(request, "request_id", "") or uuid.uuid4().hex
    _log.error(event("call failed", method=method, request_id=request_id), exc_info=error)
    await context.abort(grpc.StatusCode.INTERNAL, f"internal error; request id {request_id}")
    raise AssertionError("abort returned")
