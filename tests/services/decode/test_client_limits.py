"""What one client has waiting is bounded, and others are not hindered by it."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from fluxion_core.config.settings import AuthSettings, ClientLimitSettings
from fluxion_proto.v1 import generate_pb2
from tests.certificates import write_secret
from tests.services.conftest import decode_node, decode_settings, generation_stub, running_node


def as_client(name: str) -> list[tuple[str, str]]:
    return [("authorization", f"Bearer {name}-0123456789abcdef")]


async def test_waiting_tokens_count_until_the_first_token(start_prefill, toy_model_path, tmp_path):
    tokens = "".join(f"{name} {name}-0123456789abcdef\n" for name in ("alice", "bob"))
    async with start_prefill() as prefill:
        settings = decode_settings(toy_model_path, prefill.address, max_running_sequences=1)
        server = settings.server.model_copy(
            update={
                "auth": AuthSettings(token_file=write_secret(tmp_path / "tokens", tokens)),
                "client_limits": ClientLimitSettings(waiting_tokens=100),
            }
        )
        settings = settings.model_copy(update={"server": server})
        async with running_node(decode_node.serve, settings) as node:
            async with generation_stub(node.address) as stub:

                def ask(name: str, num_tokens: int, max_new_tokens: int = 4):
                    request = generate_pb2.GenerateRequest(
                        text="x" * num_tokens, max_new_tokens=max_new_tokens, ignore_eos=True
                    )
                    return stub.Generate(request, metadata=as_client(name))

                running = ask("alice", 60, max_new_tokens=1900)
                assert (await running.read()).token_ids
                # The first has its first token and counts no more; this one waits for its place.
                waiting = ask("alice", 60)
                while True:
                    load = await stub.GetLoad(
                        generate_pb2.GetLoadRequest(), metadata=as_client("bob")
                    )
                    if load.waiting_requests == 1:
                        break
                with pytest.raises(grpc.aio.AioRpcError) as failure:
                    await ask("alice", 50).read()
                assert failure.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
                assert "waiting tokens of client alice: need 50 tokens, 40 tokens free" in str(
                    failure.value.details()
                )
                other = ask("bob", 90)
                running.cancel()
                finished = await asyncio.gather(_tokens(waiting), _tokens(other))
                assert finished == [4, 4]
                assert await _tokens(ask("alice", 100)) == 4


async def _tokens(call) -> int:
    return sum([len(answer.token_ids) async for answer in call])
