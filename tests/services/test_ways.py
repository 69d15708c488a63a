"""Both real nodes, by every way that KV can come: the same tokens, and nothing is left behind."""

from __future__ import annotations

import asyncio
import urllib.request
from collections.abc import Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest

from fluxion_core.config.carriers import Carrier
from fluxion_core.config.settings import (
    ClientSettings,
    ClientTlsSettings,
    HandoffSettings,
    ServerSettings,
    ServerTlsSettings,
)
from fluxion_proto.v1 import generate_pb2
from services.decode import __main__ as decode_node
from services.decode.config import PrefillSettings
from services.prefill import __main__ as prefill_node
from services.prefill.config import PrefillHandoffSettings
from tests.certificates import Authority
from tests.descriptors import open_descriptors, opened_since
from tests.services.conftest import (
    decode_settings,
    free_address,
    prefill_settings,
    running_node,
    wait_serving,
)

PROMPT_TOKENS = (1, 16, 17, 700)
BESIDE = (Carrier.SHARED_MEMORY, Carrier.SOCKETS)
OF_PLANE = ("socket:", "anon_inode:[eventfd]", "/memfd:")
"""How descriptors of both nodes' planes begin."""


def request_of(length: int) -> generate_pb2.GenerateRequest:
    ids = [(7 * position + length) % 256 for position in range(length)]
    return generate_pb2.GenerateRequest(
        token_ids={"ids": ids}, max_new_tokens=6, ignore_eos=True, policy="threshold(0.1)"
    )


async def tokens_of(stub, length: int) -> list[int]:
    return [t async for r in stub.Generate(request_of(length)) for t in r.token_ids]


def fetched(address: str) -> str:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=30) as answer:
        return answer.read().decode()


async def answers_by(start_prefill, start_decode, open_stub, *ways: Carrier) -> list[list[int]]:
    """Tokens of prompts, several at a time, all of which came by the first of these ways."""
    metrics = free_address()
    async with (
        start_prefill() as prefill,
        start_decode(
            prefill.address, handoff=HandoffSettings(ways=ways), metrics_listen=metrics
        ) as node,
        open_stub(node.address) as stub,
    ):
        # What gRPC opens for good, it has opened by then.
        first = await tokens_of(stub, PROMPT_TOKENS[0])
        before = open_descriptors()
        rest = await asyncio.gather(*(tokens_of(stub, length) for length in PROMPT_TOKENS[1:]))
        load = await stub.GetLoad(generate_pb2.GetLoadRequest())
        assert (load.host_kv_reserved_bytes, load.running_requests) == (0, 0)
        page = await asyncio.to_thread(fetched, metrics)
        assert f'fluxion_handoffs_total{{node="{prefill.address}",way="{ways[0]}"}} 4.0' in page
        while any(kind.startswith(OF_PLANE) for _, kind in opened_since(before)):
            await asyncio.sleep(0)
    return [first, *rest]


async def test_the_way_does_not_change_tokens(start_prefill, start_decode, open_stub):
    nodes = start_prefill, start_decode, open_stub
    by_call = await answers_by(*nodes, Carrier.GRPC)
    assert [len(tokens) for tokens in by_call] == [6] * 4
    for way in BESIDE:
        assert await answers_by(*nodes, way) == by_call


async def test_the_prefill_nodes_preference_decides(start_prefill, start_decode, open_stub):
    # All that the decode node has, in an order that is not the prefill node's.
    ways = (Carrier.GRPC, Carrier.SOCKETS, Carrier.SHARED_MEMORY)
    metrics = free_address()
    async with (
        start_prefill() as prefill,
        start_decode(
            prefill.address, handoff=HandoffSettings(ways=ways), metrics_listen=metrics
        ) as node,
        open_stub(node.address) as stub,
    ):
        await tokens_of(stub, 40)
        page = await asyncio.to_thread(fetched, metrics)
        assert f'node="{prefill.address}",way="shared_memory"}} 1.0' in page


@asynccontextmanager
async def encrypted_nodes(model: Path, directory: Path, ways: Sequence[Carrier]):
    """Nodes that show each other certificates; the decode node's clients need none."""
    authority = Authority(directory)
    certificate, key = authority.issue("prefill")
    of_decode, key_of_decode = authority.issue("decode")
    health = free_address()
    prefill = prefill_settings(model)
    tls = ServerTlsSettings(certificate=certificate, key=key, client_authority=authority.path)
    server = ServerSettings(listen=prefill.server.listen, health_listen=health, tls=tls)
    handoff = PrefillHandoffSettings(ways=tuple(ways))
    prefill = prefill.model_copy(update={"server": server, "handoff": handoff})
    client = ClientTlsSettings(authority=authority.path, certificate=of_decode, key=key_of_decode)
    decode = decode_settings(model, prefill.server.listen, handoff=HandoffSettings(ways=ways))
    source = PrefillSettings(addresses=(prefill.server.listen,), client=ClientSettings(tls=client))
    decode = decode.model_copy(update={"prefill": source})
    ending = asyncio.Event()
    serving = asyncio.ensure_future(prefill_node.serve(prefill, ending))
    try:
        async with grpc.aio.insecure_channel(health) as channel:
            await wait_serving(channel, "fluxion.v1.Handoff")
        async with running_node(decode_node.serve, decode) as node:
            yield node
    finally:
        ending.set()
        await serving


@pytest.mark.parametrize("way", BESIDE)
async def test_beside_a_call_over_tls_kv_is_the_same(
    toy_model_path, tmp_path, start_prefill, start_decode, open_stub, caplog, way: Carrier
):
    caplog.set_level("INFO", logger="services.decode.kv_ingest")
    async with (
        encrypted_nodes(toy_model_path, tmp_path, [way]) as node,
        open_stub(node.address) as stub,
        start_prefill() as plain_prefill,
        start_decode(plain_prefill.address) as plain,
        open_stub(plain.address) as other,
    ):
        for length in PROMPT_TOKENS:
            assert await tokens_of(stub, length) == await tokens_of(other, length)
        assert caplog.text.count(f"way={way}") >= 4
