"""One sequence does not hurt another: streams beside one that fails, and what is found then."""

from __future__ import annotations

import asyncio
import threading

import grpc
import pytest
import torch

from fluxion_core.decode.host.step import HostStep
from fluxion_core.kvstore.sequence import SequenceKv
from fluxion_core.kvstore.step_append import StepAppend
from fluxion_proto.v1 import generate_pb2
from services.decode.engine import DecodeEngine
from tests.services.decode.test_sessions import answer_of, request_of, store_bytes

BAD = 9
"""First token of the prompts that something is done to."""

PROMPT = [BAD, *range(20, 219)]
"""200 tokens: a full slab and a tail."""

INNOCENT = [[start, *range(50, 150)] for start in (1, 2, 3)]


def is_bad(sequence: SequenceKv) -> bool:
    return int(sequence._prompt[0]) == BAD


async def failure_of(stub, request) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await answer_of(stub, request)
    return failure.value


async def asked_anew(stub, start_decode, open_stub) -> None:
    """The prompt finds nothing of what was, and gets what a fresh node says."""
    answer, usage = await answer_of(stub, request_of(PROMPT))
    assert usage.cached_tokens == 0
    async with start_decode(local_prefill_tokens=256) as other, open_stub(other.address) as alone:
        assert answer == (await answer_of(alone, request_of(PROMPT)))[0]


@pytest.fixture
def damage(monkeypatch: pytest.MonkeyPatch):
    """Makes V of the bad prompts' tokens NaN in layer 1, from the given token on, until told."""
    append = StepAppend.append
    state = {"from": 0, "on": True}

    def damaging(self, layer, key, value):
        if layer == 1 and state["on"]:
            value, row = value.clone(), 0
            for sequence, count in zip(self._sequences, self._counts, strict=True):
                if is_bad(sequence) and sequence.num_tokens >= state["from"]:
                    value[row : row + count] = torch.nan
                row += count
        append(self, layer, key, value)

    monkeypatch.setattr(StepAppend, "append", damaging)
    return state


@pytest.mark.parametrize("policy", ["exact", "threshold(0.3)"])
@pytest.mark.parametrize("first_damaged", [0, len(PROMPT) + 5])
async def test_streams_beside_one_whose_kv_is_damaged_say_what_they_say_in_a_quiet_run(
    start_decode, open_stub, damage, first_damaged: int, policy: str
):
    damage["from"] = first_damaged
    async with start_decode(local_prefill_tokens=256) as node, open_stub(node.address) as stub:
        requests = [request_of(prompt, max_new_tokens=200) for prompt in INNOCENT]
        quiet = [(await answer_of(stub, request))[0] for request in requests]
        streams = [asyncio.ensure_future(answer_of(stub, request)) for request in requests]
        failure = await failure_of(stub, request_of(PROMPT, policy=policy))
        assert failure.code() is grpc.StatusCode.DATA_LOSS
        place = first_damaged // 32 * 32 if first_damaged < len(PROMPT) else first_damaged
        assert f"token {place} in layer 1" in failure.details()
        assert [answer for answer, _ in await asyncio.gather(*streams)] == quiet
        damage["on"] = False
        await asked_anew(stub, start_decode, open_stub)
        await store_bytes(stub)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch):
    """Steps of a bad prompt store its KV, wait to be let on, and fail."""
    run = HostStep.run
    began, may_end = threading.Event(), threading.Event()
    is_on = [True]

    def failing_run(self, rows):
        made = run(self, rows)
        if is_on[0] and any(is_bad(row.sequence) for row in rows):
            began.set()
            may_end.wait()
            raise ZeroDivisionError("secret detail")
        return made

    monkeypatch.setattr(HostStep, "run", failing_run)
    yield began, may_end, is_on
    may_end.set()


async def test_nothing_of_a_sequence_whose_step_failed_is_found(start_decode, open_stub, failing):
    _, may_end, is_on = failing
    may_end.set()
    async with start_decode(local_prefill_tokens=256) as node, open_stub(node.address) as stub:
        failure = await failure_of(stub, request_of(PROMPT))
        assert failure.code() is grpc.StatusCode.INTERNAL
        assert (await store_bytes(stub)).host_kv_cached_bytes == 0
        is_on[0] = False
        await asked_anew(stub, start_decode, open_stub)


async def test_nothing_is_found_either_if_its_client_went_away_during_that_step(
    start_decode, open_stub, failing
):
    began, may_end, is_on = failing
    async with start_decode(local_prefill_tokens=256) as node, open_stub(node.address) as stub:
        call = stub.Generate(request_of(PROMPT))
        assert await call.read() is not grpc.aio.EOF
        await asyncio.to_thread(began.wait)
        call.cancel()
        may_end.set()
        assert (await store_bytes(stub)).host_kv_cached_bytes == 0
        is_on[0] = False
        await asked_anew(stub, start_decode, open_stub)


@pytest.fixture
def may_step(monkeypatch: pytest.MonkeyPatch):
    """Lets steps go on, each of which waits for it."""
    run, may_end = HostStep.run, threading.Event()

    def waiting_run(self, rows):
        may_end.wait()
        return run(self, rows)

    monkeypatch.setattr(HostStep, "run", waiting_run)
    return may_end


async def test_memory_is_given_back_after_the_step_that_reads_it_not_before(
    start_decode, open_stub, may_step, monkeypatch: pytest.MonkeyPatch
):
    cancel, release, end = DecodeEngine.cancel, SequenceKv.release, DecodeEngine._end
    order: list[str] = []
    cleaning = asyncio.Event()

    def cancelled(sequence):
        cancel(sequence)
        cleaning.set()

    def released(self):
        order.append("memory")
        cleaning.set()
        release(self)

    def ended(self, sequence, error):
        order.append("step")
        end(self, sequence, error)

    monkeypatch.setattr(DecodeEngine, "cancel", staticmethod(cancelled))
    monkeypatch.setattr(DecodeEngine, "_end", ended)
    monkeypatch.setattr(SequenceKv, "release", released)
    async with start_decode(local_prefill_tokens=256) as node, open_stub(node.address) as stub:
        try:
            call = stub.Generate(request_of(PROMPT, max_new_tokens=50))
            assert await call.read() is not grpc.aio.EOF
            call.cancel()
            await cleaning.wait()
            # Calls enough that all that can be done without the step is done before it goes on.
            for _ in range(20):
                load = await stub.GetLoad(generate_pb2.GetLoadRequest())
            assert load.host_kv_used_bytes > 0
            assert order == []
        finally:
            may_step.set()
        await store_bytes(stub)
    assert order == ["step", "memory"]
