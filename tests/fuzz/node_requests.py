"""Requests with odd fields, and damaged hand-offs, to real nodes over gRPC.

Both nodes run in this process, and a second decode node gets its KV through a proxy that damages
it. Every request ends with a status that blames nobody else, and then nothing is held.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from random import Random

import grpc

from fluxion_core.config.carriers import Carrier
from fluxion_core.config.settings import ClientSettings, HandoffSettings
from fluxion_core.generation.sampling import SamplingParams
from fluxion_core.kvstream.handoff import KvLayout
from fluxion_core.wire import codec
from fluxion_core.wire.channel import open_channel
from fluxion_proto.v1 import generate_pb2, generate_pb2_grpc, handoff_pb2, handoff_pb2_grpc
from tests.fuzz.gguf_files import fast_directory
from tests.fuzz.handoff_streams import damage, set_odd_field
from tests.fuzz.harness import Outcome, ViolationError
from tests.fuzz.model_directories import seed_directory
from tests.fuzz.mutate import mutate_bytes
from tests.services.conftest import (
    decode_node,
    decode_settings,
    prefill_node,
    prefill_settings,
    running_node,
)

CALL_SECONDS = 60.0
_HANDOFF = "/fluxion.v1.Handoff/Prefill"
_GENERATE = "/fluxion.v1.Generation/Generate"
_TOKENIZE = "/fluxion.v1.Generation/Tokenize"
_REFUSALS = ("INVALID_ARGUMENT", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION")


class NodeRequests:
    """Odd requests to a prefill and a decode node, and damaged hand-offs to another decode node."""

    name = "requests"
    unit = "requests"

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._stack = AsyncExitStack()
        self._loop.run_until_complete(self._start())

    def close(self) -> None:
        """End the nodes."""
        self._loop.run_until_complete(self._stack.aclose())
        self._loop.close()

    def run(self, random: Random) -> Outcome:
        """One request."""
        return self._loop.run_until_complete(self._run(random))

    async def _start(self) -> None:
        enter = self._stack.enter_async_context
        directory = self._stack.enter_context(
            tempfile.TemporaryDirectory(prefix="fluxion-fuzz-", dir=fast_directory())
        )
        model = Path(directory)
        for name, content in seed_directory().items():
            (model / name).write_bytes(content)
        # Who asks for KV beside its call, and does not fetch it, is given up soon.
        settings = prefill_settings(model, unread_seconds=1.0)
        prefill = await enter(running_node(prefill_node.serve, settings))
        self._prefill = await enter(open_channel(prefill.address, ClientSettings()))
        load = await handoff_pb2_grpc.PrefillNodeStub(self._prefill).GetPrefillLoad(
            handoff_pb2.GetPrefillLoadRequest()
        )
        self._layout: KvLayout = codec.layout_from_proto(load.layout)
        self._proxy = _DamagingProxy(self._prefill)
        proxy_address = await self._proxy.start()
        self._stack.push_async_callback(self._proxy.stop)
        self._decoders = []
        # What the proxy damages comes over the call.
        over_the_call = HandoffSettings(ways=(Carrier.GRPC,))
        for address, handoff in ((prefill.address, None), (proxy_address, over_the_call)):
            of_node = decode_settings(model, address, handoff=handoff)
            node = await enter(running_node(decode_node.serve, of_node))
            self._decoders.append(await enter(open_channel(node.address, ClientSettings())))

    async def _run(self, random: Random) -> Outcome:
        kind = random.choice(("generate", "generate", "hand-off", "tokenize", "damage"))
        message = self._message(random, kind)
        channel = self._decoders[0]
        allowed = _REFUSALS
        match kind:
            case "hand-off":
                channel, call = self._prefill, self._prefill.unary_stream(_HANDOFF)
                allowed = (*_REFUSALS, "ABORTED")
            case "tokenize":
                call = channel.unary_unary(_TOKENIZE)
            case "generate":
                call = channel.unary_stream(_GENERATE)
            case _:
                channel = self._decoders[1]
                call = channel.unary_stream(_GENERATE)
                self._proxy.random = random
                allowed = (*_REFUSALS, "DATA_LOSS")
        result = await _outcome(call, message, random.choice((1, 4, 1000)))
        if result != "accepted" and result not in allowed:
            raise ViolationError(f"{kind} ended with {result}")
        for decoder in self._decoders:
            await _check_nothing_is_held(decoder)
        return Outcome(result, 1, len(message))

    def _message(self, random: Random, kind: str) -> bytes:
        """A request that can be answered, with up to three fields changed, or bytes of it."""
        num_tokens = random.choice((1, 15, 16, 17, 60, 129, 200, 300))
        token_ids = [random.randrange(44) for _ in range(num_tokens)]
        sampling = codec.sampling_to_proto(SamplingParams(temperature=1.0, seed=7))
        match kind:
            case "hand-off":
                message = handoff_pb2.HandoffRequest(
                    request_id="fuzz",
                    token_ids=token_ids,
                    sampling=sampling,
                    layout=codec.layout_to_proto(self._layout),
                    want_prompt_profile=random.random() < 0.5,
                )
                if message.want_prompt_profile:
                    message.sink_tokens, message.recent_tokens = 64, 128
            case "tokenize":
                message = generate_pb2.TokenizeRequest(text="what is it? " * num_tokens)
            case _:
                message = generate_pb2.GenerateRequest(
                    max_new_tokens=random.choice((1, 8, 40)), sampling=sampling, ignore_eos=True
                )
                match random.randrange(3):
                    case 0:
                        message.text = "what is it? " * (num_tokens // 12 + 1)
                    case 1:
                        message.chat.messages.add(role="user", content="why?")
                    case _:
                        message.token_ids.ids.extend(token_ids)
                if random.random() < 0.3:
                    message.policy = random.choice(("exact", "fixed(16, 5 %)", "marginal(1)"))
        if kind == "damage":
            return message.SerializeToString()
        for _ in range(random.choice((0, 1, 1, 1, 2, 3))):
            set_odd_field(random, message)
        content = message.SerializeToString()
        return mutate_bytes(random, content) if random.random() < 0.2 else content


async def _outcome(call, message: bytes, max_responses: int) -> str:
    """accepted, or the status; a stream that goes on is cancelled after some responses."""
    running = call(message, timeout=CALL_SECONDS)
    try:
        if isinstance(running, grpc.aio.UnaryUnaryCall):
            await running
            return "accepted"
        async for _ in running:
            max_responses -= 1
            if not max_responses:
                break
    except grpc.aio.AioRpcError as error:
        status: str = error.code().name
        return status
    finally:
        running.cancel()
    return "accepted"


async def _check_nothing_is_held(channel: grpc.aio.Channel) -> None:
    """Wait until the node has let go of everything; a cancelled request takes a step."""
    stub = generate_pb2_grpc.GenerationStub(channel)
    for _ in range(10_000):
        load = await stub.GetLoad(generate_pb2.GetLoadRequest(), timeout=CALL_SECONDS)
        if not (load.running_requests or load.waiting_requests):
            break
    held = load.host_kv_reserved_bytes + load.host_kv_used_bytes
    if load.running_requests or load.waiting_requests or held:
        raise ViolationError(f"something is still held: {load}")
    if load.host_kv_free_bytes + load.host_kv_cached_bytes != load.host_kv_capacity_bytes:
        raise ViolationError(f"the accounting does not add up: {load}")


class _DamagingProxy:
    """A prefill node that asks another one, and damages what comes back most of the time."""

    def __init__(self, upstream: grpc.aio.Channel) -> None:
        self._upstream = upstream
        self.random = Random(0)
        self._server = grpc.aio.server()
        self._server.add_generic_rpc_handlers((_Handlers(self),))

    async def start(self) -> str:
        """Listen; returns host:port."""
        port = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()
        return f"127.0.0.1:{port}"

    async def stop(self) -> None:
        """Stop listening."""
        await self._server.stop(0)

    async def prefill(self, message: bytes, context: object) -> AsyncIterator[bytes]:
        """One hand-off."""
        messages = [frame async for frame in self._upstream.unary_stream(_HANDOFF)(message)]
        for _ in range(self.random.choice((0, 1, 1, 1, 2, 3))):
            messages = damage(self.random, messages)
        for frame in messages:
            yield frame

    def forward(self, method: str):
        """A unary method as the other node answers it."""

        async def forwarded(message: bytes, context: object) -> bytes:
            answer: bytes = await self._upstream.unary_unary(method)(message)
            return answer

        return forwarded


class _Handlers(grpc.GenericRpcHandler):
    def __init__(self, proxy: _DamagingProxy) -> None:
        self._proxy = proxy

    def service(self, handler_call_details: grpc.HandlerCallDetails):
        method = handler_call_details.method
        if method == _HANDOFF:
            return grpc.unary_stream_rpc_method_handler(self._proxy.prefill)
        return grpc.unary_unary_rpc_method_handler(self._proxy.forward(method))
