"""A large text is cut into tokens while the node goes on with everything else."""

from __future__ import annotations

import asyncio
import threading

import grpc
import pytest

from fluxion_core.generation.tokenizer import Tokenizer
from fluxion_proto.v1 import generate_pb2
from services.decode.request import OFF_LOOP_BYTES


@pytest.mark.parametrize("method", ["Generate", "Tokenize"])
async def test_others_are_answered_meanwhile(
    start_prefill, start_decode, open_stub, monkeypatch, method: str
):
    may_go_on, has_begun = threading.Event(), threading.Event()
    encode = Tokenizer.encode

    def slow_encode(self, text: str, **options) -> list[int]:
        if len(text) >= OFF_LOOP_BYTES:
            has_begun.set()
            assert may_go_on.wait(60)
        return encode(self, text, **options)

    monkeypatch.setattr(Tokenizer, "encode", slow_encode)
    text = "x" * OFF_LOOP_BYTES
    async with start_prefill() as prefill, start_decode(prefill.address) as node:
        async with open_stub(node.address) as stub:
            if method == "Tokenize":
                running = asyncio.ensure_future(
                    _awaited(stub.Tokenize(generate_pb2.TokenizeRequest(text=text)))
                )
            else:
                call = stub.Generate(generate_pb2.GenerateRequest(text=text))
                running = asyncio.ensure_future(call.read())
            assert await asyncio.to_thread(has_begun.wait, 60)
            short = generate_pb2.GenerateRequest(text="hello", max_new_tokens=4, ignore_eos=True)
            tokens = [t async for answer in stub.Generate(short) for t in answer.token_ids]
            assert len(tokens) == 4
            may_go_on.set()
            if method == "Tokenize":
                assert len((await running).token_ids) == OFF_LOOP_BYTES
            else:
                with pytest.raises(grpc.aio.AioRpcError, match="exceeds the context"):
                    await running


async def _awaited(call) -> generate_pb2.TokenizeResponse:
    return await call
