"""Sixty-four streams at a time get what each gets alone, and leave nothing behind: minutes."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import grpc
import pytest

from fluxion_proto.v1 import generate_pb2, generate_pb2_grpc
from tests.e2e.conftest import Cluster, running_cluster

STREAMS = 64
# Weighted as clients are: most prompts are short.
LENGTHS = [200] * 36 + [500] * 16 + [1000] * 6 + [2000] * 4 + [7000] * 2
NEW_TOKENS = 24


def prompts(document_tokens: list[int]) -> list[list[int]]:
    """Of mixed lengths in a mixed order; no two begin alike."""
    generator = random.Random(64)
    lengths = generator.sample(LENGTHS, STREAMS)
    made = []
    for length in lengths:
        first = generator.randrange(len(document_tokens) - length + 8)
        own = [generator.randrange(1000, 40_000) for _ in range(8)]
        made.append(own + document_tokens[first : first + length - 8])
    assert sorted(map(len, made)) == sorted(LENGTHS)
    return made


async def tokens_of(stub: generate_pb2_grpc.GenerationStub, prompt: list[int]) -> list[int]:
    request = generate_pb2.GenerateRequest(max_new_tokens=NEW_TOKENS, ignore_eos=True)
    request.token_ids.ids.extend(prompt)
    return [token async for response in stub.Generate(request) for token in response.token_ids]


def resident_bytes(cluster: Cluster) -> int:
    assert cluster.decode.process is not None
    status = Path(f"/proc/{cluster.decode.process.pid}/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


@pytest.mark.model
@pytest.mark.load
@pytest.mark.timeout(3600)
async def test_every_stream_gets_the_tokens_that_it_gets_alone(
    smollm2_path: Path, document_tokens: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    wanted = prompts(document_tokens)
    results = []
    for together in (False, True):
        # Each with nodes of its own: nothing is found in a store that the other way has filled.
        with running_cluster(
            smollm2_path,
            tmp_path_factory.mktemp("streams"),
            # Who computes a prompt must not depend on how much there is to do.
            decode_flags=("--engine.local-prefill-tokens", "256"),
        ) as cluster:
            async with grpc.aio.insecure_channel(cluster.decode.address) as channel:
                stub = generate_pb2_grpc.GenerationStub(channel)
                await tokens_of(stub, wanted[0])
                before = await stub.GetLoad(generate_pb2.GetLoadRequest())
                if together:
                    results.append(
                        list(await asyncio.gather(*(tokens_of(stub, one) for one in wanted)))
                    )
                else:
                    results.append([await tokens_of(stub, one) for one in wanted])
                after = await stub.GetLoad(generate_pb2.GetLoadRequest())
            for load in (before, after):
                held = (load.running_requests, load.waiting_requests, load.host_kv_reserved_bytes)
                assert held == (0, 0, 0)
                assert load.host_kv_used_bytes == 0
            # The store is the most that may have grown.
            assert resident_bytes(cluster) < after.host_kv_capacity_bytes + (2 << 30)
    alone, at_a_time = results
    assert all(len(tokens) == NEW_TOKENS for tokens in at_a_time)
    assert at_a_time == alone
