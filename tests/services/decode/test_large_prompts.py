"""A large text is cut into tokens while the node goes on with everything else."""

from __future__ import annotations

import asyncio
import threading

import grpc
import pytest

from fluxion_core.generation.tokenizer import Tokenizer
from fluxion_proto.v1 import generate_pb2
from services.decode import prompt_reader

LARGE = 1500


@pytest.fixture
def few_are_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_reader, "SHORT_PROMPT_BYTES", LARGE)


@pytest.mark.usefixtures("few_are_short")
@pytest.mark.parametrize("method", ["Generate", "Tokenize"])
async def test_others_are_answered_meanwhile(
    start_prefill, start_decode, open_stub, monkeypatch, method: str
):
    may_go_on, has_begun = threading.Event(), threading.Event()
    encode = Tokenizer._encode_piece

    def slow_encode(self, text: str) -> list[int]:
        if len(text) >= LARGE:
            has_begun.set()
            assert may_go_on.wait(60)
        return encode(self, text)

    monkeypatch.setattr(Tokenizer, "_encode_piece", slow_encode)
    text = "x" * LARGE
    async with start_prefill() as prefill, start_decode(prefill.address) as node:
        async with open_stub(node.address) as stub:
            if method == "Tokenize":
                running = asyncio.ensure_future(
                    _awaited(stub.Tokenize(generate_pb2.TokenizeRequest(text=text)))
                )
            else:
                call = stub.Generate(generate_pb2.GenerateRequest(text=text, max_new_tokens=1))
                running = asyncio.ensure_future(call.read())
            assert await asyncio.to_thread(has_begun.wait, 60)
            short = generate_pb2.GenerateRequest(text="hello", max_new_tokens=4, ignore_eos=True)
            tokens = [t async for answer in stub.Generate(short) for t in answer.token_ids]
            assert len(tokens) == 4
            may_go_on.set()
            answer = await running
            assert len(answer.token_ids) == (LARGE if method == "Tokenize" else 1)


@pytest.mark.parametrize("prompt", ["text", "chat", "token_ids"])
async def test_what_cannot_fit_is_refused_and_never_cut(
    start_decode, open_stub, monkeypatch, prompt: str
):
    def cut(self, text: str) -> list[int]:
        raise AssertionError(f"{len(text)} characters were cut")

    monkeypatch.setattr(Tokenizer, "_encode_piece", cut)
    monkeypatch.setattr(
        Tokenizer, "render_chat_pieces", lambda self, messages: (m.content for m in messages)
    )
    given = {
        # Of bytes that are tokens, and 2048 fit.
        "text": {"text": "x" * 2049},
        "chat": {"chat": {"messages": [{"role": "user", "content": "x" * 7}] * 300}},
        "token_ids": {"token_ids": {"ids": [1] * 2049}},
    }[prompt]
    async with start_decode() as node, open_stub(node.address) as stub:
        with pytest.raises(grpc.aio.AioRpcError, match="exceeds the context of 2048") as failure:
            await stub.Generate(generate_pb2.GenerateRequest(**given)).read()
        assert failure.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        if prompt != "token_ids":
            with pytest.raises(grpc.aio.AioRpcError, match="exceeds the context of 2048"):
                await stub.Tokenize(generate_pb2.TokenizeRequest(**given))


async def _awaited(call) -> generate_pb2.TokenizeResponse:
    return await call
