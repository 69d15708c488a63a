"""A request's life on the decode node, whichever service brought it.

Checked (request.py), admitted (admission.py), what is not stored of its prompt's KV pulled into
the store (kv_ingest.py) or, if it is little, computed here, decoded (engine.py) while tokens stream
out, and then everything given back, whichever way it ended; what was stored stays findable. A
client that does not read keeps none of it: its tokens wait, and memory and place go to others.

Not here: the services' messages (service.py, vllm_api.py); what a request has used (usage.py).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

import grpc

from fluxion_core.generation.stopping import FinishReason
from fluxion_core.generation.tokenizer import IncrementalDetokenizer
from fluxion_core.kvstore.sequence import SequenceKv
from fluxion_core.observe.log import event
from fluxion_core.wire.callers import Callers
from fluxion_core.wire.client_limits import ClientLimits
from fluxion_proto.v1 import generate_pb2
from services.decode.admission import Admission
from services.decode.cache_domain import Sharing, cache_domain
from services.decode.engine import DecodeEngine, DecodeSequence, ProfileRequest
from services.decode.kv_ingest import HandoffResult, KvIngest
from services.decode.placement import Placement
from services.decode.planning import Planning
from services.decode.progress import PromptProgress, next_or_report
from services.decode.prompt_reader import ClientRequest, PromptReader
from services.decode.request import GenerationRequest
from services.decode.request_counters import RequestCounters
from services.decode.token_stream import Delta, SequenceEnd, TokenStream
from services.decode.usage import RequestMeter, usage_of
from services.metrics import outcome_of
from services.node import NodeModel

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RequestStart:
    """First of a request's outputs: it holds its memory."""

    request: GenerationRequest
    cached_tokens: int
    """Of the prompt, found in the store."""


@dataclass(frozen=True)
class RequestEnd:
    """Last of a request's outputs."""

    reason: FinishReason
    matched_stop: str | int | None
    """The stop string or stop token of the request that ended it, if one did."""
    usage: generate_pb2.Usage


Output = RequestStart | generate_pb2.PromptProgress | Delta | RequestEnd


class Generation:
    """Runs requests over one model, one store and one engine.

    Args:
        model: for requests and text.
        admission: gives memory to requests.
        ingest: gets prompts computed.
        engine: decodes.
        reader: makes requests of what clients send.
        placement: says who computes what is missing of a prompt, and learns from hand-offs.
        planning: policies, and the planner's state of each sequence.
        counters: count how requests go.
        callers: names a request's client.
        limits: bound what a client has waiting.
        share_prefixes: among whose requests stored KV is found.
    """

    def __init__(
        self,
        model: NodeModel,
        admission: Admission,
        ingest: KvIngest,
        engine: DecodeEngine,
        reader: PromptReader,
        *,
        placement: Placement,
        planning: Planning,
        counters: RequestCounters,
        callers: Callers,
        limits: ClientLimits,
        share_prefixes: Sharing,
    ) -> None:
        self._model = model
        self._admission = admission
        self._ingest = ingest
        self._engine = engine
        self.reader = reader
        self._placement = placement
        self._planning = planning
        self._counters = counters
        self._callers = callers
        self._limits = limits
        self._share_prefixes: Sharing = share_prefixes

    async def run(
        self,
        client_request: ClientRequest,
        context: grpc.aio.ServicerContext,
        progress: PromptProgress | None = None,
    ) -> AsyncGenerator[Output, None]:
        """A request's outputs: its start, a Delta a token, its end; reports of the prompt between.

        Close it (`aclosing`) when no more is wanted: its memory is given back then, or before, once
        the engine has ended it. Outputs that are not taken wait, at most as many as it may generate
        tokens.

        Args:
            client_request: what the client asks for.
            context: of the call.
            progress: follows the prompt; if it is given, reports of it come before the first Delta.
        """
        untaken: asyncio.Queue[Output | None] = asyncio.Queue()
        answering = asyncio.create_task(
            self._answer(client_request, context, untaken.put_nowait, progress or PromptProgress())
        )
        answering.add_done_callback(lambda _: untaken.put_nowait(None))
        try:
            while True:
                output = await (next_or_report(untaken, progress) if progress else untaken.get())
                if output is None:
                    break
                if isinstance(output, Delta):
                    progress = None
                yield output
            answering.result()
        finally:
            await _end(answering)
            # See `failure` below.
            del answering

    async def _answer(
        self,
        client_request: ClientRequest,
        context: grpc.aio.ServicerContext,
        give: Callable[[Output], None],
        progress: PromptProgress,
    ) -> None:
        """Run a request from its message to the return of what it held."""
        meter = RequestMeter(self._counters)
        client = self._callers.client_of(context)
        request: GenerationRequest | None = None
        failure: BaseException | None = None
        try:
            request = await self.reader.request(client, client_request)
            progress.num_tokens = prompt_tokens = len(request.prompt_token_ids)
            with self._limits.waiting(client, prompt_tokens) as has_waited:
                async with self._admit(request, client, context) as kv:
                    meter.admit()
                    handoff = await self._begin_prompt(request, context, kv, meter, give, progress)

                    def give_waited(output: Output) -> None:
                        has_waited()
                        give(output)

                    await self._decode(request, kv, handoff, meter, give_waited)
        except BaseException as error:
            failure = error
            raise
        finally:
            self._ended(client, request, failure, meter.seconds)
            # Its traceback holds this frame, which would hold it, and the message with them.
            failure = None

    def _admit(
        self, request: GenerationRequest, client: str, context: grpc.aio.ServicerContext
    ) -> AbstractAsyncContextManager[SequenceKv]:
        """Wait for a request's memory, and hold it."""
        return self._admission.admit(
            request.prompt_token_ids,
            request.stop.max_new_tokens,
            client=client,
            priority=request.priority,
            deadline_seconds=context.time_remaining(),
            approximation=self._planning.approximation(request.policy),
            domain=cache_domain(
                self._share_prefixes, self._callers.domain_of(context), request.cache_salt
            ),
        )

    async def _begin_prompt(
        self,
        request: GenerationRequest,
        context: grpc.aio.ServicerContext,
        kv: SequenceKv,
        meter: RequestMeter,
        give: Callable[[Output], None],
        progress: PromptProgress,
    ) -> HandoffResult | None:
        """Decide who computes what is missing of a prompt, and let it be computed.

        Returns:
            The hand-off that brought it; None if the engine is to compute it.
        """
        prompt_tokens = len(request.prompt_token_ids)
        profile_window = self._planning.profile_window(request.policy)
        decision = await self._placement.place(
            request.request_id,
            prompt_tokens,
            kv.shared_tokens,
            wants_profile=profile_window is not None,
        )
        is_local = decision.is_local
        cached_tokens = kv.shared_tokens if is_local else kv.kv_from_token
        self._counters.admitted(
            prompt_tokens=prompt_tokens,
            cached_tokens=cached_tokens,
            is_local=is_local,
            seconds=meter.queue_seconds,
        )
        give(RequestStart(request, cached_tokens))
        if is_local:
            kv.begin_prompt()
            progress.follow(lambda: kv.num_tokens)
            return None
        with self._engine.arriving(kv):
            handoff = await self._ingest.fetch(
                request.request_id,
                request.prompt_token_ids,
                request.sampling,
                kv,
                deadline_seconds=context.time_remaining(),
                profile_window=profile_window,
                progress=progress,
            )
        self._placement.learn(prompt_tokens, handoff)
        return handoff

    def _ended(
        self,
        client: str,
        request: GenerationRequest | None,
        failure: BaseException | None,
        seconds: float,
    ) -> None:
        """Count and log a request's end; one that was malformed is only counted."""
        self._counters.request_ended(failure, seconds)
        if request is None:
            return
        _log.info(
            event(
                "request",
                request_id=request.request_id,
                client=client,
                outcome="finished" if failure is None else outcome_of(failure)[1],
                prompt_tokens=len(request.prompt_token_ids),
                policy=str(request.policy),
                seconds=seconds,
            )
        )

    async def _decode(
        self,
        request: GenerationRequest,
        kv: SequenceKv,
        handoff: HandoffResult | None,
        meter: RequestMeter,
        give: Callable[[Output], None],
    ) -> None:
        """Decode a sequence that is committed, or whose prompt has begun (`handoff` is None).

        The engine has let go of it when this ends, however.
        """
        stream = TokenStream(
            request,
            IncrementalDetokenizer(self._model.tokenizer, skip_special_tokens=True),
            asyncio.get_running_loop(),
        )
        sequence = self._sequence_of(request, kv, handoff, stream)
        error: BaseException | None = None
        is_running = handoff is None or stream.take(handoff.trailer.first_token_id)
        if is_running:
            self._engine.submit(sequence)
        else:
            stream.end(None)
        try:
            while not isinstance(item := await stream.next(), SequenceEnd):
                meter.count_token()
                give(item)
            is_running, error = False, item.error
            if error is not None:
                raise error
        finally:
            if is_running:
                error = await self._reclaim(sequence, stream)
            if error is None:
                kv.keep(sequence.generated_token_ids)
            else:
                kv.withdraw()
        assert stream.finish_reason is not None
        usage = usage_of(sequence, meter, handoff, baseline_share=self._planning.baseline_share)
        give(RequestEnd(stream.finish_reason, stream.matched_stop, usage))

    def _sequence_of(
        self,
        request: GenerationRequest,
        kv: SequenceKv,
        handoff: HandoffResult | None,
        stream: TokenStream,
    ) -> DecodeSequence:
        """The request as the engine takes it."""
        planner = self._planning.planner
        profile_window = self._planning.profile_window(request.policy)
        return DecodeSequence(
            request_id=request.request_id,
            kv=kv,
            policy=request.policy,
            planner_state=(
                planner.new_state(handoff.profiles) if handoff and handoff.profiles else None
            ),
            prompt_token_ids=request.prompt_token_ids,
            generated_token_ids=[handoff.trailer.first_token_id] if handoff else [],
            sampling=request.sampling,
            on_token=stream.take,
            on_end=stream.end,
            profile_request=ProfileRequest(planner, profile_window) if profile_window else None,
        )

    async def _reclaim(self, sequence: DecodeSequence, stream: TokenStream) -> BaseException | None:
        """Wait until the engine has let go of a sequence that nobody wants any more.

        Its memory must not be freed before: a step may be reading it. At most one step passes.

        Returns:
            What went wrong in that step, if anything did.
        """
        self._engine.cancel(sequence)

        async def until_ended() -> SequenceEnd:
            while not isinstance(item := await stream.next(), SequenceEnd):
                pass
            return item

        waiting = asyncio.ensure_future(until_ended())
        while not waiting.done():
            try:
                await asyncio.shield(waiting)
            except asyncio.CancelledError:
                # Cancelled again while cleaning up: the memory is still the engine's.
                continue
        return waiting.result().error


async def _end(task: asyncio.Task[None]) -> None:
    """Cancel a request, unless it is over, and wait until it has given everything back."""
    task.cancel()
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            # Cancelled again while cleaning up: what the request holds is still the engine's.
            continue
    if not task.cancelled():
        # Who wants no more outputs does not want the failure either.
        task.exception()
