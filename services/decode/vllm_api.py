"""`vllm.grpc.engine.VllmEngine` on the decode node: what gateways such as SMG ask of an engine.

Token ids in, token ids out; tokenizing, chat templates and text are the gateway's work, with the
tokenizer that GetTokenizer hands out. Requests run as those of our own API do (generation.py), at
the node's default policy. The messages are those of the package smg-grpc-proto (extra `gateway`):
where it is not installed, this module cannot be imported, and the node serves its own API alone.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from typing import NoReturn

import grpc
from smg_grpc_proto.generated import common_pb2, vllm_engine_pb2, vllm_engine_pb2_grpc

from fluxion_core import DISTRIBUTION
from fluxion_core.errors import InvalidRequestError, UnsupportedCallError
from fluxion_core.generation.tokenizer_files import tokenizer_archive
from fluxion_core.kvstore.store import HostKvStore
from fluxion_core.observe.log import event
from fluxion_core.wire.callers import Callers
from fluxion_core.wire.server import NodeServer
from fluxion_proto.v1 import generate_pb2
from services.decode.abortable_calls import AbortableCalls
from services.decode.admission import Admission
from services.decode.generation import Generation, RequestEnd, RequestStart
from services.decode.prompt_reader import ClientRequest
from services.decode.token_stream import Delta
from services.decode.vllm_request import as_generate_request, prompt_bytes
from services.node import NodeModel

_log = logging.getLogger(__name__)

SERVICES = ("vllm.grpc.engine.VllmEngine",)
"""Full names, for reflection."""

_TOKENIZER_CHUNK_BYTES = 64 << 10

MAX_ABORTED_IDS = 1024
"""In one call of Abort."""


def add_to_server(
    server: NodeServer,
    generation: Generation,
    model: NodeModel,
    store: HostKvStore,
    admission: Admission,
    *,
    max_running: int,
) -> None:
    """Register the service; see `VllmEngineService` for what it needs."""
    service = VllmEngineService(
        generation, model, store, admission, max_running=max_running, callers=server.callers
    )
    vllm_engine_pb2_grpc.add_VllmEngineServicer_to_server(service, server)


def _not_offered(sentence: str) -> Callable[..., Awaitable[NoReturn]]:
    """A method that refuses every call."""

    async def refuse(self: object, message: object, context: object) -> NoReturn:
        del self, message, context
        raise UnsupportedCallError(sentence)

    return refuse


class VllmEngineService(vllm_engine_pb2_grpc.VllmEngineServicer):  # type: ignore[misc]
    """Serves `vllm.grpc.engine.VllmEngine`.

    Args:
        generation: runs requests.
        model: for requests, model info and the tokenizer.
        store: for load figures.
        admission: for load figures.
        max_running: requests that run at a time, for load figures.
        callers: names a request's client.
    """

    def __init__(
        self,
        generation: Generation,
        model: NodeModel,
        store: HostKvStore,
        admission: Admission,
        *,
        max_running: int,
        callers: Callers,
    ) -> None:
        self._generation = generation
        self._model = model
        self._store = store
        self._admission = admission
        self._max_running = max_running
        self._callers = callers
        self._started_at = time.monotonic()
        self._calls = AbortableCalls()
        self._tokenizer_archive: asyncio.Task[bytes] | None = None

    async def Generate(  # noqa: N802 - the rpc's name
        self, message: vllm_engine_pb2.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[vllm_engine_pb2.GenerateResponse]:
        """Stream a chunk a token, if asked to; the last message says why it ended.

        It has all tokens where they were not streamed.
        """

        token_ids: list[int] = []
        prompt_tokens = cached_tokens = num_tokens = 0
        reason, matched_stop = "abort", None
        client_request = ClientRequest(partial(self._read, message), prompt_bytes(message))
        outputs = self._generation.run(client_request, context)
        with self._calls.opened(self._callers.client_of(context), message.request_id) as call:
            async with aclosing(outputs):
                while (output := await call.next_of(outputs)) is not None:
                    match output:
                        case RequestStart():
                            prompt_tokens = len(output.request.prompt_token_ids)
                            cached_tokens = output.cached_tokens
                        case Delta():
                            num_tokens += 1
                            if not message.stream:
                                token_ids.append(output.token_id)
                                continue
                            yield vllm_engine_pb2.GenerateResponse(
                                chunk=vllm_engine_pb2.GenerateStreamChunk(
                                    token_ids=[output.token_id],
                                    prompt_tokens=prompt_tokens,
                                    completion_tokens=1,
                                    cached_tokens=cached_tokens,
                                )
                            )
                        case RequestEnd():
                            reason, matched_stop = output.reason, output.matched_stop
        yield vllm_engine_pb2.GenerateResponse(
            complete=vllm_engine_pb2.GenerateComplete(
                output_ids=token_ids,
                finish_reason=reason,
                prompt_tokens=prompt_tokens,
                completion_tokens=num_tokens,
                cached_tokens=cached_tokens,
                matched_token_id=matched_stop if isinstance(matched_stop, int) else None,
                matched_stop_str=matched_stop if isinstance(matched_stop, str) else None,
            )
        )

    def _read(self, message: vllm_engine_pb2.GenerateRequest) -> generate_pb2.GenerateRequest:
        context_tokens = self._model.loaded.config.context_tokens
        return as_generate_request(message, context_tokens=context_tokens)

    async def Abort(  # noqa: N802 - the rpc's name
        self, message: vllm_engine_pb2.AbortRequest, context: grpc.aio.ServicerContext
    ) -> vllm_engine_pb2.AbortResponse:
        """End requests of the same client by id; those that are not there have ended already."""
        if (count := len(message.request_ids)) > MAX_ABORTED_IDS:
            raise InvalidRequestError(f"{count} request_ids; at most {MAX_ABORTED_IDS} at a time")
        client = self._callers.client_of(context)
        running = self._calls.abort(client, message.request_ids)
        _log.info(event("abort", client=client, asked=len(message.request_ids), running=running))
        return vllm_engine_pb2.AbortResponse()

    async def HealthCheck(  # noqa: N802 - the rpc's name
        self, message: vllm_engine_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext
    ) -> vllm_engine_pb2.HealthCheckResponse:
        """Health, which is good: a node that is not ready refuses the call before it comes here."""
        del message, context
        return vllm_engine_pb2.HealthCheckResponse(healthy=True, message="serving")

    async def GetModelInfo(  # noqa: N802 - the rpc's name
        self, message: vllm_engine_pb2.GetModelInfoRequest, context: grpc.aio.ServicerContext
    ) -> vllm_engine_pb2.GetModelInfoResponse:
        """Facts of the model, without a path: the tokenizer is handed out."""
        del message, context
        loaded, tokenizer = self._model.loaded, self._model.tokenizer
        config = loaded.config
        return vllm_engine_pb2.GetModelInfoResponse(
            model_path=loaded.name,
            served_model_name=loaded.name,
            is_generation=True,
            max_context_length=config.context_tokens,
            max_req_input_len=config.context_tokens - 1,
            vocab_size=config.vocab_size,
            model_type=config.architecture,
            eos_token_ids=sorted({*config.eos_token_ids, *tokenizer.eos_token_ids}),
            bos_token_id=tokenizer.bos_token_id or 0,
        )

    async def GetServerInfo(  # noqa: N802 - the rpc's name
        self, message: vllm_engine_pb2.GetServerInfoRequest, context: grpc.aio.ServicerContext
    ) -> vllm_engine_pb2.GetServerInfoResponse:
        """Facts of the server: its kind, its age and its requests."""
        del message, context
        return vllm_engine_pb2.GetServerInfoResponse(
            active_requests=self._admission.statistics().admitted,
            uptime_seconds=time.monotonic() - self._started_at,
            server_type="fluxion",
            data_parallel_size=1,
            max_num_seqs=self._max_running,
        )

    async def GetLoads(  # noqa: N802 - the rpc's name
        self, message: vllm_engine_pb2.GetLoadsRequest, context: grpc.aio.ServicerContext
    ) -> vllm_engine_pb2.GetLoadsResponse:
        """Requests and host memory now; KV that is only kept for its prefix counts as free."""
        del message, context
        store, queue = self._store.statistics(), self._admission.statistics()
        held_bytes = store.reserved_bytes + store.used_bytes
        token_bytes = self._store.geometry.token_bytes
        return vllm_engine_pb2.GetLoadsResponse(
            timestamp=datetime.now(UTC).isoformat(),
            version=metadata.version(DISTRIBUTION),
            dp_rank_count=1,
            loads=[
                vllm_engine_pb2.SchedulerLoad(
                    num_running_reqs=queue.admitted,
                    num_waiting_reqs=queue.waiting,
                    num_total_reqs=queue.admitted + queue.waiting,
                    num_used_tokens=held_bytes // token_bytes,
                    max_total_num_tokens=store.capacity_bytes // token_bytes,
                    token_usage=held_bytes / store.capacity_bytes,
                    max_running_requests=self._max_running,
                )
            ],
        )

    async def GetTokenizer(  # noqa: N802 - the rpc's name
        self, message: common_pb2.GetTokenizerRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[common_pb2.GetTokenizerChunk]:
        """The tokenizer's files as a ZIP archive in pieces, its SHA-256 with the last one."""
        del message, context
        if self._tokenizer_archive is None:
            making = asyncio.to_thread(tokenizer_archive, self._model.tokenizer)
            self._tokenizer_archive = asyncio.create_task(making)
        archive = await asyncio.shield(self._tokenizer_archive)
        for start in range(0, len(archive), _TOKENIZER_CHUNK_BYTES):
            end = start + _TOKENIZER_CHUNK_BYTES
            yield common_pb2.GetTokenizerChunk(
                data=archive[start:end],
                sha256=hashlib.sha256(archive).hexdigest() if end >= len(archive) else "",
            )

    async def SubscribeKvEvents(  # noqa: N802 - the rpc's name
        self, message: common_pb2.SubscribeKvEventsRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[common_pb2.KvEventBatch]:
        """Refuse: this is not offered."""
        del message, context
        raise UnsupportedCallError("this node does not tell which KV it keeps")
        yield  # type: ignore[unreachable] # makes it a stream

    Embed = _not_offered("this node serves no embeddings")
    FlushCache = _not_offered("cached prefixes are given up on demand; there is no flush")
    StartProfile = _not_offered("record decode steps with `fluxion trace`")
    StopProfile = _not_offered("record decode steps with `fluxion trace`")
