"""One hand-off from one prefill node: the messages of its call, and what comes beside them.

Either may end first: the TRAILER counts what was sent, the landing says that it is there, and both
are needed. What is wrong with either ends both. Whoever made the stream closes it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import grpc

from fluxion_core.config.carriers import Carrier
from fluxion_core.errors import FluxionError, PeerUnavailableError, StreamTruncatedError
from fluxion_core.kvstore.sequence import SequenceKv
from fluxion_core.kvstream.assembler import HandoffAssembler
from fluxion_core.kvstream.handoff import FrameKind, KvLayout, Trailer
from fluxion_core.observe.spans import Span
from fluxion_core.observe.trace import TraceRecorder
from fluxion_core.wire import codec
from services.decode.data_plane import NOTHING_LANDED, DataPlane, IncomingKv
from services.decode.kv_connections import place_of

REASON_SECONDS = 0.5
"""For a node whose connections have ended to say on the call why."""


class HandoffStream:
    """A call to a prefill node that brings a sequence's KV.

    Args:
        call: Prefill, just made.
        sequence: takes the KV; restarted.
        layout: what this node serves.
        plane: takes what comes beside the call.
        node: host:port of the prefill node.
        trace: takes a span for each frame, and for what came beside the call since the last one.
        track: of the call's spans; what comes beside it has another one.
    """

    def __init__(
        self,
        call: grpc.aio.UnaryStreamCall,
        sequence: SequenceKv,
        layout: KvLayout,
        *,
        plane: DataPlane,
        node: str,
        trace: TraceRecorder,
        track: str,
    ) -> None:
        self._call, self._sequence = call, sequence
        self._plane, self._node = plane, node
        self._trace, self._track = trace, track
        self._assembler = HandoffAssembler(
            sequence,
            layout,
            num_tokens=sequence.num_prompt_tokens,
            kv_from_token=sequence.kv_from_token,
        )
        self._incoming: IncomingKv | None = None
        self._heard: Callable[[], None] = lambda: None
        self._giving_up: asyncio.TimerHandle | None = None
        self._seen, self._seen_ns = NOTHING_LANDED, 0
        """When something came last, and all that had come by then."""
        self.has_heard = False
        """Whether the node has said anything."""
        self.kv_began_at: float | None = None
        """When KV came first, on the performance counter."""

    @property
    def way(self) -> Carrier:
        """The way that KV comes, once the node has said so."""
        endpoint = self._assembler.endpoint
        return Carrier.GRPC if endpoint is None else endpoint.way

    @property
    def num_connections(self) -> int:
        """Connections beside the call."""
        endpoint = self._assembler.endpoint
        return 0 if endpoint is None else endpoint.connections

    @property
    def advice(self) -> str:
        """Advice on connections that were made and bring nothing; empty where nothing between the
        nodes can stop them."""
        endpoint = self._assembler.endpoint
        if endpoint is None or endpoint.way is not Carrier.SOCKETS:
            return ""
        return (
            f"; does something between the nodes drop packets of connections to "
            f"{place_of(endpoint, self._node)} (a firewall, a path for smaller packets)? Mend "
            f'that, or set handoff.ways = ["grpc"]'
        )

    @property
    def payload_bytes(self) -> int:
        """Payload of all frames, once the stream has been read."""
        return self._assembler.payload_bytes

    @property
    def tokens_taken(self) -> int:
        """Tokens whose KV is there, from the prompt's first; a layer counts for its share."""
        taken = self._assembler.tokens_taken
        if self._incoming is None:
            return taken
        return max(taken, self._incoming.state.tokens_taken)

    async def read(self, heard: Callable[[], None], said: Callable[[], None]) -> None:
        """Take in what the call brings, until it has ended.

        Args:
            heard: called at each sign of life, on the call or beside it.
            said: called at each message.

        Raises:
            grpc.aio.AioRpcError: the call's status is not OK.
            HandoffError, LayoutMismatchError: what came is damaged, or is not what was asked for.
            PeerUnavailableError: KV beside the call cannot be had, or is cut off.
        """
        self._heard = heard
        try:
            async for message in self._call:
                heard()
                said()
                self.has_heard = True
                with self._trace.span(self._track, "frame", bytes=len(message)):
                    kind = codec.take_message(self._assembler, message)
                if kind is FrameKind.HEADER:
                    await self._begin()
                elif kind is FrameKind.CHUNK:
                    self._kv_came()
        except asyncio.CancelledError:
            task = asyncio.current_task()
            error = None if self._incoming is None else self._incoming.state.error
            # Else it is this task that is cancelled, or the call by somebody else.
            if error is None or (task is not None and task.cancelling()):
                raise
            raise self._with_advice(error) from None

    async def finish(self, stall_seconds: float) -> Trailer:
        """The last word of a call that has been read, once all KV is there.

        Args:
            stall_seconds: that nothing may come beside the call.

        Raises:
            HandoffError: the stream was not whole, or what came beside it is damaged.
            PeerUnavailableError: see `IncomingKv.whole`.
        """
        if self._incoming is not None and self._assembler.has_trailer:
            try:
                state = await self._incoming.whole(stall_seconds)
            except PeerUnavailableError as error:
                raise self._with_advice(error) from None
            self._sequence.landed()
            self._assembler.take_landing(state.num_chunks, state.payload_bytes)
        return self._assembler.finish()

    def close(self) -> None:
        """End the call, on the other side too, and the connections beside it. Idempotent."""
        self._call.cancel()
        if self._giving_up is not None:
            self._giving_up.cancel()
        if self._incoming is not None:
            self._incoming.close()

    async def _begin(self) -> None:
        """Go by what the HEADER says of the way that KV comes."""
        endpoint = self._assembler.endpoint
        self._plane.check(endpoint)
        if endpoint is None:
            return
        with self._trace.span(self._track, "connect", connections=endpoint.connections):
            self._incoming = await self._plane.fetch(
                endpoint, self._node, self._sequence, self._landing_changed
            )
        self._seen_ns = time.monotonic_ns()

    def _with_advice(self, error: FluxionError) -> FluxionError:
        """An error from beside the call; with advice if it was a connection's."""
        if isinstance(error, PeerUnavailableError):
            return PeerUnavailableError(f"{error}{self.advice}")
        return error

    def _landing_changed(self) -> None:
        assert self._incoming is not None
        state, now_ns = self._incoming.state, time.monotonic_ns()
        if state.received_bytes > self._seen.received_bytes:
            self._heard()
            self._kv_came()
            # By shared memory the payload is not among what is received.
            new_bytes = state.payload_bytes - self._seen.payload_bytes
            track = f"{self._track} kv"
            span = Span(track, self.way.value, self._seen_ns, now_ns, {"bytes": new_bytes})
            self._trace.add(span)
            self._seen, self._seen_ns = state, now_ns
        if state.error is not None and self._giving_up is None:
            # Connections end when a node ends the hand-off; then the call says why.
            is_cut = isinstance(state.error, PeerUnavailableError | StreamTruncatedError)
            seconds = REASON_SECONDS if is_cut else 0.0
            self._giving_up = asyncio.get_running_loop().call_later(seconds, self._call.cancel)

    def _kv_came(self) -> None:
        if self.kv_began_at is None:
            self.kv_began_at = time.perf_counter()
