"""The decode node's gRPC side: Generate, Tokenize, GetModelInfo, GetLoad.

Life of a request: checked (request.py), admitted (admission.py), its prompt's KV pulled into the
store (kv_ingest.py), decoded (engine.py) while tokens stream out, and then everything given back,
whichever way it ended.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator

import grpc

from fluxion_core.generation.tokenizer import IncrementalDetokenizer
from fluxion_core.kvstore.store import HostKvStore
from fluxion_core.telemetry import event
from fluxion_core.wire.callers import Callers
from fluxion_core.wire.client_limits import ClientLimits
from fluxion_proto.v1 import generate_pb2, generate_pb2_grpc
from services.decode.admission import Admission, Admitted
from services.decode.engine import DecodeEngine, DecodeSequence
from services.decode.kv_ingest import KvIngest, Prefilled
from services.decode.metrics import RequestCounters
from services.decode.planning import Planning
from services.decode.request import GenerationRequest, check_request, prompt_token_ids
from services.decode.token_stream import Ended, TokenStream
from services.metrics import outcome_of
from services.node import NodeModel

_log = logging.getLogger(__name__)

GENERATION_SERVICE = "fluxion.v1.Generation"

_FINISH_REASONS = {
    "stop": generate_pb2.FINISH_REASON_STOP,
    "length": generate_pb2.FINISH_REASON_LENGTH,
}


class GenerationService(generate_pb2_grpc.GenerationServicer):
    """Serves Generate over one model, one store and one engine.

    Args:
        model: for requests, text and model info.
        store: for load figures and held bytes.
        admission: gives memory to requests.
        ingest: gets prompts computed.
        engine: decodes.
        default_max_new_tokens: for requests that do not say.
        planning: policies, and the planner's state of each sequence.
        counters: count how requests go.
        callers: names a request's client.
        limits: bound what a client has waiting.
    """

    def __init__(
        self,
        model: NodeModel,
        store: HostKvStore,
        admission: Admission,
        ingest: KvIngest,
        engine: DecodeEngine,
        *,
        default_max_new_tokens: int,
        planning: Planning,
        counters: RequestCounters,
        callers: Callers,
        limits: ClientLimits,
    ) -> None:
        self._callers = callers
        self._limits = limits
        self._model = model
        self._store = store
        self._admission = admission
        self._ingest = ingest
        self._engine = engine
        self._default_max_new_tokens = default_max_new_tokens
        self._planning = planning
        self._counters = counters
        self.is_draining = False

    async def Generate(  # noqa: N802 - the rpc's name
        self, message: generate_pb2.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[generate_pb2.GenerateResponse]:
        """Stream tokens as they are made; the last message has the reason and the usage."""
        arrived = time.perf_counter()
        client = self._callers.client_of(context)
        request: GenerationRequest | None = None
        failure: BaseException | None = None
        try:
            request = check_request(
                message,
                self._model.tokenizer,
                self._model.loaded.config,
                default_max_new_tokens=self._default_max_new_tokens,
                planning=self._planning,
            )
            prompt_tokens = len(request.prompt_token_ids)
            admission = self._admission.admit(request.prompt_token_ids, request.stop.max_new_tokens)
            with self._limits.waiting(client, prompt_tokens) as has_waited:
                async with admission as admitted:
                    admitted_after = time.perf_counter() - arrived
                    self._counters.admitted(
                        prompt_tokens=prompt_tokens,
                        cached_tokens=admitted.sequence.shared_tokens,
                        seconds=admitted_after,
                    )
                    prefilled = await self._ingest.fetch(
                        request.request_id,
                        request.prompt_token_ids,
                        request.sampling,
                        admitted.sequence,
                        deadline_seconds=context.time_remaining(),
                        profile_window=self._planning.profile_window(request.policy),
                    )
                    has_waited()
                    async for response in self._decode(
                        request, admitted, prefilled, arrived, admitted_after
                    ):
                        yield response
        except BaseException as error:
            failure = error
            raise
        finally:
            self._ended(client, request, failure, time.perf_counter() - arrived)

    async def Tokenize(  # noqa: N802 - the rpc's name
        self, message: generate_pb2.TokenizeRequest, context: grpc.aio.ServicerContext
    ) -> generate_pb2.TokenizeResponse:
        """Token ids of a prompt as Generate would see it."""
        del context
        return generate_pb2.TokenizeResponse(
            token_ids=prompt_token_ids(message, self._model.tokenizer)
        )

    async def GetModelInfo(  # noqa: N802 - the rpc's name
        self, message: generate_pb2.GetModelInfoRequest, context: grpc.aio.ServicerContext
    ) -> generate_pb2.GetModelInfoResponse:
        """What does not change while the node runs."""
        del message, context
        loaded, tokenizer = self._model.loaded, self._model.tokenizer
        config, planning = loaded.config, self._planning
        levels = {
            generate_pb2.QualityLevel.Value(f"QUALITY_LEVEL_{name}"): str(policy)
            for name, policy in planning.levels.items()
        }
        return generate_pb2.GetModelInfoResponse(
            name=loaded.name,
            architecture=config.architecture,
            revision_hash=loaded.revision_hash,
            context_tokens=config.context_tokens,
            vocab_size=config.vocab_size,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            kv_bytes_per_token=self._store.geometry.token_bytes,
            quality_levels=levels,
            has_chat_template=tokenizer.has_chat_template,
            eos_token_ids=sorted({*config.eos_token_ids, *tokenizer.eos_token_ids}),
            tokenizer_fingerprint=tokenizer.fingerprint,
            device=str(loaded.decoder.embedding.device),
            level_policies=[
                generate_pb2.LevelPolicy(level=level, policy=policy)
                for level, policy in levels.items()
            ],
            default_policy=str(planning.default_policy),
            predictor_mode=planning.planner.mode,
            predictor_fingerprint=planning.weights_fingerprint,
        )

    async def GetLoad(  # noqa: N802 - the rpc's name
        self, message: generate_pb2.GetLoadRequest, context: grpc.aio.ServicerContext
    ) -> generate_pb2.GetLoadResponse:
        """Requests and host memory now."""
        del message, context
        store, queue = self._store.statistics(), self._admission.statistics()
        return generate_pb2.GetLoadResponse(
            running_requests=queue.admitted,
            waiting_requests=queue.waiting,
            host_kv_capacity_bytes=store.capacity_bytes,
            host_kv_free_bytes=store.free_bytes,
            host_kv_reserved_bytes=store.reserved_bytes,
            host_kv_used_bytes=store.used_bytes,
            host_kv_cached_bytes=store.cached_bytes,
            generated_tokens_total=self._engine.statistics().tokens,
            is_draining=self.is_draining,
        )

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
        admitted: Admitted,
        prefilled: Prefilled,
        arrived: float,
        admitted_after: float,
    ) -> AsyncIterator[generate_pb2.GenerateResponse]:
        """Stream a committed sequence. The engine has let go of it when this ends, however."""
        stream = TokenStream(
            request,
            IncrementalDetokenizer(self._model.tokenizer),
            asyncio.get_running_loop(),
        )
        first_token_id = prefilled.trailer.first_token_id
        sequence = DecodeSequence(
            request_id=request.request_id,
            kv=admitted.sequence,
            policy=request.policy,
            planner_state=(
                self._planning.planner.new_state(prefilled.profiles) if prefilled.profiles else None
            ),
            prompt_token_ids=request.prompt_token_ids,
            generated_token_ids=[first_token_id],
            sampling=request.sampling,
            on_token=stream.take,
            on_end=stream.end,
        )
        num_tokens, first_token_after, last_token_at = 0, 0.0, 0.0
        is_running = stream.take(first_token_id)
        if is_running:
            self._engine.submit(sequence)
        else:
            stream.end(None)
        try:
            while True:
                item = await stream.next()
                if isinstance(item, Ended):
                    is_running = False
                    if item.error is not None:
                        raise item.error
                    break
                now = time.perf_counter()
                num_tokens += 1
                self._counters.generated_tokens += 1
                if num_tokens == 1:
                    first_token_after = now - arrived
                    self._counters.first_token_seconds.observe(first_token_after)
                else:
                    self._counters.inter_token_seconds.observe(now - last_token_at)
                last_token_at = now
                yield generate_pb2.GenerateResponse(
                    request_id=request.request_id, text=item.text, token_ids=[item.token_id]
                )
        finally:
            if is_running:
                await self._reclaim(sequence, stream)
        assert stream.finish_reason is not None
        yield generate_pb2.GenerateResponse(
            request_id=request.request_id,
            finish_reason=_FINISH_REASONS[stream.finish_reason],
            usage=generate_pb2.Usage(
                prompt_tokens=len(request.prompt_token_ids),
                cached_tokens=admitted.sequence.shared_tokens,
                generated_tokens=num_tokens,
                queue_seconds=admitted_after + prefilled.trailer.queue_seconds,
                prefill_seconds=prefilled.trailer.prefill_seconds,
                handoff_seconds=prefilled.handoff_seconds,
                decode_seconds=sequence.decode_seconds,
                time_to_first_token_seconds=first_token_after,
                handoff_bytes=prefilled.handoff_bytes,
                kv_bytes_read_per_token=sequence.reads.total_bytes / max(1, sequence.steps),
                kv_bytes_in_host_memory=admitted.sequence.held_bytes,
                kv_reads=self._kv_reads(sequence),
            ),
        )

    def _kv_reads(self, sequence: DecodeSequence) -> generate_pb2.KvReads:
        reads, steps = sequence.reads, max(1, sequence.steps)
        return generate_pb2.KvReads(
            policy=str(sequence.policy),
            scanned_bytes_per_token=reads.scanned_bytes / steps,
            attended_bytes_per_token=reads.attended_bytes / steps,
            share_of_exact=reads.share_of_exact,
            share_of_fixed_estimate=reads.share_of_exact / self._planning.baseline_share,
            streaming_share=reads.streaming_share,
            groups_by_block_size=reads.groups_of_size,
            groups_nothing=reads.groups_nothing,
            groups_everything=reads.groups_everything,
        )

    async def _reclaim(self, sequence: DecodeSequence, stream: TokenStream) -> None:
        """Wait until the engine has let go of a sequence that nobody wants any more.

        Its memory must not be freed before: a step may be reading it. At most one step passes.
        """
        self._engine.cancel(sequence)

        async def until_ended() -> None:
            while not isinstance(await stream.next(), Ended):
                pass

        waiting = asyncio.ensure_future(until_ended())
        while not waiting.done():
            try:
                await asyncio.shield(waiting)
            except asyncio.CancelledError:
                # Cancelled again while cleaning up: the memory is still the engine's.
                continue
