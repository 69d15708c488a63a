"""The decode node over real gRPC: tokens, bad input, damaged hand-offs, clients that go away.

After every one of them nothing is reserved and the node goes on.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from fluxion_core.config.carriers import Carrier
from fluxion_core.config.settings import ClientSettings, HandoffSettings
from fluxion_core.errors import DrainingError, NonFiniteLogitsError
from fluxion_core.kvstream.handoff import Frame, FrameKind
from fluxion_core.planning.planner_weights import TRAINING_FREE_LEVELS
from fluxion_core.planning.prompt_profile import packed_bytes
from fluxion_core.wire import codec
from fluxion_core.wire.channel import open_channel
from fluxion_core.wire.status import sent_metadata
from fluxion_proto.v1 import generate_pb2, generate_pb2_grpc, handoff_pb2
from services.prefill import engine as prefill_engine
from services.prefill.config import PrefillHandoffSettings
from services.prefill.service import HandoffService

Levels = generate_pb2.QualityLevel


def request_of(text: str = "hello", max_new_tokens: int = 8, **fields):
    sampling = fields.pop("sampling", {})
    request = generate_pb2.GenerateRequest(max_new_tokens=max_new_tokens, **fields)
    if not fields.get("token_ids"):
        request.text = text
    for name, value in sampling.items():
        setattr(request.sampling, name, value)
    return request


async def tokens_of(stub, request) -> list[int]:
    return [token async for response in stub.Generate(request) for token in response.token_ids]


async def failure_of(stub, request, **call) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        async for _ in stub.Generate(request, **call):
            pass
    return failure.value


async def assert_nothing_is_held(stub) -> None:
    """Whoever held memory gives it back; reserved and used go to 0, and the sum stays right."""
    while True:
        load = await stub.GetLoad(generate_pb2.GetLoadRequest())
        parts = (
            load.host_kv_free_bytes,
            load.host_kv_reserved_bytes,
            load.host_kv_used_bytes,
            load.host_kv_cached_bytes,
        )
        assert sum(parts) == load.host_kv_capacity_bytes
        if load.running_requests == 0:
            break
    assert (load.host_kv_reserved_bytes, load.host_kv_used_bytes) == (0, 0)


async def assert_goes_on(stub) -> None:
    await assert_nothing_is_held(stub)
    assert len(await tokens_of(stub, request_of(ignore_eos=True))) == 8
    await assert_nothing_is_held(stub)


async def test_batches_do_not_change_a_sequences_tokens(start_prefill, start_decode, open_stub):
    async with start_prefill() as prefill, start_decode(prefill.address) as node:
        async with open_stub(node.address) as stub:
            requests = [
                request_of("x" * length, max_new_tokens=40, ignore_eos=True)
                for length in (3, 500, 700, 64)
            ]
            alone = [await tokens_of(stub, request) for request in requests]
            together = await asyncio.gather(*(tokens_of(stub, request) for request in requests))
            assert alone == list(together)
            await assert_nothing_is_held(stub)


async def test_sixty_four_streams_get_what_each_gets_alone_though_few_fit_at_a_time(
    start_prefill, start_decode, open_stub
):
    lengths = [20, 150, 40, 900, 60, 300, 1500, 100]
    requests = [
        request_of(f"{number} " + "x" * lengths[number % 8], max_new_tokens=16, ignore_eos=True)
        for number in range(64)
    ]
    async with start_prefill() as prefill:
        async with start_decode(prefill.address) as node, open_stub(node.address) as stub:
            alone = [await tokens_of(stub, request) for request in requests]
        few = {"store_bytes": 3 << 20, "max_running_sequences": 6}
        async with start_decode(prefill.address, **few) as node, open_stub(node.address) as stub:
            together = await asyncio.gather(*(tokens_of(stub, request) for request in requests))
            await assert_nothing_is_held(stub)
    assert list(together) == alone
    assert {len(tokens) for tokens in alone} == {16}


async def test_two_decode_nodes_share_two_prefill_nodes(start_prefill, start_decode, open_stub):
    requests = [
        request_of(f"{number} " + "x" * 400, max_new_tokens=6, ignore_eos=True)
        for number in range(8)
    ]
    async with start_prefill() as one, start_prefill() as other:
        both = (one.address, other.address)
        async with start_decode(*both) as first, start_decode(*both) as second:
            async with open_stub(first.address) as stub, open_stub(second.address) as other_stub:
                answers = await asyncio.gather(
                    *(tokens_of(node, one) for node in (stub, other_stub) for one in requests)
                )
                await assert_nothing_is_held(stub)
                await assert_nothing_is_held(other_stub)
    assert answers[:8] == answers[8:]


async def test_sampling_with_a_seed_repeats_and_without_one_varies(
    start_prefill, start_decode, open_stub
):
    async with start_prefill() as prefill, start_decode(prefill.address) as node:
        async with open_stub(node.address) as stub:
            hot = {"temperature": 2.0}
            seeded = request_of(max_new_tokens=30, sampling={**hot, "seed": 5}, ignore_eos=True)
            assert await tokens_of(stub, seeded) == await tokens_of(stub, seeded)
            free = request_of(max_new_tokens=30, sampling=hot, ignore_eos=True)
            assert await tokens_of(stub, free) != await tokens_of(stub, free)


async def test_a_stop_string_ends_the_text_before_it(start_prefill, start_decode, open_stub):
    async with start_prefill() as prefill, start_decode(prefill.address) as node:
        async with open_stub(node.address) as stub:
            sampling = {"temperature": 2.0, "seed": 1}
            free = request_of(max_new_tokens=60, sampling=sampling, ignore_eos=True)
            text = "".join([r.text async for r in stub.Generate(free)])
            stop = text[20:23]
            request = request_of(
                max_new_tokens=60, sampling=sampling, ignore_eos=True, stop_strings=[stop]
            )
            responses = [r async for r in stub.Generate(request)]
            assert "".join(r.text for r in responses) == text[: text.index(stop)]
            assert responses[-1].finish_reason == generate_pb2.FINISH_REASON_STOP
            token = responses[0].token_ids[0]
            one = request_of(sampling=sampling, ignore_eos=True, stop_token_ids=[token])
            assert len(await tokens_of(stub, one)) == 1
            await assert_nothing_is_held(stub)


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (generate_pb2.GenerateRequest(), "no prompt"),
        (generate_pb2.GenerateRequest(text=""), "empty"),
        (generate_pb2.GenerateRequest(token_ids={"ids": []}), "empty"),
        (generate_pb2.GenerateRequest(token_ids={"ids": [1, 300]}), "300"),
        (request_of("x" * 2100), "2048"),
        (request_of("x" * 2000, max_new_tokens=100), "2048"),
        (request_of(max_new_tokens=0), "max_new_tokens"),
        (request_of(sampling={"temperature": -1.0}), "temperature"),
        (request_of(sampling={"temperature": math.nan}), "temperature"),
        (request_of(sampling={"top_p": 0.0}), "top_p"),
        (request_of(sampling={"top_p": math.inf}), "top_p"),
        (request_of(sampling={"min_p": -0.5}), "min_p"),
        (request_of(sampling={"repetition_penalty": 0.0}), "repetition_penalty"),
        (request_of(sampling={"presence_penalty": 3.0}), "presence_penalty"),
        (request_of(sampling={"frequency_penalty": math.nan}), "frequency_penalty"),
        (request_of(policy="threshold(-1)"), "above 0"),
        (request_of(policy="fixed(17, 5 %)"), "block size 17"),
        (request_of(policy=""), "one of: exact"),
        (request_of(policy="x" * 65), "64 characters"),
        (request_of(policy="exact", quality=Levels.QUALITY_LEVEL_FAST), "exclude each other"),
        (request_of(quality=77), "77"),
        (request_of(priority=9), "priority is 9"),
        (request_of(stop_strings=[""]), "stop string"),
        (request_of(stop_strings=["x"] * 17), "stop_strings"),
        (request_of(request_id="x" * 129), "request_id"),
        (request_of(cache_salt="x" * 257), "cache_salt has 257 characters; at most 256"),
        (generate_pb2.GenerateRequest(chat={"messages": []}), "chat template"),
    ],
)
async def test_bad_requests_get_a_status_and_a_sentence(
    start_decode, open_stub, request_, words: str
):
    # No prefill node: a bad request is refused before one would be asked.
    async with start_decode() as node, open_stub(node.address) as stub:
        failure = await failure_of(stub, request_)
        assert failure.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert words in failure.details()
        await assert_nothing_is_held(stub)


async def test_a_request_larger_than_the_store_is_refused_with_both_sizes(start_decode, open_stub):
    async with start_decode(store_bytes=1 << 18) as node, open_stub(node.address) as stub:
        failure = await failure_of(stub, request_of("x" * 2000))
        assert failure.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "need" in failure.details()
        assert "free" in failure.details()
        await assert_nothing_is_held(stub)


async def test_requests_wait_for_room_in_order_and_too_many_are_refused(
    start_prefill, start_decode, open_stub
):
    async with (
        start_prefill() as prefill,
        start_decode(prefill.address, max_running_sequences=1, max_waiting_requests=1) as node,
        open_stub(node.address) as stub,
    ):
        request = request_of(max_new_tokens=1000, ignore_eos=True)
        first = asyncio.ensure_future(tokens_of(stub, request))
        second = asyncio.ensure_future(tokens_of(stub, request))
        while True:
            load = await stub.GetLoad(generate_pb2.GetLoadRequest())
            if (load.running_requests, load.waiting_requests) == (1, 1):
                break
        failure = await failure_of(stub, request)
        assert failure.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert len(await first) == len(await second) == 1000
        await assert_goes_on(stub)


async def test_without_a_prefill_node_the_client_is_told(start_decode, open_stub, free_port):
    async with start_decode() as node, open_stub(node.address) as stub:
        failure = await failure_of(stub, request_of())
        assert failure.code() is grpc.StatusCode.UNAVAILABLE
        assert "--prefill-addresses" in failure.details()
    gone = f"127.0.0.1:{free_port}"
    async with start_decode(gone) as node, open_stub(node.address) as stub:
        failure = await failure_of(stub, request_of())
        assert failure.code() is grpc.StatusCode.UNAVAILABLE
        assert gone in failure.details()
        await assert_nothing_is_held(stub)


async def test_another_prefill_node_takes_over(start_prefill, start_decode, open_stub, free_port):
    async with (
        start_prefill() as prefill,
        start_decode(f"127.0.0.1:{free_port}", prefill.address) as node,
        open_stub(node.address) as stub,
    ):
        await assert_goes_on(stub)
        await assert_goes_on(stub)


async def test_a_prefill_node_with_another_model_is_refused(
    make_toy_model: Callable[[int], Path], start_prefill, start_decode, open_stub
):
    async with (
        start_prefill(model=make_toy_model(1)) as prefill,
        start_decode(prefill.address) as node,
        open_stub(node.address) as stub,
    ):
        failure = await failure_of(stub, request_of())
        assert failure.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert f"prefill node {prefill.address} and this node do not match" in failure.details()
        assert "revision_hash" in failure.details()
        await assert_nothing_is_held(stub)


NO_GRPC = PrefillHandoffSettings(ways=(Carrier.SOCKETS,))
BY_GRPC = HandoffSettings(ways=(Carrier.GRPC,))


async def test_a_prefill_node_that_does_not_match_is_passed_over(
    make_toy_model: Callable[[int], Path], start_prefill, start_decode, open_stub, caplog
):
    async with (
        start_prefill(handoff=NO_GRPC) as no_way,
        start_prefill(model=make_toy_model(1)) as another_model,
        start_prefill() as good,
        start_decode(no_way.address, another_model.address, good.address, handoff=BY_GRPC) as node,
        open_stub(node.address) as stub,
    ):
        # Each of the three is first once.
        for _ in range(3):
            await assert_goes_on(stub)
        await assert_nothing_is_held(stub)
    for address, reason in ((no_way.address, "no way for KV"), (another_model.address, "layout")):
        assert any(
            f"node={address}" in line and reason in line
            for line in caplog.text.splitlines()
            if "hand-off failed" in line
        )


async def test_where_no_prefill_node_matches_the_client_is_told_of_each(
    make_toy_model: Callable[[int], Path], start_prefill, start_decode, open_stub, free_port
):
    gone = f"127.0.0.1:{free_port}"
    async with (
        start_prefill(handoff=NO_GRPC) as no_way,
        start_prefill(model=make_toy_model(1)) as another_model,
        start_decode(no_way.address, another_model.address, handoff=BY_GRPC) as node,
        start_decode(no_way.address, gone, handoff=BY_GRPC) as poorer,
        open_stub(node.address) as stub,
        open_stub(poorer.address) as other,
    ):
        failure = await failure_of(stub, request_of())
        assert failure.code() is grpc.StatusCode.FAILED_PRECONDITION
        for words in (no_way.address, "set handoff.ways", another_model.address, "revision_hash"):
            assert words in failure.details()
        await assert_nothing_is_held(stub)
        # One that may come back: trying again may help.
        failure = await failure_of(other, request_of())
        assert failure.code() is grpc.StatusCode.UNAVAILABLE
        for words in (no_way.address, "set handoff.ways", gone):
            assert words in failure.details()
        await assert_nothing_is_held(other)


async def test_a_connection_that_breaks_before_anything_came_is_made_again(
    start_prefill, start_decode, open_stub
):
    class BreaksOnce(Tampered):
        async def prefill(self, message, context):
            if not self.requests:
                self.requests.append(handoff_pb2.HandoffRequest.FromString(message))
                await context.abort(grpc.StatusCode.UNAVAILABLE, "broken")
            async for frame in super().prefill(message, context):
                yield frame

    async with (
        start_prefill() as prefill,
        serving(BreaksOnce(prefill.address, lambda frames: frames)) as (proxy, address),
        start_decode(address) as node,
        open_stub(node.address) as stub,
    ):
        assert len(await tokens_of(stub, request_of(ignore_eos=True))) == 8
        assert len(proxy.requests) == 2
        await assert_nothing_is_held(stub)


async def test_a_node_that_answers_that_it_takes_no_work_is_not_asked_twice(
    start_prefill, start_decode, open_stub
):
    class Draining(Tampered):
        async def prefill(self, message, context):
            self.requests.append(handoff_pb2.HandoffRequest.FromString(message))
            sent = (sent_metadata(DrainingError()),)
            await context.abort(grpc.StatusCode.UNAVAILABLE, "this node is draining", sent)
            yield b""

    async with (
        start_prefill() as prefill,
        serving(Draining(prefill.address, lambda frames: frames)) as (proxy, address),
        start_decode(address) as node,
        open_stub(node.address) as stub,
    ):
        failure = await failure_of(stub, request_of())
        assert failure.code() is grpc.StatusCode.UNAVAILABLE
        assert "this node is draining" in failure.details()
        assert len(proxy.requests) == 1


GROUPS = 2 * 2
"""KV heads of all layers of the toy model."""


async def usage_of(stub, request) -> generate_pb2.Usage:
    return [response async for response in stub.Generate(request)][-1].usage


@pytest.mark.parametrize(
    ("asked", "policy"),
    [
        ({}, "exact"),
        ({"quality": Levels.QUALITY_LEVEL_ACCURATE}, TRAINING_FREE_LEVELS["ACCURATE"]),
        ({"quality": Levels.QUALITY_LEVEL_BALANCED}, TRAINING_FREE_LEVELS["BALANCED"]),
        ({"quality": Levels.QUALITY_LEVEL_FAST}, TRAINING_FREE_LEVELS["FAST"]),
        ({"policy": "fixed(16, 5 %)"}, "fixed(16, 5 %)"),
        ({"policy": " threshold( 0.3 )"}, "threshold(0.3)"),
        ({"policy": "marginal(0.01)"}, "marginal(0.01)"),
    ],
)
async def test_usage_says_what_was_read_by_which_policy(
    start_prefill, start_decode, open_stub, asked: dict, policy: str
):
    async with start_prefill() as prefill, start_decode(prefill.address) as node:
        async with open_stub(node.address) as stub:
            request = request_of("long " * 200, max_new_tokens=9, ignore_eos=True, **asked)
            usage = await usage_of(stub, request)
            await assert_nothing_is_held(stub)
    reads = usage.kv_reads
    assert reads.policy == policy
    # By hand: 8 steps; the region begins at 64 and ends a block above the last 256 tokens, at 736
    # or 752; a token has 256 B of KV in both layers and heads.
    assert sum(reads.groups_by_block_size) + reads.groups_nothing + reads.groups_everything == (
        8 * GROUPS
    )
    both = reads.scanned_bytes_per_token + reads.attended_bytes_per_token
    assert both == pytest.approx(usage.kv_bytes_read_per_token)
    region_bytes = both / reads.share_of_exact
    assert 256 * (736 - 64) <= region_bytes <= 256 * (752 - 64)
    if policy == "exact":
        assert (reads.share_of_exact, reads.groups_everything) == (1, 8 * GROUPS)
        assert reads.scanned_bytes_per_token == reads.streaming_share == 0
    else:
        assert reads.share_of_exact < 1
    if policy.startswith("fixed"):
        # 3 of 43 blocks are a little more than 5 %, and the union is modelled, not counted.
        assert reads.share_of_fixed_estimate == pytest.approx(1, rel=0.5)
        assert list(reads.groups_by_block_size) == [8 * GROUPS, 0, 0, 0]


async def test_a_prompt_without_a_region_reads_none_of_it(start_prefill, start_decode, open_stub):
    async with start_prefill() as prefill, start_decode(prefill.address) as node:
        async with open_stub(node.address) as stub:
            for text in ("a", "a" * 200):
                request = request_of(text, policy="threshold(0.1)", ignore_eos=True)
                reads = (await usage_of(stub, request)).kv_reads
                assert (reads.share_of_exact, reads.share_of_fixed_estimate) == (0, 0)
                assert sum(reads.groups_by_block_size) == reads.groups_nothing == 0


async def test_policies_of_a_batch_do_not_meddle(start_prefill, start_decode, open_stub):
    policies = ("exact", "threshold(0.2)", "marginal(0.003)", "fixed(32, 10 %)", "threshold(0.02)")
    async with start_prefill() as prefill, start_decode(prefill.address) as node:
        async with open_stub(node.address) as stub:
            requests = [
                request_of("word " * (90 + 20 * i), max_new_tokens=20, policy=policy)
                for i, policy in enumerate(policies)
            ]
            for request in requests:
                request.ignore_eos = True
            alone = [await tokens_of(stub, request) for request in requests]
            together = await asyncio.gather(*(tokens_of(stub, request) for request in requests))
            assert alone == list(together)


async def test_a_level_may_be_the_nodes_default(start_prefill, start_decode, open_stub):
    async with (
        start_prefill() as prefill,
        start_decode(prefill.address, default_policy="balanced") as node,
        open_stub(node.address) as stub,
    ):
        info = await stub.GetModelInfo(generate_pb2.GetModelInfoRequest())
        usage = await usage_of(stub, request_of("x" * 600, ignore_eos=True))
        assert usage.kv_reads.policy == info.default_policy == TRAINING_FREE_LEVELS["BALANCED"]


async def test_only_policies_that_need_a_profile_ask_for_one(
    start_prefill, start_decode, open_stub
):
    async with (
        start_prefill() as prefill,
        tampered(prefill.address, lambda frames: frames) as (proxy, address),
        start_decode(address) as node,
        open_stub(node.address) as stub,
    ):
        for policy in ("exact", "fixed(16, 5 %)", "threshold(0.1)"):
            await tokens_of(stub, request_of("x" * 400, policy=policy))
    wanted = [(r.want_prompt_profile, r.sink_tokens, r.recent_tokens) for r in proxy.requests]
    assert wanted == [(False, 0, 0), (False, 0, 0), (True, 64, 256)]
    # The second and third find all but the last slab in the store.
    assert [r.kv_from_token for r in proxy.requests] == [0, 384, 384]


class Tampered:
    """A prefill node whose stream is changed on its way: a proxy in front of a real one."""

    def __init__(self, target: str, change: Callable[[list[bytes]], list[bytes]]) -> None:
        self.target = target
        self.change = change
        self.is_honest = False
        self.requests: list[handoff_pb2.HandoffRequest] = []

    async def prefill(self, message: bytes, context) -> AsyncIterator[bytes]:
        request = handoff_pb2.HandoffRequest.FromString(message)
        self.requests.append(handoff_pb2.HandoffRequest.FromString(message))
        # Here all comes with the call: what comes beside it is in test_data_plane.py.
        request.ways[:] = [handoff_pb2.GRPC]
        async with open_channel(self.target, ClientSettings()) as channel:
            method = channel.unary_stream("/fluxion.v1.Handoff/Prefill")
            call = method(request.SerializeToString())
            frames = [frame async for frame in call]
        for frame in frames if self.is_honest else self.change(frames):
            yield frame


@asynccontextmanager
async def tampered(target: str, change) -> AsyncIterator[tuple[Tampered, str]]:
    async with serving(Tampered(target, change)) as both:
        yield both


@asynccontextmanager
async def serving(proxy: Tampered) -> AsyncIterator[tuple[Tampered, str]]:
    server = grpc.aio.server(options=[("grpc.max_send_message_length", 64 << 20)])
    server.add_generic_rpc_handlers((HandoffService.generic_handler(proxy),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield proxy, f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


def recoded(frame: bytes, **changes) -> bytes:
    old = codec.decode_frame(frame)
    fields = {name: getattr(old, name) for name in Frame.__dataclass_fields__}
    return codec.encode_frame(Frame(**{**fields, **changes}))


def flip_payload(frames: list[bytes]) -> list[bytes]:
    return [*frames[:3], frames[3][:-1] + bytes([frames[3][-1] ^ 1]), *frames[4:]]


def with_profile(frames: list[bytes], profile: bytes) -> list[bytes]:
    trailer = replace(codec.parse_trailer(codec.decode_frame(frames[-1])), prompt_profile=profile)
    return [*frames[:-1], codec.encode_frame(codec.trailer_frame(trailer))]


def with_value(frame: bytes, side: int, value: bytes) -> bytes:
    """A CHUNK of the toy model whose first token has this bfloat16 in K (0) or V (1)."""
    payload = bytearray(codec.decode_frame(frame).payload)
    first = side * 16 * 16 * 2
    payload[first : first + 2] = value
    return recoded(frame, payload=bytes(payload))


PROFILE_BYTES = packed_bytes(num_layers=2, num_heads=4, num_kv_heads=2)
NAN = b"\x00\x00\xc0\x7f"

DAMAGE: dict[str, tuple[Callable[[list[bytes]], list[bytes]], str]] = {
    "wrong checksum": (flip_payload, "CRC32C"),
    "gap": (lambda f: [*f[:3], *f[4:]], "gap"),
    "repeated frame": (lambda f: [*f[:3], f[2], *f[3:]], "repeat"),
    "reordered frames": (lambda f: [f[0], *f[3:5], *f[1:3], *f[5:]], "gap"),
    "no header": (lambda f: f[1:], "HEADER"),
    "second header": (lambda f: [f[0], *f], "HEADER"),
    "no trailer": (lambda f: f[:-1], "TRAILER"),
    "trailer too early": (lambda f: [*f[:4], f[-1]], "holds"),
    "second trailer": (lambda f: [*f, f[-1]], "TRAILER"),
    "cut in the middle": (lambda f: f[: len(f) // 2], "ended"),
    "nothing at all": (lambda f: [], "ended"),
    "not a frame": (lambda f: [f[0], b"garbage", *f[1:]], "shorter"),
    "wrong magic": (lambda f: [f[0], b"X" + f[1][1:], *f[2:]], "begins"),
    "cut frame": (lambda f: [*f[:2], f[2][:-5], *f[3:]], "payload"),
    "unknown layer": (lambda f: [f[0], recoded(f[1], layer=9), *f[2:]], "layer"),
    "beyond the prompt": (lambda f: [*f[:-1], f[-2], f[-1]], "a repeat"),
    "payload of another size": (
        lambda f: [f[0], recoded(f[1], payload=bytes(64)), *f[2:]],
        "payload",
    ),
    "no valid trailer": (
        lambda f: [*f[:-1], codec.encode_frame(Frame(FrameKind.TRAILER, b"\xff\xff"))],
        "TRAILER",
    ),
    "a profile nobody asked for": (lambda f: with_profile(f, bytes(PROFILE_BYTES)), "asked for"),
    "NaN in a key": (lambda f: [f[0], with_value(f[1], 0, b"\xc0\x7f"), *f[2:]], "NaN or inf"),
    "infinite value": (lambda f: [*f[:2], with_value(f[2], 1, b"\x80\xff"), *f[3:]], "NaN or inf"),
    "oversized frame": (lambda f: [f[0], f[1][:32] + bytes(5 << 20), *f[2:]], "oversized"),
}


@pytest.mark.parametrize("damage", DAMAGE)
async def test_damaged_hand_offs_are_data_loss_and_nothing_is_decoded(
    start_prefill, start_decode, open_stub, damage: str
):
    change, words = DAMAGE[damage]
    async with (
        start_prefill() as prefill,
        tampered(prefill.address, change) as (proxy, address),
        start_decode(address) as node,
        open_stub(node.address) as stub,
    ):
        request = request_of("y" * 200, ignore_eos=True)
        failure = await failure_of(stub, request)
        assert failure.code() is grpc.StatusCode.DATA_LOSS
        assert words in failure.details()
        await assert_nothing_is_held(stub)
        # The same prompt, undamaged, is what it should be: nothing of the first try is left.
        proxy.is_honest = True
        healed = await tokens_of(stub, request)
        async with start_decode(prefill.address) as fresh, open_stub(fresh.address) as other:
            assert healed == await tokens_of(other, request)
        await assert_goes_on(stub)


async def test_kv_that_is_not_finite_is_asked_of_another_prefill_node(
    start_prefill, start_decode, open_stub
):
    change, _ = DAMAGE["NaN in a key"]
    requests = [request_of(letter * 200, ignore_eos=True) for letter in "yz"]
    async with (
        start_prefill() as prefill,
        tampered(prefill.address, change) as (bad, bad_address),
        tampered(prefill.address, lambda frames: frames) as (good, good_address),
        start_decode(bad_address, good_address) as node,
        open_stub(node.address) as stub,
        start_decode(prefill.address) as fresh,
        open_stub(fresh.address) as other,
    ):
        for request in requests:
            assert await tokens_of(stub, request) == await tokens_of(other, request)
        # Each of the two was first once.
        assert (len(bad.requests), len(good.requests)) == (1, 2)


async def test_a_first_token_that_one_prefill_node_cannot_draw_another_one_draws(
    start_prefill, start_decode, open_stub, monkeypatch: pytest.MonkeyPatch
):
    draw, drawn = prefill_engine.sample, []

    def failing_first(*arguments, **options):
        drawn.append(None if drawn else NonFiniteLogitsError(math.nan))
        if drawn[-1] is not None:
            raise drawn[-1]
        return draw(*arguments, **options)

    request = request_of("y" * 200, ignore_eos=True)
    async with (
        start_prefill() as one,
        start_prefill() as two,
        start_decode(one.address, two.address) as node,
        open_stub(node.address) as stub,
        start_decode(two.address) as fresh,
        open_stub(fresh.address) as other,
    ):
        expected = await tokens_of(other, request)
        with monkeypatch.context() as patch:
            patch.setattr(prefill_engine, "sample", failing_first)
            assert await tokens_of(stub, request) == expected
        assert len(drawn) == 2


@pytest.mark.parametrize("damage", ["NaN in a key", "infinite value"])
async def test_streams_beside_a_hand_off_that_is_not_finite_say_what_they_say_in_a_quiet_run(
    start_prefill, start_decode, open_stub, damage: str
):
    change, _ = DAMAGE[damage]
    requests = [request_of(letter * 150, max_new_tokens=300, ignore_eos=True) for letter in "abc"]
    bad = request_of("y" * 200, ignore_eos=True)
    async with (
        start_prefill() as prefill,
        tampered(prefill.address, change) as (proxy, address),
        start_decode(address) as node,
        open_stub(node.address) as stub,
        start_decode(prefill.address) as fresh,
        open_stub(fresh.address) as other,
    ):
        proxy.is_honest = True
        quiet = [await tokens_of(other, request) for request in requests]
        calls = [aiter(stub.Generate(request)) for request in requests]
        first = [(await anext(call)).token_ids[0] for call in calls]
        proxy.is_honest = False
        assert (await failure_of(stub, bad)).code() is grpc.StatusCode.DATA_LOSS
        rest = [[token async for one in call for token in one.token_ids] for call in calls]
        assert [[one, *others] for one, others in zip(first, rest, strict=True)] == quiet


@pytest.mark.parametrize(
    ("profile", "words"),
    [
        (b"", "need"),
        (bytes(PROFILE_BYTES - 4), f"need {PROFILE_BYTES}"),
        (bytes(PROFILE_BYTES + 4), f"need {PROFILE_BYTES}"),
        (bytes(PROFILE_BYTES - 4) + NAN, "not finite"),
    ],
)
async def test_damaged_profiles_are_data_loss_and_nothing_is_decoded(
    start_prefill, start_decode, open_stub, profile: bytes, words: str
):
    async with (
        start_prefill() as prefill,
        tampered(prefill.address, lambda f: with_profile(f, profile)) as (proxy, address),
        start_decode(address) as node,
        open_stub(node.address) as stub,
    ):
        request = request_of("y" * 400, ignore_eos=True, policy="threshold(0.1)")
        failure = await failure_of(stub, request)
        assert failure.code() is grpc.StatusCode.DATA_LOSS
        assert words in failure.details()
        proxy.is_honest = True
        assert len(await tokens_of(stub, request)) == 8
        await assert_goes_on(stub)


@pytest.mark.parametrize("after_tokens", [0, 1, 30])
async def test_clients_that_go_away_leave_nothing_behind(
    start_prefill, start_decode, open_stub, after_tokens: int
):
    async with start_prefill() as prefill, start_decode(prefill.address) as node:
        async with open_stub(node.address) as stub:
            request = request_of("z" * 1000, max_new_tokens=1000, ignore_eos=True)
            call = stub.Generate(request)
            responses = aiter(call)
            for _ in range(after_tokens):
                await anext(responses)
            if not after_tokens:
                # In the middle of the hand-off: the request is there, and no token yet.
                while not (await stub.GetLoad(generate_pb2.GetLoadRequest())).running_requests:
                    pass
            call.cancel()
            await assert_goes_on(stub)


async def test_clients_that_vanish_while_waiting_leave_their_place(
    start_prefill, start_decode, open_stub
):
    async with (
        start_prefill() as prefill,
        start_decode(prefill.address, max_running_sequences=1) as node,
        open_stub(node.address) as stub,
    ):
        request = request_of(max_new_tokens=500, ignore_eos=True)
        running = asyncio.ensure_future(tokens_of(stub, request))
        waiting = stub.Generate(request)
        while not (await stub.GetLoad(generate_pb2.GetLoadRequest())).waiting_requests:
            pass
        waiting.cancel()
        while (await stub.GetLoad(generate_pb2.GetLoadRequest())).waiting_requests:
            pass
        assert len(await running) == 500
        await assert_goes_on(stub)


async def test_a_deadline_ends_a_request(start_prefill, start_decode, open_stub):
    async with start_prefill() as prefill, start_decode(prefill.address) as node:
        async with open_stub(node.address) as stub:
            request = request_of("z" * 1000, max_new_tokens=1000, ignore_eos=True)
            failure = await failure_of(stub, request, timeout=0.05)
            assert failure.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            await assert_goes_on(stub)


async def test_a_hand_off_ends_with_the_requests_deadline_on_every_node(
    start_prefill, start_decode, open_stub
):
    class Remembers(Tampered):
        async def prefill(self, message, context):
            seconds_left.append(context.time_remaining())
            if len(seconds_left) == 1:
                await context.abort(grpc.StatusCode.DATA_LOSS, "try another one")
            async for frame in super().prefill(message, context):
                yield frame

    seconds_left: list[float | None] = []
    async with (
        start_prefill() as prefill,
        serving(Remembers(prefill.address, lambda frames: frames)) as (_, one),
        serving(Remembers(prefill.address, lambda frames: frames)) as (_, other),
        start_decode(one, other) as node,
        open_stub(node.address) as stub,
    ):
        async for _ in stub.Generate(request_of(ignore_eos=True), timeout=60):
            pass
        assert len(seconds_left) == 2
        # The wire rounds it up by a little.
        assert all(0 < seconds < 61 for seconds in seconds_left)
        async for _ in stub.Generate(request_of("no deadline", ignore_eos=True)):
            pass
        # Of no deadline the server makes one in some hundred years.
        assert seconds_left[2] is None or seconds_left[2] > 1e8


async def test_who_does_not_read_keeps_neither_memory_nor_place(
    start_prefill, start_decode, open_stub
):
    no_window = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 8192)]
    async with (
        start_prefill() as prefill,
        start_decode(prefill.address, max_running_sequences=1) as node,
        grpc.aio.insecure_channel(node.address, options=no_window) as channel,
        open_stub(node.address) as stub,
    ):
        # More than connections and buffers hold: an id of 128 characters comes with every token.
        request = request_of(max_new_tokens=900, request_id="i" * 128, ignore_eos=True)
        unread = aiter(generate_pb2_grpc.GenerationStub(channel).Generate(request))
        first = await anext(unread)
        await assert_goes_on(stub)
        # What was made is still there for who comes back.
        rest = [response async for response in unread]
        assert len(first.token_ids) + sum(len(one.token_ids) for one in rest) == 900
        assert rest[-1].usage.generated_tokens == 900


async def test_a_step_that_fails_is_an_internal_error_with_a_request_id_only(
    start_prefill, start_decode, open_stub, monkeypatch: pytest.MonkeyPatch
):
    from fluxion_core.decode.host.attention import HostAttention

    def broken(self, layer, query, key, value):
        raise ZeroDivisionError("secret detail")

    async with start_prefill() as prefill, start_decode(prefill.address) as node:
        async with open_stub(node.address) as stub:
            with monkeypatch.context() as patch:
                patch.setattr(HostAttention, "attend", broken)
                failure = await failure_of(stub, request_of(request_id="r-1"))
            assert failure.code() is grpc.StatusCode.INTERNAL
            assert "r-1" in failure.details()
            assert "secret" not in failure.details()
            await assert_goes_on(stub)


async def test_tokenize_and_model_info_tell_the_truth(start_decode, open_stub):
    async with start_decode() as node, open_stub(node.address) as stub:
        answer = await stub.Tokenize(generate_pb2.TokenizeRequest(text="abc"))
        info = await stub.GetModelInfo(generate_pb2.GetModelInfoRequest())
        assert len(answer.token_ids) == 3
        assert (info.context_tokens, info.num_layers, info.vocab_size) == (2048, 2, 256)
        assert info.kv_bytes_per_token == 2 * 2 * 2 * 16 * 2
        assert list(info.quality_levels) == [1, 2, 3, 4]
        policies = {each.level: each.policy for each in info.level_policies}
        assert policies[Levels.QUALITY_LEVEL_EXACT] == info.default_policy == "exact"
        assert policies[Levels.QUALITY_LEVEL_BALANCED] == TRAINING_FREE_LEVELS["BALANCED"]
        assert (info.predictor_mode, info.predictor_fingerprint) == ("training-free", "")


async def test_reflection_lists_the_services(start_decode):
    from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

    async with start_decode() as node, grpc.aio.insecure_channel(node.address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        async for answer in stub.ServerReflectionInfo(iter([request])):
            names = {service.name for service in answer.list_services_response.service}
    assert {"fluxion.v1.Generation", "grpc.health.v1.Health"} <= names
