"""The prefill node's gRPC side: requests in, frames out as they are computed.

`/fluxion.v1.Handoff/Prefill` is a raw method: its request is a HandoffRequest, its responses are
the frames of protos/README.md, with the CHUNKs among them or beside the call (data_plane.py). A
request's stream is its life: when it ends, so do the prompt and whatever its KV leaves on.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing

import grpc
from google.protobuf.message import DecodeError

from fluxion_core.config.carriers import Carrier
from fluxion_core.errors import ContextLengthError, FluxionError, InvalidRequestError
from fluxion_core.geometry import BLOCK_TOKENS
from fluxion_core.kvstream.handoff import Header, KvLayout
from fluxion_core.observe.log import event
from fluxion_core.wire import codec
from fluxion_core.wire.callers import Callers
from fluxion_proto.v1 import handoff_pb2, handoff_pb2_grpc
from services.metrics import outcome_of
from services.prefill.data_plane import DataPlane
from services.prefill.departures import CallDeparture, Departure, PlaneDeparture
from services.prefill.engine import PrefillEngine
from services.prefill.metrics import PromptCounters
from services.prefill.prompt import Prompt

_log = logging.getLogger(__name__)

HANDOFF_SERVICE = "fluxion.v1.Handoff"
PREFILL_NODE_SERVICE = "fluxion.v1.PrefillNode"
MAX_REQUEST_ID_CHARACTERS = 128


class HandoffService:
    """Streams KV to decode nodes.

    Args:
        engine: computes prompts.
        plane: what KV leaves on beside its call.
        layout: what this node serves.
        vocab_size: ids are below it.
        context_tokens: the model's context.
        counters: count how hand-offs end.
        callers: names the decode node that asks, for the log.
    """

    def __init__(
        self,
        engine: PrefillEngine,
        plane: DataPlane,
        layout: KvLayout,
        *,
        vocab_size: int,
        context_tokens: int,
        counters: PromptCounters,
        callers: Callers,
    ) -> None:
        self._counters = counters
        self._callers = callers
        self._engine = engine
        self._plane = plane
        self._layout = layout
        self._vocab_size = vocab_size
        self._context_tokens = context_tokens

    async def prefill(
        self, message: bytes, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[bytes]:
        """One hand-off: HEADER, CHUNKs as they are computed, TRAILER.

        Raises:
            InvalidRequestError: the request is malformed or cannot be computed.
            LayoutMismatchError: the decode node expects another model or layout.
            NoCommonWayError: the decode node can take KV in no way that this node has.
            CapacityError: too many prompts wait.
            PeerUnavailableError: a connection for KV broke.
            UnreadAnswerError: the decode node takes no KV.
        """
        client = self._callers.client_of(context)
        prompt, departure = self._submit(message, client)
        endpoint = departure.endpoint if isinstance(departure, PlaneDeparture) else None
        header = Header(self._layout, len(prompt.token_ids), prompt.kv_from_token, endpoint)
        outcome = ""
        try:
            yield codec.encode_frame(codec.header_frame(header))
            async with aclosing(departure.call_frames()) as frames:
                async for frame in frames:
                    yield codec.encode_frame(frame)
            outcome = "finished"
            self._counters.prompt_ended(None, prompt)
        except BaseException as error:
            outcome = outcome_of(error)[1]
            self._counters.prompt_ended(error, prompt)
            raise
        finally:
            self._engine.cancel(prompt)
            self._end(departure)
            self._counters.kv_left(header.way, departure.taken_bytes)
            _log.info(
                event(
                    "prompt",
                    request_id=prompt.request_id,
                    client=client,
                    outcome=outcome,
                    way=header.way,
                    tokens=len(prompt.token_ids),
                    kv_from_token=prompt.kv_from_token,
                    queue_seconds=prompt.queue_seconds,
                    prefill_seconds=prompt.prefill_seconds,
                    profile_seconds=prompt.profile_seconds,
                    payload_bytes=prompt.payload_bytes,
                )
            )

    def generic_handler(self) -> grpc.GenericRpcHandler:
        """The raw method, for registration: bytes in, bytes out."""
        return grpc.method_handlers_generic_handler(
            HANDOFF_SERVICE, {"Prefill": grpc.unary_stream_rpc_method_handler(self.prefill)}
        )

    def _submit(self, message: bytes, client: str) -> tuple[Prompt, Departure]:
        """Check a request and queue its prompt; a refusal is logged."""
        request = handoff_pb2.HandoffRequest()
        departure: Departure | None = None
        try:
            self._parse_into(request, message)
            departure = self._departure_for(request)
            prompt = Prompt(
                request_id=request.request_id,
                token_ids=list(request.token_ids),
                kv_from_token=request.kv_from_token,
                sampling=codec.sampling_from_proto(request.sampling),
                on_frame=departure.put,
                on_end=departure.end,
                outgoing_bytes=departure.outgoing_bytes,
                profile_window=codec.profile_window_from_proto(request),
            )
            self._engine.submit(prompt)
        except FluxionError as error:
            if departure is not None:
                self._end(departure)
            shown = request.request_id[:MAX_REQUEST_ID_CHARACTERS]
            request_id = shown if shown.isprintable() else ""
            self._counters.prompt_ended(error, None)
            outcome = outcome_of(error)[1]
            refused = event(
                "prompt", request_id=request_id, client=client, outcome=outcome, reason=error
            )
            _log.info(refused)
            raise
        return prompt, departure

    def _departure_for(self, request: handoff_pb2.HandoffRequest) -> Departure:
        """The way out for a request's KV, of those that it names."""
        way = self._plane.choose(codec.ways_from_proto(request), request.machine)
        if way is Carrier.GRPC:
            return CallDeparture(asyncio.get_running_loop(), self._engine.wake)
        if not request.max_connections:
            raise InvalidRequestError(
                f"max_connections is 0; need 1 to {codec.MAX_CONNECTIONS} for KV by {way}"
            )
        return self._plane.depart(
            way,
            # A layer has one connection: more than layers would carry nothing.
            max_connections=min(request.max_connections, self._layout.num_layers),
            on_taken=self._engine.wake,
        )

    def _end(self, departure: Departure) -> None:
        if isinstance(departure, PlaneDeparture):
            self._plane.end(departure)
        else:
            departure.close()

    def _parse_into(self, request: handoff_pb2.HandoffRequest, message: bytes) -> None:
        try:
            request.ParseFromString(message)
        except DecodeError as error:
            raise InvalidRequestError(f"not a HandoffRequest: {error}") from None
        # It goes into log lines as it is.
        request_id = request.request_id
        if len(request_id) > MAX_REQUEST_ID_CHARACTERS or not request_id.isprintable():
            raise InvalidRequestError(
                f"request_id must be printable and at most {MAX_REQUEST_ID_CHARACTERS} characters"
            )
        self._layout.check_compatible(codec.layout_from_proto(request.layout))
        self._check_tokens(request.token_ids, request.kv_from_token)

    def _check_tokens(self, token_ids: Sequence[int], kv_from_token: int) -> None:
        count = len(token_ids)
        if not count:
            raise InvalidRequestError("prompt is empty; send at least one token id")
        if count > self._context_tokens:
            raise ContextLengthError(
                prompt_tokens=count, max_new_tokens=0, context_tokens=self._context_tokens
            )
        if (highest := max(token_ids)) >= self._vocab_size:
            raise InvalidRequestError(
                f"token id {highest} is not in the vocabulary of {self._vocab_size}"
            )
        if kv_from_token % BLOCK_TOKENS or kv_from_token >= count:
            raise InvalidRequestError(
                f"kv_from_token is {kv_from_token}; need a multiple of {BLOCK_TOKENS} below the "
                f"prompt's {count} tokens"
            )


class PrefillNodeService(handoff_pb2_grpc.PrefillNodeServicer):
    """Tells decode nodes how busy this node is."""

    def __init__(self, engine: PrefillEngine, layout: KvLayout) -> None:
        self._engine = engine
        self._layout = layout
        self.is_draining = False

    async def GetPrefillLoad(  # noqa: N802 - the rpc's name
        self, request: handoff_pb2.GetPrefillLoadRequest, context: grpc.aio.ServicerContext
    ) -> handoff_pb2.GetPrefillLoadResponse:
        """Prompts and tokens still to be computed, and what a prompt would wait for."""
        del context
        load = self._engine.load()
        wait = self._engine.wait(request.prompt_tokens) if request.prompt_tokens else None
        return handoff_pb2.GetPrefillLoadResponse(
            tokens_before=None if wait is None else wait.tokens,
            seconds_before=None if wait is None else wait.seconds,
            running_prompts=load.running_prompts,
            waiting_prompts=load.waiting_prompts,
            pending_tokens=load.pending_tokens,
            layout=codec.layout_to_proto(self._layout),
            is_draining=self.is_draining,
        )
