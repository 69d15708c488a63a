"""Turns of a session on one node: what is stored is used again, and tokens are a fresh node's."""

from __future__ import annotations

import asyncio
import logging

import grpc
import pytest

from fluxion_core.decode.host.step import HostStep
from fluxion_proto.v1 import generate_pb2

TURNS = ([*range(3, 203)], [7, 9, 11, *range(40, 70)], [5] * 21, [*range(250, 0, -1)])
"""What each turn adds, in tokens of the toy model."""

NEW_TOKENS = 30


def request_of(token_ids: list[int], **fields) -> generate_pb2.GenerateRequest:
    fields = {"max_new_tokens": NEW_TOKENS, "ignore_eos": True, **fields}
    request = generate_pb2.GenerateRequest(**fields)
    request.token_ids.ids.extend(token_ids)
    return request


async def answer_of(stub, request) -> tuple[list[int], generate_pb2.Usage]:
    responses = [response async for response in stub.Generate(request)]
    return [token for each in responses for token in each.token_ids], responses[-1].usage


async def talk(
    stub, turns=TURNS, **fields
) -> list[tuple[list[int], list[int], generate_pb2.Usage]]:
    """A session: prompt, answer and usage of each turn."""
    said: list[int] = []
    session = []
    for added in turns:
        prompt = [*said, *added]
        answer, usage = await answer_of(stub, request_of(prompt, **fields))
        session.append((prompt, answer, usage))
        said = [*prompt, *answer]
    return session


async def store_bytes(stub) -> generate_pb2.GetLoadResponse:
    """The load, once nobody holds anything any more."""
    while (load := await stub.GetLoad(generate_pb2.GetLoadRequest())).running_requests:
        pass
    assert (load.host_kv_reserved_bytes, load.host_kv_used_bytes) == (0, 0)
    assert load.host_kv_free_bytes + load.host_kv_cached_bytes == load.host_kv_capacity_bytes
    return load


async def fresh_answers(start_decode, open_stub, prefill, prompts, **fields) -> list[list[int]]:
    """What nodes that have seen nothing say, prompts computed by the prefill node."""
    answers = []
    for prompt in prompts:
        async with start_decode(prefill.address) as node, open_stub(node.address) as stub:
            answers.append((await answer_of(stub, request_of(prompt, **fields)))[0])
    return answers


async def test_a_session_without_a_prefill_node_says_what_fresh_nodes_say(
    start_prefill, start_decode, open_stub
):
    async with start_decode(local_prefill_tokens=256) as node, open_stub(node.address) as stub:
        session = await talk(stub)
        await store_bytes(stub)
    async with start_prefill() as prefill:
        prompts = [prompt for prompt, _, _ in session]
        expected = await fresh_answers(start_decode, open_stub, prefill, prompts)
    assert [answer for _, answer, _ in session] == expected
    cached = [usage.cached_tokens for _, _, usage in session]
    # By hand: all that was said before, but the last token of the answer, whose KV nobody stored.
    assert cached == [0, 229, 229 + 1 + 33 + 29, 229 + 1 + 33 + 29 + 1 + 21 + 29]
    for prompt, _, usage in session:
        assert usage.prompt_tokens == len(prompt)
        assert usage.local_prompt_tokens == len(prompt) - usage.cached_tokens
        assert usage.handoff_bytes == 0
        assert usage.prefill_seconds > 0


async def test_a_long_new_part_comes_from_a_prefill_node_that_sends_only_that(
    start_prefill, start_decode, open_stub
):
    async with start_prefill() as prefill:
        async with start_decode(prefill.address) as node, open_stub(node.address) as stub:
            session = await talk(stub)
            await store_bytes(stub)
        prompts = [prompt for prompt, _, _ in session]
        expected = await fresh_answers(start_decode, open_stub, prefill, prompts)
    assert [answer for _, answer, _ in session] == expected
    # Down to a whole block of 16: 229, 292 and 343 are stored.
    assert [usage.cached_tokens for _, _, usage in session] == [0, 224, 288, 336]
    for prompt, _, usage in session:
        blocks = -(-len(prompt) // 16) - usage.cached_tokens // 16
        assert usage.handoff_bytes == blocks * 16 * 256
        assert usage.local_prompt_tokens == 0


@pytest.mark.parametrize("policy", ["fixed(16, 10 %)", "threshold(0.3)"])
async def test_sessions_at_a_level_go_on_from_their_own_kv(
    start_prefill, start_decode, open_stub, policy: str
):
    turns = ([*range(3, 203)] * 3, [7, 9, 11, *range(40, 70)])
    async with (
        start_prefill() as prefill,
        start_decode(prefill.address, local_prefill_tokens=256) as node,
        open_stub(node.address) as stub,
    ):
        _, (prompt, _, usage) = await talk(stub, turns, policy=policy)
        assert usage.cached_tokens == 629
        assert usage.local_prompt_tokens == 34
        assert usage.kv_reads.share_of_exact < 1
        # Exact sees only what is exact: full slabs of the first prompt's 600 tokens. Its own, of
        # 640, are then everybody's.
        for other, cached in (("exact", 512), ("fixed(32, 10 %)", 640)):
            _, seen = await answer_of(stub, request_of(prompt, policy=other))
            assert seen.cached_tokens == cached
        await store_bytes(stub)


async def test_a_short_answer_at_a_level_is_exact_and_everybodys(start_decode, open_stub):
    # Without a region every policy reads everything.
    async with start_decode(local_prefill_tokens=256) as node, open_stub(node.address) as stub:
        _, (prompt, first, _) = await talk(stub, TURNS[:2], policy="fixed(16, 10 %)")
        answer, usage = await answer_of(stub, request_of([*prompt, *first, 1], policy="exact"))
        assert usage.cached_tokens == len(prompt) + len(first) - 1
        assert len(answer) == NEW_TOKENS


async def test_sessions_beside_each_other_and_beside_streams_get_what_they_get_alone(
    start_decode, open_stub
):
    async with start_decode(local_prefill_tokens=256) as node, open_stub(node.address) as stub:
        sessions = [[[start, *added] for added in TURNS] for start in (1, 2, 3)]
        together = await asyncio.gather(*(talk(stub, turns) for turns in sessions))
        for turns, session in zip(sessions, together, strict=True):
            async with (
                start_decode(local_prefill_tokens=256) as other,
                open_stub(other.address) as alone,
            ):
                expected = await talk(alone, turns)
            assert [s[1] for s in session] == [s[1] for s in expected]
            assert [s[2].cached_tokens for s in session] == [s[2].cached_tokens for s in expected]
        await store_bytes(stub)


async def test_two_that_go_on_from_one_tail_do_not_share_it(start_decode, open_stub):
    async with start_decode(local_prefill_tokens=256) as node, open_stub(node.address) as stub:
        (prompt, answer, _), *_ = await talk(stub, TURNS[:1])
        both = [request_of([*prompt, *answer, mark]) for mark in (1, 2)]
        outcomes = await asyncio.gather(*(answer_of(stub, request) for request in both))
        # 229 are stored, 128 of them in a slab that is full; the rest goes to whoever comes first.
        assert sorted(usage.cached_tokens for _, usage in outcomes) == [128, 229]
        for request, (tokens, _) in zip(both, outcomes, strict=True):
            async with (
                start_decode(local_prefill_tokens=256) as other,
                open_stub(other.address) as alone,
            ):
                assert tokens == (await answer_of(alone, request))[0]
        await store_bytes(stub)


@pytest.mark.parametrize("after_tokens", [0, 1, 10])
async def test_a_session_whose_client_went_away_can_go_on(
    start_decode, open_stub, after_tokens: int
):
    async with start_decode(local_prefill_tokens=256) as node, open_stub(node.address) as stub:
        prompt = TURNS[0]
        call = stub.Generate(request_of(prompt, max_new_tokens=1000))
        responses = aiter(call)
        got = [(await anext(responses)).token_ids[0] for _ in range(after_tokens)]
        if not after_tokens:
            while not (await stub.GetLoad(generate_pb2.GetLoadRequest())).running_requests:
                pass
        call.cancel()
        await store_bytes(stub)
        follow_up = request_of([*prompt, *got, 8])
        tokens, _ = await answer_of(stub, follow_up)
        async with (
            start_decode(local_prefill_tokens=256) as other,
            open_stub(other.address) as alone,
        ):
            assert tokens == (await answer_of(alone, follow_up))[0]


async def test_without_a_prefill_node_and_a_limit_prompts_of_any_length_are_computed_here(
    start_decode, open_stub
):
    async with (
        start_decode(local_prefill_tokens=None) as node,
        open_stub(node.address) as stub,
    ):
        tokens, usage = await answer_of(stub, request_of([*range(3, 253)] * 2))
    assert len(tokens) == NEW_TOKENS
    assert (usage.local_prompt_tokens, usage.handoff_bytes) == (500, 0)


async def test_who_may_not_compute_a_prompt_and_has_no_prefill_node_says_what_helps(
    start_decode, open_stub
):
    async with start_decode(local_prefill_tokens=9) as node, open_stub(node.address) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await answer_of(stub, request_of([3] * 10))
    assert failure.value.code() is grpc.StatusCode.UNAVAILABLE
    assert "--prefill-addresses" in failure.value.details()
    assert "without engine.local_prefill_tokens" in failure.value.details()


async def test_once_a_hand_off_was_seen_the_cost_decides(
    start_prefill, start_decode, open_stub, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO, logger="services.decode.placement")
    async with (
        start_prefill() as prefill,
        start_decode(prefill.address, local_prefill_tokens=None) as node,
        open_stub(node.address) as stub,
    ):
        prompt = [*range(3, 253)] * 2
        answer, usage = await answer_of(stub, request_of(prompt))
        assert usage.local_prompt_tokens == 0
        await answer_of(stub, request_of([*prompt, *answer, 7]))
    first, second = (line for line in caplog.messages if line.startswith("prompt placed"))
    assert "computed_by=prefill reason=untried" in first
    assert "reason=cost" in second
    assert "decode_seconds=" in second
    assert "prefill_seconds=" in second


async def test_a_chunk_that_fails_ends_its_request_and_leaves_nothing(
    start_decode, open_stub, monkeypatch: pytest.MonkeyPatch
):
    def broken(self, sequence, token_ids, profile_window):
        raise ZeroDivisionError("secret detail")

    async with start_decode(local_prefill_tokens=256) as node, open_stub(node.address) as stub:
        with monkeypatch.context() as patch:
            patch.setattr(HostStep, "compute_chunk", broken)
            with pytest.raises(grpc.aio.AioRpcError) as failure:
                await answer_of(stub, request_of(TURNS[0]))
        assert failure.value.code() is grpc.StatusCode.INTERNAL
        assert (await store_bytes(stub)).host_kv_cached_bytes == 0
        assert len((await answer_of(stub, request_of(TURNS[0])))[0]) == NEW_TOKENS
