"""Quality levels and policies with the real model, through two real processes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import pytest

from fluxion_proto.v1 import generate_pb2, generate_pb2_grpc
from tests.e2e.conftest import LOCAL_TOKENS
from tests.e2e.token_list import (
    FIRST,
    ISA,
    LEVELS,
    NEW_TOKENS,
    PROMPTS,
    Answers,
    ask_all,
    nodes_on_isa,
    record,
)

pytestmark = [pytest.mark.model, pytest.mark.timeout(600)]


class Said(NamedTuple):
    """What was asked of the nodes, once for all tests."""

    answers: Answers
    info: generate_pb2.GetModelInfoResponse
    load: generate_pb2.GetLoadResponse
    document: list[int]


@pytest.fixture(scope="module")
def said(
    smollm2_path: Path, document_tokens: list[int], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Said]:
    with (
        nodes_on_isa(smollm2_path, tmp_path_factory.mktemp("isa"), ISA) as nodes,
        grpc.insecure_channel(nodes.decode.address) as channel,
    ):
        stub = generate_pb2_grpc.GenerationStub(channel)
        info = stub.GetModelInfo(generate_pb2.GetModelInfoRequest())
        answers = ask_all(stub, document_tokens)
        load = stub.GetLoad(generate_pb2.GetLoadRequest())
        yield Said(answers, info, load, document_tokens)


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    return json.loads(Path(__file__).with_name("token_list.json").read_text())


def test_the_list_is_of_this_model_and_these_weights(said: Said, recorded: dict[str, Any]):
    now = record(said.answers, said.info, said.document)
    assert now["holds for"] == recorded["holds for"]
    assert now["policies"] == recorded["policies"]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_every_policys_tokens_are_those_that_were_recorded(
    said: Said, recorded: dict[str, Any], prompt: str
):
    now = {wish: answer.tokens for wish, answer in said.answers[prompt].items()}
    assert now == recorded["tokens"][prompt]
    # Else the list would prove little.
    assert len({tuple(tokens) for tokens in now.values()}) > 4


@pytest.mark.parametrize("prompt", PROMPTS)
def test_one_request_goes_the_whole_way_and_others_go_on_from_its_kv(said: Said, prompt: str):
    num_tokens = PROMPTS[prompt][1]
    for wish, (tokens, usage) in said.answers[prompt].items():
        assert len(tokens) == usage.generated_tokens == NEW_TOKENS
        is_first = wish == FIRST[prompt]
        assert usage.cached_tokens == (0 if is_first else num_tokens - LOCAL_TOKENS)
        assert usage.local_prompt_tokens == (0 if is_first else LOCAL_TOKENS)
        assert (usage.handoff_bytes > 0) == is_first
    assert said.load.running_requests == said.load.host_kv_reserved_bytes == 0


def test_the_lower_the_level_the_less_is_read(said: Said):
    policies = {each.level: each.policy for each in said.info.level_policies}
    reads = [said.answers["2,000"][level].usage.kv_reads for level in LEVELS]
    assert [each.policy for each in reads] == [policies[level] for level in LEVELS.values()]
    shares = [each.share_of_exact for each in reads]
    assert shares[0] == 1
    assert shares == sorted(shares, reverse=True)
    assert len(set(shares)) == 4


@pytest.mark.parametrize(
    ("strict", "loose"),
    [("threshold(0.01)", "threshold(0.215)"), ("marginal(0.01)", "marginal(0.3)")],
)
def test_a_stricter_number_reads_more_and_never_more_than_all(said: Said, strict: str, loose: str):
    more, less = (said.answers["2,000"][policy].usage.kv_reads for policy in (strict, loose))
    assert less.share_of_exact < more.share_of_exact
    assert less.streaming_share > more.streaming_share
    # Digests come on top of K and V: the finest are a sixteenth of them, the coarsest a 128th.
    assert more.share_of_exact < 1 + 1 / 16 + 1 / 128
    # 30 layers of 3 KV heads, at every step after the first token.
    groups = sum(more.groups_by_block_size) + more.groups_nothing + more.groups_everything
    assert groups == 30 * 3 * (NEW_TOKENS - 1)
