"""A guard between a connection and a service: who calls, whether the node is ready, how much
the client may ask for, and errors as statuses.

A call is refused before its message is read: a peer that may not call makes the node hold nothing.
Nobody is waited for without end: messages have their time to arrive, and answers to be taken.
Services raise FluxionErrors; here they become statuses, and anything else is logged once with its
traceback and shown to the client as INTERNAL with a request id.
"""

from __future__ import annotations

import asyncio
import logging
import time
import traceback
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import grpc
from google.protobuf.message import DecodeError

from fluxion_core.errors import (
    AuthenticationError,
    CapacityError,
    DeadlineError,
    FluxionError,
    InvalidRequestError,
    PeerUnavailableError,
    UnreadAnswerError,
)
from fluxion_core.machine.threads import thread_limit
from fluxion_core.observe.log import event
from fluxion_core.wire.callers import Callers
from fluxion_core.wire.client_limits import ClientLimits
from fluxion_core.wire.status import PUSHBACK_KEY, sent_details, sent_metadata, status_of

_log = logging.getLogger(__name__)

HEALTH_SERVICE = "grpc.health.v1.Health"
_REFLECTION_PREFIX = "/grpc.reflection."

_NOT_READY = "this node is not ready: it is starting or draining"

SMALL_MESSAGE_BYTES = 64 << 10
"""Who may have such a message kept after its call."""

_Reader = Callable[[bytes], object]

_REFUSAL_LOG_SECONDS = 1.0
"""Refused callers get one line in so much time: whoever knocks must not fill the log."""


class CallGuard(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Wraps every handler but those of the health service, which anybody may ask.

    Handlers take their messages as a stream here, of which there is one, so that the caller is
    known before it is read; and they write their answers as one, so that who does not take them
    is noticed.

    Args:
        callers: tells who calls.
        limits: what one client may ask for.
        request_seconds: that a message may take to arrive.
        unread_seconds: that a message of an answer may wait to be taken.
    """

    def __init__(
        self,
        callers: Callers,
        limits: ClientLimits,
        *,
        request_seconds: float,
        unread_seconds: float,
    ) -> None:
        self._callers = callers
        self._limits = limits
        self._request_seconds = request_seconds
        self._unread_seconds = unread_seconds
        self.unread_calls = 0
        """Calls ended because their client did not take the answer."""
        self._refusals_unlogged = 0
        self._refusal_logged_at = -_REFUSAL_LOG_SECONDS
        self.is_open = False
        """Whether the node takes calls other than reflection."""

    async def intercept_service(self, continuation, call):  # type: ignore[no-untyped-def]
        """The handler of a call, guarded."""
        handler = await continuation(call)
        if call.method.startswith(f"/{HEALTH_SERVICE}/"):
            return handler
        if handler is None:
            # What will be registered once the model is loaded is not unknown, only not there yet.
            return None if self.is_open else self._not_ready(call.method)
        return self._guarded(handler, call.method)

    @contextmanager
    def _entered(self, context: grpc.aio.ServicerContext, method: str) -> Iterator[None]:
        """Count the call of a caller that may call, while the block lasts."""
        try:
            client = self._callers.client_of(context)
        except AuthenticationError as error:
            self._log_refusal(context.peer(), method, error)
            raise
        if not self.is_open and not method.startswith(_REFLECTION_PREFIX):
            raise PeerUnavailableError(_NOT_READY)
        with self._limits.call(client):
            yield

    def _log_refusal(self, peer: str, method: str, error: AuthenticationError) -> None:
        now = time.monotonic()
        self._refusals_unlogged += 1
        if now - self._refusal_logged_at >= _REFUSAL_LOG_SECONDS:
            refused = event(
                "caller refused",
                peer=peer,
                method=method,
                reason=error,
                refusals=self._refusals_unlogged,
            )
            _log.warning(refused)
            self._refusals_unlogged, self._refusal_logged_at = 0, now

    def _not_ready(self, name: str) -> grpc.RpcMethodHandler:
        async def refuse(requests: object, context: grpc.aio.ServicerContext) -> NoReturn:
            del requests
            try:
                with self._entered(context, name):
                    raise PeerUnavailableError(_NOT_READY)
            except Exception as error:
                await _abort(context, error, _Call(name))

        return grpc.stream_unary_rpc_method_handler(refuse)

    def _guarded(self, handler: Any, name: str) -> grpc.RpcMethodHandler:
        async def guarded(requests: AsyncIterator[Any], context: grpc.aio.ServicerContext) -> None:
            call = _Call(name)
            try:
                with self._entered(context, name):
                    try:
                        await self._serve(handler, requests, context, call)
                    except UnreadAnswerError as error:
                        self._note_unread(context, name)
                        # Sent behind what is not taken: the call is its client's until then.
                        await _abort(context, error, call)
            except Exception as error:
                await _abort(context, error, call)

        # Of a call with one message it is read by `_only`, of any other by grpc.
        read = None if handler.stream_stream is None else handler.request_deserializer
        return grpc.stream_stream_rpc_method_handler(guarded, read, handler.response_serializer)

    async def _serve(
        self,
        handler: Any,
        requests: AsyncIterator[Any],
        context: grpc.aio.ServicerContext,
        call: _Call,
    ) -> None:
        """From the message to the last of the answer."""
        if handler.stream_stream is not None:
            responses = handler.stream_stream(self._in_time(requests), context)
        else:
            message = await self._only(requests, handler.request_deserializer)
            call.request_id = getattr(message, "request_id", "")
            if handler.unary_unary is not None:
                await self._write(await handler.unary_unary(message, context), context)
                return
            responses = handler.unary_stream(message, context)
        await self._write_all(responses, context)

    async def _write_all(
        self, responses: AsyncGenerator[object, None], context: grpc.aio.ServicerContext
    ) -> None:
        """Send what a service yields; whoever does not take it ends the service's work."""
        async with aclosing(responses):
            async for response in responses:
                try:
                    await self._write(response, context)
                except UnreadAnswerError as error:
                    await responses.athrow(error)

    async def _write(self, response: object, context: grpc.aio.ServicerContext) -> None:
        """Send a message, as far as the client's flow control lets it go.

        Raises:
            UnreadAnswerError: the client does not take it.
            CancelledError: the client is gone.
        """
        try:
            async with asyncio.timeout(self._unread_seconds):
                await context.write(response)
        except TimeoutError:
            raise UnreadAnswerError(
                f"the client took nothing of the answer for {self._unread_seconds:g} s "
                f"(server.unread_seconds)"
            ) from None
        except grpc.aio.InternalError:
            raise asyncio.CancelledError from None

    def _note_unread(self, context: grpc.aio.ServicerContext, method: str) -> None:
        self.unread_calls += 1
        client = self._callers.client_of(context)
        _log.warning(
            event(
                "answer not taken",
                method=method,
                client=client,
                unread_seconds=self._unread_seconds,
            )
        )

    async def _only(self, requests: AsyncIterator[bytes], read: _Reader | None) -> object:
        """The one message of a call.

        Raises:
            InvalidRequestError: there is none, or it is not what the method takes.
            DeadlineError: it does not come.
        """
        try:
            raw = await self._next(requests)
        except StopAsyncIteration:
            raise InvalidRequestError("the call has no message") from None
        if len(raw) > SMALL_MESSAGE_BYTES:
            # grpc keeps the last message of some calls that are over, unless it has seen the end.
            await self._see_the_end(requests)
        try:
            return raw if read is None else read(raw)
        except DecodeError as error:
            raise InvalidRequestError(f"the message cannot be read: {error}") from None

    async def _see_the_end(self, requests: AsyncIterator[bytes]) -> None:
        try:
            await self._next(requests)
        except StopAsyncIteration:
            return
        raise InvalidRequestError("the call has a second message")

    async def _in_time(self, requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
        """The messages of a call, each of which has its time to arrive.

        Raises:
            DeadlineError: one does not come.
        """
        while True:
            try:
                message = await self._next(requests)
            except StopAsyncIteration:
                return
            yield message

    async def _next(self, requests: AsyncIterator[Any]) -> Any:
        try:
            async with asyncio.timeout(self._request_seconds):
                return await anext(requests)
        except TimeoutError:
            raise DeadlineError(
                f"the call's message did not come within {self._request_seconds:g} s "
                f"(server.request_seconds)"
            ) from None


@dataclass
class _Call:
    """What is known of a call when it fails."""

    method: str
    request_id: str = ""
    """The client's."""


async def _abort(context: grpc.aio.ServicerContext, error: Exception, call: _Call) -> NoReturn:
    """End the call with the error's status; never returns."""
    if isinstance(error, grpc.aio.AbortError):
        raise error
    error = thread_limit(error) or error
    status = status_of(error) if isinstance(error, FluxionError) else grpc.StatusCode.INTERNAL
    details = str(error)
    if status is grpc.StatusCode.INTERNAL:
        request_id = _printable(call.request_id)
        _log.error(event("call failed", method=call.method, request_id=request_id), exc_info=error)
        details = f"internal error; request id {request_id}"
    # Its frames hold the message, of up to 16 MiB, and grpc holds the call until the collector of
    # cycles comes by.
    traceback.clear_frames(error.__traceback__)
    try:
        await context.abort(status, sent_details(details), _trailing_metadata(error))
    except grpc.aio.InternalError:
        # Nobody is there any more.
        raise asyncio.CancelledError from None
    raise AssertionError("abort returned")


def _trailing_metadata(error: Exception) -> tuple[tuple[str, str], ...]:
    sent = sent_metadata(error)
    seconds = error.retry_after_seconds if isinstance(error, CapacityError) else None
    return (sent,) if seconds is None else (sent, (PUSHBACK_KEY, str(round(seconds * 1000))))


def _printable(request_id: str) -> str:
    """The client's, if it can be printed as it is, else a new one."""
    is_printable = 0 < len(request_id) <= 128 and request_id.isprintable()
    return request_id if is_printable else uuid.uuid4().hex
