"""Our own API on the decode node: Generate, Tokenize, GetModelInfo, GetLoad.

Messages only: what becomes of a request is told by generation.py.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing

import grpc

from fluxion_core.kvstore.store import HostKvStore
from fluxion_core.observe.device_usage import TierUsage
from fluxion_core.wire.callers import Callers
from fluxion_proto.v1 import generate_pb2, generate_pb2_grpc
from services.decode.admission import Admission
from services.decode.engine import DecodeEngine
from services.decode.generation import Generation, RequestEnd, RequestStart
from services.decode.planning import Planning
from services.decode.progress import PromptProgress
from services.decode.prompt_reader import ClientRequest
from services.decode.token_stream import Delta
from services.node import NodeModel

GENERATION_SERVICE = "fluxion.v1.Generation"

_FINISH_REASONS = {
    "stop": generate_pb2.FINISH_REASON_STOP,
    "length": generate_pb2.FINISH_REASON_LENGTH,
}


class GenerationService(generate_pb2_grpc.GenerationServicer):
    """Serves `fluxion.v1.Generation`.

    Args:
        generation: runs requests.
        model: for model info.
        store: for load figures.
        admission: for load figures.
        engine: for load figures.
        planning: policies.
        callers: names a call's client.
    """

    def __init__(
        self,
        generation: Generation,
        model: NodeModel,
        store: HostKvStore,
        admission: Admission,
        engine: DecodeEngine,
        *,
        planning: Planning,
        callers: Callers,
    ) -> None:
        self._generation = generation
        self._callers = callers
        self._model = model
        self._store = store
        self._admission = admission
        self._engine = engine
        self._planning = planning
        self.is_draining = False

    async def Generate(  # noqa: N802 - the rpc's name
        self, message: generate_pb2.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[generate_pb2.GenerateResponse]:
        """Stream tokens as they are made; the last message has the reason and the usage."""
        request_id, progress = "", PromptProgress() if message.report_progress else None
        client_request = ClientRequest.from_message(message)
        async with aclosing(self._generation.run(client_request, context, progress)) as outputs:
            async for output in outputs:
                match output:
                    case RequestStart():
                        request_id = output.request.request_id
                    case generate_pb2.PromptProgress():
                        yield generate_pb2.GenerateResponse(request_id=request_id, progress=output)
                    case Delta():
                        yield generate_pb2.GenerateResponse(
                            request_id=request_id, text=output.text, token_ids=[output.token_id]
                        )
                    case RequestEnd():
                        yield generate_pb2.GenerateResponse(
                            request_id=request_id,
                            finish_reason=_FINISH_REASONS[output.reason],
                            usage=output.usage,
                        )

    async def Tokenize(  # noqa: N802 - the rpc's name
        self, message: generate_pb2.TokenizeRequest, context: grpc.aio.ServicerContext
    ) -> generate_pb2.TokenizeResponse:
        """Token ids of a prompt as Generate would see it."""
        client = self._callers.client_of(context)
        return generate_pb2.TokenizeResponse(
            token_ids=await self._generation.reader.token_ids(client, message)
        )

    async def GetModelInfo(  # noqa: N802 - the rpc's name
        self, message: generate_pb2.GetModelInfoRequest, context: grpc.aio.ServicerContext
    ) -> generate_pb2.GetModelInfoResponse:
        """Facts of the model and the node that do not change while it runs."""
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
        """Requests and memory now."""
        del message, context
        store, queue = self._store.statistics(), self._admission.statistics()
        engine = self._engine.statistics()
        tier = (engine.device and engine.device.tier) or TierUsage()
        return generate_pb2.GetLoadResponse(
            running_requests=queue.admitted,
            waiting_requests=queue.waiting,
            host_kv_capacity_bytes=store.capacity_bytes,
            host_kv_free_bytes=store.free_bytes,
            host_kv_reserved_bytes=store.reserved_bytes,
            host_kv_used_bytes=store.used_bytes,
            host_kv_cached_bytes=store.cached_bytes,
            generated_tokens_total=engine.tokens,
            is_draining=self.is_draining,
            device_kv_capacity_bytes=tier.capacity_bytes,
            device_kv_held_bytes=tier.held_bytes,
        )
