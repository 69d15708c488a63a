"""`vllm.grpc.engine.VllmEngine` over real gRPC: the same tokens as our own API, refusals by name,
Abort in every phase, and the tokenizer handed out.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import sys
import zipfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from hypothesis import given
from hypothesis import strategies as st
from smg_grpc_proto.generated import common_pb2, vllm_engine_pb2, vllm_engine_pb2_grpc

from fluxion_core.errors import InvalidRequestError
from fluxion_core.generation.tokenizer import Tokenizer
from fluxion_core.wire import codec
from fluxion_proto.v1 import generate_pb2, generate_pb2_grpc
from services.decode.__main__ import import_vllm_api
from services.decode.vllm_api import VllmEngineService
from services.decode.vllm_request import as_generate_request

SERVICE = "vllm.grpc.engine.VllmEngine"
PROMPT = list(b"hello")


@asynccontextmanager
async def engine_stub(address: str) -> AsyncIterator[vllm_engine_pb2_grpc.VllmEngineStub]:
    async with grpc.aio.insecure_channel(address) as channel:
        yield vllm_engine_pb2_grpc.VllmEngineStub(channel)


def request_of(
    *, request_id: str = "", stream: bool = False, token_ids: list[int] = PROMPT, **params
) -> vllm_engine_pb2.GenerateRequest:
    """Greedy and past the end of text, unless told otherwise."""
    params = {"temperature": 0.0, "max_tokens": 8, "ignore_eos": True} | params
    return vllm_engine_pb2.GenerateRequest(
        request_id=request_id,
        tokenized=vllm_engine_pb2.TokenizedInput(input_ids=token_ids),
        sampling_params=vllm_engine_pb2.SamplingParams(**params),
        stream=stream,
    )


async def complete_of(stub, request) -> vllm_engine_pb2.GenerateComplete:
    """The one message of a request that does not stream."""
    (response,) = [response async for response in stub.Generate(request)]
    assert response.HasField("complete")
    return response.complete


async def failure_of(call) -> grpc.aio.AioRpcError:
    async def ended() -> None:
        if not hasattr(call, "__aiter__"):
            await call
            return
        async for _ in call:
            pass

    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await ended()
    return failure.value


async def own_tokens(address: str, max_new_tokens: int) -> list[int]:
    """What our own API makes of the same prompt."""
    request = generate_pb2.GenerateRequest(
        token_ids=generate_pb2.TokenIds(ids=PROMPT), max_new_tokens=max_new_tokens, ignore_eos=True
    )
    async with grpc.aio.insecure_channel(address) as channel:
        stub = generate_pb2_grpc.GenerationStub(channel)
        return [token async for response in stub.Generate(request) for token in response.token_ids]


async def load_of(stub) -> vllm_engine_pb2.SchedulerLoad:
    (load,) = (await stub.GetLoads(vllm_engine_pb2.GetLoadsRequest())).loads
    return load


async def wait_until_nothing_is_held(stub) -> None:
    while (await load_of(stub)).num_total_reqs:
        pass
    assert (await load_of(stub)).num_used_tokens == 0


@pytest.fixture
async def node(start_prefill: Callable, start_decode: Callable):
    async with start_prefill() as prefill, start_decode(prefill.address) as node:
        yield node


async def test_tokens_are_those_of_our_own_api_streamed_or_not(node):
    expected = await own_tokens(node.address, 8)
    async with engine_stub(node.address) as stub:
        complete = await complete_of(stub, request_of())
        assert list(complete.output_ids) == expected
        *chunks, last = [response async for response in stub.Generate(request_of(stream=True))]
    assert [list(response.chunk.token_ids) for response in chunks] == [
        [token] for token in expected
    ]
    assert {response.chunk.prompt_tokens for response in chunks} == {len(PROMPT)}
    assert sum(response.chunk.completion_tokens for response in chunks) == len(expected)
    for end in (complete, last.complete):
        assert end.finish_reason == "length"
        assert (end.prompt_tokens, end.completion_tokens) == (len(PROMPT), len(expected))
    assert not last.complete.output_ids


async def test_a_text_is_tokenized_by_the_node(node):
    request = request_of()
    request.text = bytes(PROMPT).decode()
    async with engine_stub(node.address) as stub:
        assert (await complete_of(stub, request)).prompt_tokens == len(PROMPT)


async def test_a_prompt_that_the_store_holds_counts_as_cached(node):
    prompt = list(b"x" * 300)
    async with engine_stub(node.address) as stub:
        assert (await complete_of(stub, request_of(token_ids=prompt))).cached_tokens == 0
        assert (await complete_of(stub, request_of(token_ids=prompt))).cached_tokens > 0


async def test_a_stop_token_or_string_ends_it_and_is_named(node):
    tokens = await own_tokens(node.address, 8)
    async with engine_stub(node.address) as stub:
        by_token = await complete_of(stub, request_of(stop_token_ids=[tokens[2]]))
        assert list(by_token.output_ids) == tokens[: tokens.index(tokens[2]) + 1]
        assert (by_token.finish_reason, by_token.matched_token_id) == ("stop", tokens[2])
        request = generate_pb2.GenerateRequest(
            token_ids=generate_pb2.TokenIds(ids=PROMPT), max_new_tokens=8, ignore_eos=True
        )
        async with grpc.aio.insecure_channel(node.address) as channel:
            answers = generate_pb2_grpc.GenerationStub(channel).Generate(request)
            text = "".join([answer.text async for answer in answers])
        by_text = await complete_of(stub, request_of(stop=[text[1]]))
        assert (by_text.finish_reason, by_text.matched_stop_str) == ("stop", text[1])
        assert len(by_text.output_ids) < len(tokens)


async def test_the_same_seed_gives_the_same_tokens_negative_ones_too(node):
    async with engine_stub(node.address) as stub:
        for seed in (7, -7):
            request = request_of(temperature=1.0, seed=seed)
            first = await complete_of(stub, request)
            assert list(first.output_ids) == list((await complete_of(stub, request)).output_ids)


async def test_left_out_sampling_values_change_nothing(node):
    # Zeros stand for "not given"; a top_p of 0 would be refused.
    expected = await own_tokens(node.address, 8)
    zeros = {"top_p": 0.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 0.0, "n": 0}
    async with engine_stub(node.address) as stub:
        assert list((await complete_of(stub, request_of(**zeros))).output_ids) == expected


@pytest.mark.parametrize(
    ("params", "sentence"),
    [
        ({"n": 2}, "n = 2"),
        ({"logprobs": 0}, "logprobs"),
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
        ({"logit_bias": {5: 1.0}}, "logit_bias"),
        ({"truncate_prompt_tokens": 3}, "truncate_prompt_tokens"),
        ({"min_tokens": 3, "ignore_eos": False}, "min_tokens"),
        ({"json_schema": "{}"}, "structured output (json_schema)"),
        ({"regex": "a+"}, "structured output (regex)"),
        ({"max_tokens": 0}, "max_new_tokens is 0"),
        ({"max_tokens": 5000}, "exceeds the context"),
        ({"temperature": -1.0}, "temperature"),
        ({"stop": [""]}, "stop string"),
        ({"token_ids": []}, "empty"),
        ({"token_ids": [256]}, "256"),
    ],
)
async def test_what_cannot_be_is_refused_by_name_and_not_to_be_retried(node, params, sentence):
    async with engine_stub(node.address) as stub:
        failure = await failure_of(stub.Generate(request_of(**params)))
        assert failure.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert sentence in failure.details()
        await wait_until_nothing_is_held(stub)


@pytest.mark.parametrize(
    "fields",
    [
        {"mm_inputs": vllm_engine_pb2.MultimodalInputs()},
        {"extra_mm_inputs": [vllm_engine_pb2.MultimodalInputs()]},
        {"media_refs": vllm_engine_pb2.MediaRefs()},
        {"kv_transfer_params_json": "{}"},
        {"data_parallel_rank": 1},
    ],
    ids=lambda fields: next(iter(fields)),
)
async def test_what_another_engine_would_take_beside_the_prompt_is_refused(node, fields):
    request = request_of()
    request.MergeFrom(vllm_engine_pb2.GenerateRequest(**fields))
    async with engine_stub(node.address) as stub:
        failure = await failure_of(stub.Generate(request))
    assert failure.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert next(iter(fields)) in failure.details()


ANY_FLOAT = st.floats(width=32)
ANY_PARAMS = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(("temperature", "top_p", "min_p", "repetition_penalty"), ANY_FLOAT),
        **dict.fromkeys(("frequency_penalty", "presence_penalty"), ANY_FLOAT),
        **dict.fromkeys(("top_k", "max_tokens", "min_tokens", "n"), st.integers(0, 2**32 - 1)),
        "seed": st.integers(-(2**31), 2**31 - 1),
        "stop": st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=5)),
        "stop_token_ids": st.lists(st.integers(0, 2**32 - 1)),
        "ignore_eos": st.booleans(),
    },
)


@given(params=ANY_PARAMS)
def test_any_numbers_make_a_request_or_a_refusal(params):
    message = vllm_engine_pb2.GenerateRequest(
        sampling_params=vllm_engine_pb2.SamplingParams(**params)
    )
    try:
        request = as_generate_request(message, context_tokens=99)
        sampling = codec.sampling_from_proto(request.sampling)
    except InvalidRequestError:
        return
    assert sampling.temperature == message.sampling_params.temperature or (
        "temperature" not in params and sampling.temperature == 1.0
    )
    assert sampling.seed % 2**32 == params.get("seed", 0) % 2**32


async def test_min_tokens_are_made_where_nothing_but_the_length_can_end_it(node):
    async with engine_stub(node.address) as stub:
        complete = await complete_of(stub, request_of(min_tokens=8))
    assert complete.completion_tokens == 8


async def test_lack_of_room_and_of_prefill_nodes_are_to_be_retried(
    start_prefill, start_decode, find_free_address
):
    async with start_decode(find_free_address()) as node, engine_stub(node.address) as stub:
        failure = await failure_of(stub.Generate(request_of()))
        assert failure.code() is grpc.StatusCode.UNAVAILABLE
    async with start_prefill() as prefill:
        options = {"max_running_sequences": 1, "max_waiting_requests": 0}
        async with start_decode(prefill.address, **options) as node:
            async with engine_stub(node.address) as stub:
                running = stub.Generate(request_of(max_tokens=1500, stream=True))
                await running.read()
                failure = await failure_of(stub.Generate(request_of()))
                assert failure.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
                running.cancel()
                await wait_until_nothing_is_held(stub)


async def test_abort_ends_a_running_request_and_one_that_waits(start_prefill, start_decode):
    async with start_prefill() as prefill:
        async with start_decode(prefill.address, max_running_sequences=1) as node:
            async with engine_stub(node.address) as stub:
                running = stub.Generate(
                    request_of(request_id="running", max_tokens=1500, stream=True)
                )
                responses = aiter(running)
                assert (await anext(responses)).HasField("chunk")
                waiting = asyncio.ensure_future(complete_of(stub, request_of(request_id="waiting")))
                while not (await load_of(stub)).num_waiting_reqs:
                    pass
                load = await load_of(stub)
                assert (load.num_running_reqs, load.num_total_reqs) == (1, 2)
                assert load.num_used_tokens >= 1500
                assert 0 < load.token_usage < 1
                await stub.Abort(vllm_engine_pb2.AbortRequest(request_ids=["waiting", "unknown"]))
                aborted = await waiting
                assert (aborted.finish_reason, aborted.completion_tokens) == ("abort", 0)
                await stub.Abort(vllm_engine_pb2.AbortRequest(request_ids=["running"]))
                *chunks, last = [response async for response in responses]
                assert last.complete.finish_reason == "abort"
                assert last.complete.completion_tokens == 1 + len(chunks) < 1500
                await wait_until_nothing_is_held(stub)
                assert (await complete_of(stub, request_of())).completion_tokens == 8


async def test_a_client_that_goes_away_frees_its_memory(node):
    async with engine_stub(node.address) as stub:
        async with engine_stub(node.address) as leaving:
            call = leaving.Generate(request_of(max_tokens=1500, stream=True))
            await call.read()
        await wait_until_nothing_is_held(stub)


async def test_only_the_same_client_can_abort_a_request():
    class NeverEnding:
        def __init__(self) -> None:
            self.ended: list[str] = []

        async def run(self, asked, context):
            request_id = asked.read_message().request_id
            try:
                await asyncio.Event().wait()
                yield
            finally:
                self.ended.append(request_id)

    generation = NeverEnding()
    service = VllmEngineService(
        generation,
        SimpleNamespace(loaded=SimpleNamespace(config=SimpleNamespace(context_tokens=99))),
        *(None, None),
        max_running=1,
        callers=SimpleNamespace(client_of=lambda context: context.client),
    )
    mine, other = SimpleNamespace(client="mine"), SimpleNamespace(client="other")
    responses = service.Generate(request_of(request_id="same"), mine)
    answer = asyncio.ensure_future(anext(responses))
    await asyncio.sleep(0)
    abort = vllm_engine_pb2.AbortRequest(request_ids=["same"])
    await service.Abort(abort, other)
    assert not generation.ended
    with pytest.raises(InvalidRequestError, match="at most 1024 at a time"):
        await service.Abort(vllm_engine_pb2.AbortRequest(request_ids=["x"] * 1025), mine)
    await service.Abort(abort, mine)
    await service.Abort(abort, mine)
    assert (await answer).complete.finish_reason == "abort"
    assert generation.ended == ["same"]
    # A caller that cancels is not taken for one that aborts.
    responses = service.Generate(request_of(request_id="same"), mine)
    answer = asyncio.ensure_future(anext(responses))
    await asyncio.sleep(0)
    answer.cancel()
    with pytest.raises(asyncio.CancelledError):
        await answer
    assert generation.ended == ["same", "same"]


async def test_model_and_server_are_described(node):
    async with engine_stub(node.address) as stub:
        assert (await stub.HealthCheck(vllm_engine_pb2.HealthCheckRequest())).healthy
        info = await stub.GetModelInfo(vllm_engine_pb2.GetModelInfoRequest())
        assert info.is_generation
        assert (info.max_context_length, info.vocab_size) == (2048, 256)
        server = await stub.GetServerInfo(vllm_engine_pb2.GetServerInfoRequest())
        assert (server.server_type, server.data_parallel_size) == ("fluxion", 1)
        load = await load_of(stub)
        assert load.max_running_requests == server.max_num_seqs > 0
        assert load.max_total_num_tokens > 0


async def test_the_tokenizer_handed_out_is_the_nodes(node, toy_model_path: Path, tmp_path: Path):
    async with engine_stub(node.address) as stub:
        calls = [stub.GetTokenizer(common_pb2.GetTokenizerRequest()) for _ in range(2)]
        chunks, again = [[chunk async for chunk in call] for call in calls]
    archive = b"".join(chunk.data for chunk in chunks)
    assert archive == b"".join(chunk.data for chunk in again)
    assert [chunk.sha256 for chunk in chunks] == [
        *("" for _ in chunks[1:]),
        hashlib.sha256(archive).hexdigest(),
    ]
    with zipfile.ZipFile(io.BytesIO(archive)) as files:
        files.extractall(tmp_path)
    assert Tokenizer.load(tmp_path).fingerprint == Tokenizer.load(toy_model_path).fingerprint


async def test_what_is_not_offered_is_unimplemented(node):
    async with engine_stub(node.address) as stub:
        calls = [
            stub.SubscribeKvEvents(common_pb2.SubscribeKvEventsRequest()),
            stub.Embed(vllm_engine_pb2.EmbedRequest()),
            stub.FlushCache(common_pb2.FlushCacheRequest()),
            stub.StartProfile(common_pb2.StartProfileRequest()),
            stub.StopProfile(common_pb2.StopProfileRequest()),
        ]
        for call in calls:
            failure = await failure_of(call)
            assert failure.code() is grpc.StatusCode.UNIMPLEMENTED
            assert failure.details()


async def test_reflection_lists_the_service_and_describes_it(node):
    async with grpc.aio.insecure_channel(node.address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        requests = [
            reflection_pb2.ServerReflectionRequest(list_services=""),
            reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE),
        ]
        listed, described = [answer async for answer in stub.ServerReflectionInfo(iter(requests))]
    assert SERVICE in {service.name for service in listed.list_services_response.service}
    assert described.file_descriptor_response.file_descriptor_proto


class NotInstalled:
    """Finds no smg_grpc_proto, as where it is not installed."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] == "smg_grpc_proto":
            raise ModuleNotFoundError(name="smg_grpc_proto")


def test_without_its_messages_the_node_serves_its_own_api_alone(monkeypatch: pytest.MonkeyPatch):
    import services.decode

    assert import_vllm_api() is not None
    for name in list(sys.modules):
        if name.startswith("services.decode.vllm_"):
            monkeypatch.delitem(sys.modules, name)
            monkeypatch.delattr(services.decode, name.rpartition(".")[2])
        elif name.partition(".")[0] == "smg_grpc_proto":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [NotInstalled, *sys.meta_path])
    assert import_vllm_api() is None
