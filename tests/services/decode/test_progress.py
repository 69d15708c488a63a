"""How far a prompt is: told while nothing else comes, to who asked for it, and never after."""

from __future__ import annotations

import asyncio

import pytest

from fluxion_proto.v1 import generate_pb2
from services.decode import progress
from services.decode.progress import PromptProgress, next_or_report

Queued, Prefill = generate_pb2.PROMPT_STATE_QUEUED, generate_pb2.PROMPT_STATE_PREFILL
Report = generate_pb2.PromptProgress


def test_a_prompt_is_queued_until_the_first_of_its_tokens_is_computed():
    prompt = PromptProgress()
    assert prompt.report() == Report(state=Queued)
    prompt.num_tokens = 70
    held = 32
    prompt.follow(lambda: held)
    assert prompt.report() == Report(state=Queued, prompt_tokens=70, prompt_tokens_done=32)
    held = 33
    assert prompt.report() == Report(state=Prefill, prompt_tokens=70, prompt_tokens_done=33)
    # Another node begins again.
    prompt.follow(lambda: 32)
    assert prompt.report() == Report(state=Queued, prompt_tokens=70, prompt_tokens_done=32)


async def test_a_report_comes_only_where_nothing_else_does(monkeypatch):
    monkeypatch.setattr(progress, "REPORT_SECONDS", 0.0)
    outputs: asyncio.Queue[str] = asyncio.Queue()
    prompt = PromptProgress()
    assert await next_or_report(outputs, prompt) == prompt.report()
    outputs.put_nowait("token")
    assert await next_or_report(outputs, prompt) == "token"
    assert await next_or_report(outputs, prompt) == prompt.report()


def request(**fields) -> generate_pb2.GenerateRequest:
    return generate_pb2.GenerateRequest(text="x" * 600, max_new_tokens=4, ignore_eos=True, **fields)


@pytest.mark.parametrize("local_prefill_tokens", [0, 1000], ids=["handed off", "local"])
async def test_a_client_that_asks_sees_its_prompt_grow_and_gets_the_same_tokens(
    start_prefill, start_decode, open_stub, monkeypatch, local_prefill_tokens
):
    monkeypatch.setattr(progress, "REPORT_SECONDS", 0.0)
    options = {"local_prefill_tokens": local_prefill_tokens}
    async with start_prefill() as prefill, start_decode(prefill.address, **options) as node:
        async with open_stub(node.address) as stub:
            answers = [one async for one in stub.Generate(request(report_progress=True))]
            plain = [one async for one in stub.Generate(request())]
    assert not any(one.HasField("progress") for one in plain)
    reports = [one.progress for one in answers if one.HasField("progress")]
    others = answers[len(reports) :]
    # Alone, before everything else.
    assert not any(one.HasField("progress") for one in others)
    assert not any(one.token_ids or one.text for one in answers[: len(reports)])
    assert [list(one.token_ids) for one in others] == [list(one.token_ids) for one in plain]
    done = [one.prompt_tokens_done for one in reports]
    assert done == sorted(done)
    between = [one for one in reports if 0 < one.prompt_tokens_done < 600]
    assert between
    assert all((one.state, one.prompt_tokens) == (Prefill, 600) for one in between)
