"""Pull a prompt's KV from a prefill node into the host KV store.

One hand-off stream per attempt (handoff_stream.py). The stream's life is the lease: when it breaks,
nothing is committed. Frames are read one at a time, so that flow control holds the prefill node
back while this node is busy. A node that fails is followed by the next one; what was written is
written again, and nothing is decoded before every layer is whole.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import grpc

from fluxion_core.config.carriers import Carrier
from fluxion_core.errors import (
    AuthenticationError,
    CapacityError,
    DrainingError,
    FluxionError,
    FrameFormatError,
    HandoffError,
    PeerMismatchError,
    PeerUnavailableError,
    RequestCancelledError,
)
from fluxion_core.generation.sampling import SamplingParams
from fluxion_core.geometry import WindowSpec
from fluxion_core.kvstore.sequence import SequenceKv
from fluxion_core.kvstream.handoff import KvLayout, Trailer
from fluxion_core.observe.log import event
from fluxion_core.observe.trace import TraceRecorder
from fluxion_core.planning import prompt_profile
from fluxion_core.planning.prompt_profile import PromptProfile
from fluxion_core.wire import codec
from fluxion_core.wire.status import RemoteCapacityError, RemoteError, error_from_rpc
from fluxion_proto.v1 import handoff_pb2
from services.decode.data_plane import DataPlane
from services.decode.handoff_stream import HandoffStream
from services.decode.prefill_nodes import PrefillNodes
from services.decode.progress import PromptProgress
from services.decode.request_counters import RequestCounters
from services.decode.silence import ended_when_silent

_log = logging.getLogger(__name__)

_METHOD = "/fluxion.v1.Handoff/Prefill"

# What another prefill node may do better; anything else is the request's own fault.
_WORTH_ANOTHER_NODE = (
    HandoffError,
    PeerMismatchError,
    PeerUnavailableError,
    DrainingError,
    CapacityError,
    RemoteError,
)

_SAID_BY_ALL: tuple[type[FluxionError], ...] = (PeerMismatchError, HandoffError)
"""Errors that a client gets as they are where every node failed by them."""


class _UnheardError(PeerUnavailableError):
    """The connection broke before the node said anything: it may have been dead for long."""


@dataclass(frozen=True)
class HandoffResult:
    """A finished hand-off: all that it brought beside the KV, which is now in the store."""

    trailer: Trailer
    seconds: float
    """From the first KV frame to the commit, on this node."""
    payload_bytes: int
    """Of all KV frames."""
    profiles: list[PromptProfile]
    """Of each layer, if they were asked for."""
    way: Carrier
    """What the KV came over."""
    num_connections: int
    """Beside the call."""


@dataclass(frozen=True)
class _Handoff:
    """A prompt that some node is to compute, and the place for its KV."""

    request_id: str
    num_tokens: int
    message: bytes
    """A HandoffRequest: serialized once for all nodes that may be tried."""
    sequence: SequenceKv
    deadline: float | None
    """On the monotonic clock."""
    wants_profile: bool
    progress: PromptProgress | None

    @property
    def seconds_left(self) -> float | None:
        """Until the deadline; None without one."""
        return None if self.deadline is None else max(0.0, self.deadline - time.monotonic())


class KvIngest:
    """Hands prompts to prefill nodes, and takes their KV in.

    Args:
        nodes: the prefill nodes.
        layout: what this node serves.
        vocab_size: first tokens are below it.
        num_heads: query heads of the model, each of which a prompt profile describes.
        stall_seconds: a node that is silent for longer is given up.
        plane: the ways that KV is taken, and what takes it beside the call.
        counters: count what was handed off, and what failed.
        trace: takes a span for each frame, on a track for each stream.
    """

    def __init__(
        self,
        nodes: PrefillNodes,
        layout: KvLayout,
        *,
        vocab_size: int,
        num_heads: int,
        stall_seconds: float,
        plane: DataPlane,
        counters: RequestCounters,
        trace: TraceRecorder | None = None,
    ) -> None:
        self._nodes = nodes
        self._trace = trace or TraceRecorder()
        self._plane = plane
        self._counters = counters
        self._layout = layout
        self._vocab_size = vocab_size
        self._num_heads = num_heads
        self._stall_seconds = stall_seconds

    async def fetch(
        self,
        request_id: str,
        token_ids: Sequence[int],
        sampling: SamplingParams,
        sequence: SequenceKv,
        *,
        deadline_seconds: float | None,
        profile_window: WindowSpec | None = None,
        progress: PromptProgress | None = None,
    ) -> HandoffResult:
        """Have a prompt computed and stored; commits the sequence.

        Prefill nodes are tried once each, the least busy first; one whose connection broke before
        anything came is tried again after the others, over a new one. The call runs until it is
        cancelled or the deadline passes, whichever comes first.

        Args:
            request_id: for both nodes' logs.
            token_ids: the prompt.
            sampling: for the first token.
            sequence: the reservation that takes the KV; committed on return.
            deadline_seconds: time left, or None.
            profile_window: this node's default window, if a profile of the prompt is wanted.
            progress: follows the hand-off.

        Raises:
            PeerUnavailableError: no prefill node is configured, or none could do it; the text
                says what each answered.
            PeerMismatchError: every prefill node serves another model or layout, or has no way for
                KV that this node has; the text says what each answered.
            HandoffError: what came was damaged, from every prefill node.
            InvalidRequestError: the prefill node finds the request wrong.
            DeadlineError: the deadline passed.
        """
        if not self._nodes:
            raise PeerUnavailableError(
                "no prefill node is configured, and this node may not compute the prompt itself; "
                "start it with --prefill-addresses HOST:PORT, or without "
                "engine.local_prefill_tokens"
            )
        handoff = _Handoff(
            request_id,
            len(token_ids),
            self._request_message(request_id, token_ids, sampling, sequence, profile_window),
            sequence,
            None if deadline_seconds is None else time.monotonic() + deadline_seconds,
            profile_window is not None,
            progress,
        )
        return await self._from_some_node(handoff)

    async def _from_some_node(self, handoff: _Handoff) -> HandoffResult:
        failures: dict[str, FluxionError] = {}
        addresses = deque(await self._nodes.by_load(handoff.num_tokens))
        while addresses:
            address = addresses.popleft()
            try:
                async with self._nodes.channel(address) as channel:
                    with self._nodes.sending(address, handoff.num_tokens) as said:
                        result = await self._attempt(handoff, address, channel, said)
            except _WORTH_ANOTHER_NODE as error:
                if isinstance(error, _UnheardError) and address not in failures:
                    await self._nodes.renew(address)
                    addresses.append(address)
                failures[address] = error
                self._failed(handoff.request_id, address, error)
            else:
                self._handed_off(handoff.request_id, address, result)
                return result
        raise self._no_node(failures)

    def _request_message(
        self,
        request_id: str,
        token_ids: Sequence[int],
        sampling: SamplingParams,
        sequence: SequenceKv,
        profile_window: WindowSpec | None,
    ) -> bytes:
        message = handoff_pb2.HandoffRequest(
            request_id=request_id,
            token_ids=token_ids,
            sampling=codec.sampling_to_proto(sampling),
            layout=codec.layout_to_proto(self._layout),
            kv_from_token=sequence.kv_from_token,
            want_prompt_profile=profile_window is not None,
            sink_tokens=profile_window.sink_tokens if profile_window else 0,
            recent_tokens=profile_window.recent_tokens if profile_window else 0,
        )
        self._plane.add_ways(message)
        serialized: bytes = message.SerializeToString()
        return serialized

    def _handed_off(self, request_id: str, address: str, result: HandoffResult) -> None:
        """Count and log a hand-off that was committed."""
        self._counters.handed_off(
            address, result.way, num_bytes=result.payload_bytes, seconds=result.seconds
        )
        _log.info(
            event(
                "hand-off",
                request_id=request_id,
                node=address,
                way=result.way.value,
                connections=result.num_connections,
                payload_bytes=result.payload_bytes,
                seconds=result.seconds,
            )
        )

    def _failed(self, request_id: str, address: str, error: FluxionError) -> None:
        """Count and log an attempt that came to nothing."""
        self._counters.handoff_failed(error)
        _log.warning(
            event("hand-off failed", request_id=request_id, node=address, error=str(error))
        )

    def _no_node(self, failures: Mapping[str, FluxionError]) -> FluxionError:
        """The error of a prompt that no node has computed, from what each answered."""
        if len(failures) == 1:
            return next(iter(failures.values()))
        if failures:
            answers = "; ".join(f"{address}: {error}" for address, error in failures.items())
            text = f"no prefill node could compute the prompt: {answers}"
            for kind in _SAID_BY_ALL:
                if all(isinstance(error, kind) for error in failures.values()):
                    return kind(text)
            return PeerUnavailableError(text)
        none_found = PeerUnavailableError(
            "no prefill node was found: none of prefill.addresses resolves to the address of "
            "a node that is not draining"
        )
        self._counters.handoff_failed(none_found)
        return none_found

    async def _attempt(
        self,
        handoff: _Handoff,
        address: str,
        channel: grpc.aio.Channel,
        said: Callable[[], None],
    ) -> HandoffResult:
        """Have one node compute a prompt; commits its sequence.

        said: called when the node has said something; see `PrefillNodes.sending`.
        """
        handoff.sequence.restart()
        call = channel.unary_stream(_METHOD)(handoff.message, timeout=handoff.seconds_left)
        stream = HandoffStream(
            call,
            handoff.sequence,
            self._layout,
            plane=self._plane,
            node=address,
            trace=self._trace,
            track=f"handoff {address} {handoff.request_id[:8]}",
        )
        if handoff.progress is not None:
            handoff.progress.follow(lambda: stream.tokens_taken)
        try:
            trailer = await self._read(stream, call, address, said)
        finally:
            # However this attempt ended, nothing comes any more.
            stream.close()
        if trailer.first_token_id >= self._vocab_size:
            raise FrameFormatError(
                f"TRAILER has first token {trailer.first_token_id}; the vocabulary has "
                f"{self._vocab_size}"
            )
        profiles = self._unpack_profiles(trailer, wants_profile=handoff.wants_profile)
        handoff.sequence.commit()
        began_at = stream.kv_began_at
        seconds = 0.0 if began_at is None else time.perf_counter() - began_at
        return HandoffResult(
            trailer, seconds, stream.payload_bytes, profiles, stream.way, stream.num_connections
        )

    async def _read(
        self,
        stream: HandoffStream,
        call: grpc.aio.UnaryStreamCall,
        address: str,
        said: Callable[[], None],
    ) -> Trailer:
        """Read a node's stream to its end; its errors name the node."""
        answers = partial(self._nodes.answers, address)
        try:
            async with ended_when_silent(call, answers, self._stall_seconds) as heard:
                await stream.read(heard, said)
            return await stream.finish(self._stall_seconds)
        except grpc.aio.AioRpcError as error:
            failure = error_from_rpc(error)
            # What a node says, it says over a connection that is well.
            is_broken = type(failure) is PeerUnavailableError
            failure = _of_node(failure, address, stream.advice)
            if is_broken and not stream.has_heard:
                raise _UnheardError(str(failure)) from None
            raise failure from None
        except (PeerUnavailableError, PeerMismatchError) as error:
            raise _of_node(error, address) from None

    def _unpack_profiles(self, trailer: Trailer, *, wants_profile: bool) -> list[PromptProfile]:
        if wants_profile:
            return prompt_profile.unpack(
                trailer.prompt_profile,
                num_layers=self._layout.num_layers,
                num_heads=self._num_heads,
                num_kv_heads=self._layout.num_kv_heads,
            )
        if trailer.prompt_profile:
            raise FrameFormatError(
                f"TRAILER has a prompt profile of {len(trailer.prompt_profile)} B; none was "
                f"asked for"
            )
        return []


def _of_node(error: FluxionError, address: str, advice: str = "") -> FluxionError:
    """What a prefill node's failure means here, with the node's address.

    advice: on connections that bring nothing.
    """
    if isinstance(error, RemoteCapacityError) and "larger than max" in str(error):
        # Our own limit, told by gRPC as if the peer were full.
        return FrameFormatError(f"prefill node {address} sent an oversized frame: {error}")
    if isinstance(error, PeerUnavailableError | RequestCancelledError):
        # We cancel by leaving the task; a cancellation that arrives as a status is the peer's.
        return PeerUnavailableError(f"prefill node {address} is not available: {error}")
    if isinstance(error, PeerMismatchError):
        return PeerMismatchError(f"prefill node {address} and this node do not match: {error}")
    if isinstance(error, RemoteError) and error.status is grpc.StatusCode.ABORTED:
        # It has given up waiting for KV to be taken: of this node or the network, not the client.
        text = f"prefill node {address} has ended the hand-off: {error}{advice}"
        return PeerUnavailableError(text)
    if isinstance(error, AuthenticationError):
        # Not of the client of Generate, who has shown its own.
        return PeerUnavailableError(
            f"prefill node {address} refuses this node's credentials ({error}); see prefill.client"
        )
    return error
