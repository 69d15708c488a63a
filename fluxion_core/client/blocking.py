"""The blocking client; its streams are in streams.py.

gRPC's own blocking calls, not an event loop on a thread: they are made to be used from several
threads, and work where a loop runs already, in a notebook for example.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Self, TypeVar

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fluxion_core.client.answers import (
    Generation,
    ModelInfo,
    NodeLoad,
    model_info_of,
    node_load_of,
)
from fluxion_core.client.connection import check_target, connect_blocking
from fluxion_core.client.options import (
    ChatMessage,
    GenerationOptions,
    Prompt,
    build_request,
    build_tokenize_request,
)
from fluxion_core.client.retry import Attempts, RetryPolicy, client_error
from fluxion_core.client.stream_state import CALL_SECONDS, StreamState
from fluxion_core.client.streams import GenerationStream
from fluxion_core.config.addresses import DEFAULT_DECODE_ADDRESS
from fluxion_core.config.settings import ClientSettings
from fluxion_core.errors import InvalidRequestError
from fluxion_core.wire.status import RemoteError
from fluxion_proto.v1 import generate_pb2, generate_pb2_grpc

AnswerT = TypeVar("AnswerT")


class Client:
    """A client of one decode node. For any number of threads; connects with its first call.

    Args:
        address: HOST:PORT.
        settings: time to connect, TLS, and the file of a token; their defaults if None.
        retry: when a call that failed is made again.

    Any call raises a FluxionError: what the node refused or failed with, PeerUnavailableError
    where it cannot be reached, AuthenticationError where it does not know us or we do not know it.

    Raises:
        ConfigError: the address is malformed, or a file named in `settings` cannot be used.
    """

    def __init__(
        self,
        address: str = DEFAULT_DECODE_ADDRESS,
        settings: ClientSettings | None = None,
        *,
        retry: RetryPolicy | None = None,
    ) -> None:
        self._settings = settings or ClientSettings()
        self._peer = check_target(address, self._settings)
        self._retry = retry or RetryPolicy()
        self._connecting = threading.Lock()
        self._channel: grpc.Channel | None = None
        self._is_closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Cancel what is running, in any thread, and hang up; no call can be made afterwards."""
        with self._connecting:
            self._is_closed = True
            if self._channel is not None:
                self._channel.close()
                self._channel = None

    def stream(
        self,
        prompt: Prompt,
        options: GenerationOptions | None = None,
        *,
        on_finish: Callable[[Generation], None] | None = None,
    ) -> GenerationStream:
        """An answer as it is made. The request is sent when the first event is asked for.

        Args:
            prompt: a text as it stands, token ids, or messages for the model's chat template.
            options: how it is answered.
            on_finish: told the whole once Finish has come.

        Raises:
            InvalidRequestError: the prompt is empty, or a value cannot be sent.
        """
        options = options or GenerationOptions()
        request = build_request(prompt, options)

        def start(
            seconds_left: Callable[[], float | None],
        ) -> Iterator[generate_pb2.GenerateResponse]:
            stub = generate_pb2_grpc.GenerationStub(self._connected())
            call: Iterator[generate_pb2.GenerateResponse] = stub.Generate(
                request, timeout=seconds_left()
            )
            return call

        return GenerationStream(
            start, StreamState(lambda: Attempts(self._retry, options.deadline_seconds), on_finish)
        )

    def generate(self, prompt: Prompt, options: GenerationOptions | None = None) -> Generation:
        """A whole answer; see `stream`.

        Raises:
            FluxionError: see the class.
        """
        return self.stream(prompt, options).result()

    def tokenize(
        self, prompt: str | Sequence[ChatMessage], *, deadline_seconds: float = CALL_SECONDS
    ) -> tuple[int, ...]:
        """Token ids of a prompt as the node would see it.

        Raises:
            FluxionError: see the class.
        """
        request = build_tokenize_request(prompt)
        answer: generate_pb2.TokenizeResponse = self._call(
            lambda channel, seconds: generate_pb2_grpc.GenerationStub(channel).Tokenize(
                request, timeout=seconds
            ),
            deadline_seconds,
        )
        return tuple(answer.token_ids)

    def model_info(self, *, deadline_seconds: float = CALL_SECONDS) -> ModelInfo:
        """Model and settings of the node.

        Raises:
            FluxionError: see the class.
        """
        answer: generate_pb2.GetModelInfoResponse = self._call(
            lambda channel, seconds: generate_pb2_grpc.GenerationStub(channel).GetModelInfo(
                generate_pb2.GetModelInfoRequest(), timeout=seconds
            ),
            deadline_seconds,
        )
        return model_info_of(answer)

    def load(self, *, deadline_seconds: float = CALL_SECONDS) -> NodeLoad:
        """Requests and host memory of the node, now.

        Raises:
            FluxionError: see the class.
        """
        answer: generate_pb2.GetLoadResponse = self._call(
            lambda channel, seconds: generate_pb2_grpc.GenerationStub(channel).GetLoad(
                generate_pb2.GetLoadRequest(), timeout=seconds
            ),
            deadline_seconds,
        )
        return node_load_of(answer)

    def health(
        self, service: str = "fluxion.v1.Generation", *, deadline_seconds: float = CALL_SECONDS
    ) -> str | None:
        """Ask once for a service's health; "" is the node itself.

        Returns:
            SERVING or NOT_SERVING; None if the node does not know the service.

        Raises:
            FluxionError: see the class.
        """
        request = health_pb2.HealthCheckRequest(service=service)
        try:
            answer: health_pb2.HealthCheckResponse = self._call(
                lambda channel, seconds: health_pb2_grpc.HealthStub(channel).Check(
                    request, timeout=seconds
                ),
                deadline_seconds,
            )
        except RemoteError as error:
            if error.status is grpc.StatusCode.NOT_FOUND:
                return None
            raise
        name: str = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
        return name

    def _call(
        self, call: Callable[[grpc.Channel, float | None], AnswerT], deadline_seconds: float
    ) -> AnswerT:
        channel = self._connected()
        attempts = Attempts(self._retry, deadline_seconds)
        while True:
            try:
                return call(channel, attempts.seconds_left())
            except grpc.RpcError as error:
                failure = client_error(error)
            time.sleep(attempts.delay_after(failure))
            channel = self._connected()

    def _connected(self) -> grpc.Channel:
        with self._connecting:
            if self._is_closed:
                raise InvalidRequestError("this client was closed; make another")
            if self._channel is None:
                self._channel = connect_blocking(self._peer, self._settings)
            return self._channel
