"""Who computes a prompt, by costs that can be worked out on paper."""

from __future__ import annotations

import logging

import pytest

from fluxion_core.geometry import KvGeometry
from fluxion_core.models.config import ModelConfig, RopeConfig
from services.decode.engine import EngineLoad
from services.decode.placement import Placement, PlacementDecision, PlacementReason
from services.decode.prefill_nodes import NodeLoad
from services.decode.prompt_costs import HandoffCosts, LocalCosts, ModelCosts, PromptCosts
from services.decode.request_counters import RequestCounters

MODEL = ModelCosts(
    num_layers=3,
    weight_bytes=1_000_000,
    kv_token_bytes=1000,
    dense_operations=2000,
    attention_operations=1,
)


def test_costs_are_those_of_a_models_shape():
    config = ModelConfig(
        architecture="llama",
        vocab_size=1000,
        hidden_size=10,
        intermediate_size=30,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        rms_norm_eps=1e-5,
        rope=RopeConfig(theta=10_000.0),
        context_tokens=128,
        tie_word_embeddings=True,
        attention_bias=False,
        bos_token_id=None,
        eos_token_ids=(),
    )
    # By hand: q and o of 4 heads, k and v of 2, 16 channels each: 10 x 16 x 12 = 1,920; the MLP has
    # 3 x 10 x 30 = 900; two layers have 5,640 weights of 2 B. K and V: 2 layers x 2 heads x 2 x 16.
    costs = ModelCosts.of(config, KvGeometry(2, 2, 16), 2)
    assert costs == ModelCosts(
        num_layers=2,
        weight_bytes=11_280,
        kv_token_bytes=256,
        dense_operations=11_280,
        attention_operations=4 * 4 * 16 * 2,
    )


def test_a_chunk_reads_the_weights_for_16_rows_at_a_time_and_the_kv_for_each_row():
    # By hand: 17 rows are two readings; each row reads 100 tokens, and half of its chunk.
    assert MODEL.chunk_bytes(17, 100) == 2_000_000 + 17 * 108.5 * 1000
    assert MODEL.operations(1000) == 1000 * (2000 + 500)


def test_a_chunk_that_gathers_reads_the_kv_once_and_weights_where_they_are_near():
    # By hand: 129 rows are two readings of 1 MB, each worth 20 KB over the link.
    assert MODEL.gathered_bytes(129, 100) == pytest.approx(2 * 20_000 + 229 * 1000)


def costs_at(bytes_per_second: float, *, gathers: bool = False) -> LocalCosts:
    here = LocalCosts(MODEL, threads=1, gathers=gathers)
    here.bytes_per_second = bytes_per_second
    return here


def test_a_prompt_alone_comes_in_chunks_of_32():
    # By hand: 64 tokens behind 968 are two chunks of 32 behind about 1,000, each of 2 MB of weights
    # and 32 x 1,016 KB of KV: 34.512 MB, at 1 MB/s.
    seconds = costs_at(1e6).seconds(64, 968, EngineLoad(), wants_profile=False)
    assert seconds == pytest.approx(2 * 34.512)


def test_a_profile_reads_all_for_eight_rows_and_waits_for_steps_beside_streams():
    # By hand: 8 times 1,032 KB are 8.256 s; in slices of a third of a step, each with a step after
    # it, three times that.
    seconds = costs_at(1e6).seconds(64, 968, EngineLoad(), wants_profile=True)
    assert seconds == pytest.approx(2 * 34.512 + 8.256)
    load = EngineLoad(streams=2, step_seconds=2.0)
    seconds = costs_at(1e6).seconds(64, 968, load, wants_profile=True)
    assert seconds == pytest.approx(4 * (17.128 + 2 + 0.2 * 17.128) + 3 * 8.256)


def test_beside_streams_chunks_have_16_tokens_and_steps_between_them_and_others_count_a_tenth():
    # By hand: four chunks, each of 1 MB and 16 x 1,008 KB: 17.128 s; a step of 2 s after each; two
    # streams wait as long.
    load = EngineLoad(streams=2, step_seconds=2.0)
    seconds = costs_at(1e6).seconds(64, 968, load, wants_profile=False)
    assert seconds == pytest.approx(4 * (17.128 + 2 + 0.2 * 17.128))


def test_prompts_that_came_before_are_computed_before():
    # By hand: 96 tokens more are three chunks more.
    load = EngineLoad(pending_tokens=96)
    seconds = costs_at(1e6).seconds(64, 968, load, wants_profile=False)
    assert seconds == pytest.approx(5 * 34.512)


def test_a_follow_up_that_gathers_is_one_chunk_and_beside_streams_a_step_follows_each_part():
    # By hand: 64 tokens behind 968, the middle at 1,000: 20 KB of weights and 1,064 KB, at 1 MB/s.
    here = costs_at(1e6, gathers=True)
    assert here.seconds(64, 968, EngineLoad(), wants_profile=False) == pytest.approx(1.084)
    # Parts of 0.4 s: three, each with a step after it; two streams wait as long as the chunk takes.
    load = EngineLoad(streams=2, step_seconds=0.4)
    seconds = here.seconds(64, 968, load, wants_profile=False)
    assert seconds == pytest.approx(1.084 + 3 * 0.4 + 0.2 * 1.084)
    # Before the first step there is nothing to wait for.
    load = EngineLoad(streams=2)
    seconds = here.seconds(64, 968, load, wants_profile=False)
    assert seconds == pytest.approx(1.084 + 0.2 * 1.084)
    # Its profile is made by the threads, at 4 GB/s: 8 times 1,032 KB.
    seconds = here.seconds(64, 968, EngineLoad(), wants_profile=True)
    assert seconds == pytest.approx(1.084 + 8 * 1.032e6 / 4e9)


def test_a_rate_that_gathers_follows_its_chunks():
    here = LocalCosts(MODEL, threads=16, gathers=True)
    assert here.bytes_per_second == 2e10
    # By hand: 100 rows behind 880: 20 KB and 980 KB in 0.1 s are 10 MB/s.
    here.learn(100, 880, 0.1)
    assert here.bytes_per_second == pytest.approx(0.7 * 2e10 + 0.3 * 1e7)


def test_the_rate_follows_the_chunks():
    here = LocalCosts(MODEL, threads=2)
    assert here.bytes_per_second == 8e9
    # By hand: 16 rows behind 992: 1 MB and 16 MB in 2 s; 0.7 of 8 GB/s and 0.3 of 8.5 MB/s.
    here.learn(16, 992, 2.0)
    assert here.bytes_per_second == pytest.approx(0.7 * 8e9 + 0.3 * 8.5e6)
    here.learn(16, 992, 0.0)
    assert here.bytes_per_second == pytest.approx(0.7 * 8e9 + 0.3 * 8.5e6)


def test_a_hand_off_costs_the_whole_prompt_what_waits_before_it_and_the_link():
    there = HandoffCosts(MODEL)
    assert there.seconds(1000, 5000, NodeLoad()) is None
    # By hand: 2.5 M operations in 5 s; 1 MB in 4 s.
    there.learn(1000, 5.0, 1_000_000, 4.0)
    assert there.seconds(1000, 0, NodeLoad()) == pytest.approx(5.0)
    assert there.seconds(1000, 500_000, NodeLoad()) == pytest.approx(5.0 + 2.0)
    # A prompt of 2,000 has 6 M operations.
    assert there.seconds(2000, 0, NodeLoad()) == pytest.approx(12.0)
    # What goes before it takes what the node says; 3,000 tokens of which it says nothing, three
    # times our own. What comes after it takes nothing.
    load = NodeLoad(4000, pending_tokens=99_000, seconds_before=7.0, other_tokens=3000)
    assert there.seconds(1000, 0, load) == pytest.approx(7.0 + 20.0)


def test_rates_of_hand_offs_follow_and_a_slow_one_says_little_of_the_link():
    there = HandoffCosts(MODEL)
    there.learn(1000, 5.0, 1_000_000, 4.0)
    # By hand: 0.7 of 0.5 M/s and 0.3 of 1 M/s are 0.65; the link is the faster of what was seen.
    there.learn(1000, 2.5, 1_000_000, 1.0)
    assert there.seconds(1000, 0, NodeLoad()) == pytest.approx(2.5 / 0.65)
    assert there.seconds(1000, 1_000_000, NodeLoad()) == pytest.approx(2.5 / 0.65 + 1.0)
    # A prompt that comes at 0.1 MB/s while it is computed: 0.7 of 1 MB/s and 0.3 of 0.1.
    there.learn(1000, 2.5 / 0.65, 1_000_000, 10.0)
    assert there.seconds(1000, 730_000, NodeLoad()) == pytest.approx(2.5 / 0.65 + 1.0)


class Nodes:
    """Prefill nodes that have something to do; counts who asks."""

    def __init__(self) -> None:
        self.load, self.asked = NodeLoad(), 0

    async def least_load(self, prompt_tokens: int) -> NodeLoad:
        assert prompt_tokens
        self.asked += 1
        return self.load


def placement(
    nodes: Nodes,
    *,
    limit: int | None = None,
    has_prefill_nodes: bool = True,
    is_tried: bool = True,
    counters: RequestCounters | None = None,
    bytes_per_second: float = 1e6,
) -> Placement:
    """Here so much is read; there 1,000 tokens take 5 s, and the link carries 1 MB/s."""
    costs = PromptCosts(costs_at(bytes_per_second), HandoffCosts(MODEL), MODEL.kv_token_bytes)
    if is_tried:
        costs.there.learn(1000, 5.0, 1_000_000, 1.0)
    return Placement(
        limit=limit,
        has_prefill_nodes=has_prefill_nodes,
        costs=costs,
        load=EngineLoad,
        least_load=nodes.least_load,
        counters=counters or RequestCounters(),
    )


async def place(of: Placement, tokens: int, stored: int) -> PlacementDecision:
    return await of.place("r", tokens, stored, wants_profile=False)


async def test_little_that_is_missing_of_much_is_computed_here_though_it_is_more_than_256():
    nodes = Nodes()
    # By hand: behind 10,000 a chunk has 25 tokens; 264 are 11 chunks of 2 MB and 25 x 10,144.5 KB,
    # 2,812 s. There: 10,264 tokens have 73.2 M operations, 146 s, and 264 KB more.
    decision = await place(placement(nodes), 10_264, 10_000)
    assert not decision.is_local
    assert decision.here_seconds == pytest.approx(11 * (2 + 25 * 10.1445), rel=1e-3)
    assert decision.there_seconds == pytest.approx(146.4 + 0.264, rel=1e-3)
    # A node that reads 100 MB/s needs 28 s for it.
    decision = await place(placement(nodes, bytes_per_second=1e8), 10_264, 10_000)
    assert (decision.is_local, decision.reason) == (True, PlacementReason.COST)


async def test_prefill_nodes_are_asked_for_their_queue_only_if_they_would_be_sooner():
    nodes = Nodes()
    # By hand: 1 of 100 tokens: 1 MB and 100 KB here, 1.0995 s; there 0.41 s and 1 KB.
    decision = await place(placement(nodes), 100, 99)
    assert (decision.is_local, nodes.asked) == (False, 1)
    # Behind 0.7 s of others it would be done later there.
    nodes.load = NodeLoad(200, 200, seconds_before=0.7)
    decision = await place(placement(nodes), 100, 99)
    assert (decision.is_local, nodes.asked) == (True, 2)
    assert decision.there_seconds == pytest.approx(0.7 + 0.41 + 0.001)
    # It does not matter how much comes after it.
    nodes.load = NodeLoad(20, 512_000, seconds_before=0.1)
    decision = await place(placement(nodes), 100, 99)
    assert (decision.is_local, nodes.asked) == (False, 3)
    # 1 of 1,000: 2 s here, 5 s there, whatever waits.
    decision = await place(placement(nodes), 1000, 999)
    assert (decision.is_local, nodes.asked) == (True, 3)


@pytest.mark.parametrize(
    ("tokens", "stored", "is_local"),
    [(256, 0, True), (257, 0, False), (2400, 2100, True), (2400, 2099, False)],
)
async def test_before_the_first_hand_off_what_is_little_is_computed_here(tokens, stored, is_local):
    # By hand: up to 256 tokens, or up to an eighth of the prompt.
    decision = await place(placement(Nodes(), is_tried=False), tokens, stored)
    assert decision == PlacementDecision(is_local, PlacementReason.UNTRIED)


async def test_without_a_prefill_node_all_is_computed_here():
    decision = await place(placement(Nodes(), has_prefill_nodes=False), 100_000, 0)
    assert decision == PlacementDecision(True, PlacementReason.NO_PREFILL_NODE)


@pytest.mark.parametrize("has_prefill_nodes", [False, True])
async def test_a_limit_decides_alone(has_prefill_nodes: bool):
    nodes = Nodes()
    for limit, stored, is_local in ((9, 991, True), (9, 990, False), (0, 999, False)):
        of = placement(nodes, limit=limit, has_prefill_nodes=has_prefill_nodes)
        assert await place(of, 1000, stored) == PlacementDecision(is_local, PlacementReason.SETTING)
    assert nodes.asked == 0


async def test_a_decision_is_counted_and_said_with_its_figures(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, logger="services.decode.placement")
    counters = RequestCounters()
    await place(placement(Nodes(), counters=counters), 100, 99)
    assert counters.placements["prefill", "cost"] == 1
    assert counters.placements["decode", "cost"] == 0
    (line,) = caplog.messages
    assert "computed_by=prefill reason=cost prompt_tokens=100 missing_tokens=1" in line
    assert "decode_seconds=1.099" in line
    assert "prefill_seconds=0.411" in line
