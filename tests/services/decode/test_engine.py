"""The decode engine without a model: what it hands to attention, and what it counts."""

from __future__ import annotations

import queue
from types import SimpleNamespace

import torch

from fluxion_core.decode_step import StepReads
from fluxion_core.generation.sampling import SamplingParams
from fluxion_core.selector.policy import ExactPolicy, ThresholdPolicy
from services.decode.engine import DecodeEngine, DecodeSequence
from services.decode.read_totals import ReadTotals

READS = StepReads(
    scanned_bytes=10,
    attended_bytes=20,
    region_bytes=120,
    streaming_heads=3,
    planned_heads=12,
    groups_of_size=(1, 0, 2, 0),
    groups_nothing=1,
    groups_everything=0,
)
NO_REGION = StepReads(scanned_bytes=0, attended_bytes=0)


class FakeDecoder:
    """Always makes token 1."""

    embedding = torch.zeros(2, 4)

    def __call__(self, token_ids, positions, attention):
        del positions, attention
        return torch.zeros(len(token_ids), 4)

    def logits(self, hidden):
        return torch.tensor([[0.0, 1.0]]).expand(len(hidden), 2)


class FakeAttention:
    """Every step of a sequence with a policy that chooses reads READS."""

    def __init__(self) -> None:
        self.begun: list[list[tuple[object, object, object]]] = []

    def begin_step(self, sequences, policies, states):
        self.begun.append(list(zip(sequences, policies, states, strict=True)))

    def end_step(self):
        return [READS if state is not None else NO_REGION for _, _, state in self.begun[-1]]


def sequence_of(policy, state, num_tokens: int, ends: queue.Queue) -> DecodeSequence:
    left = iter(range(num_tokens - 1, -1, -1))
    return DecodeSequence(
        request_id="r",
        kv=SimpleNamespace(num_tokens=9),
        policy=policy,
        planner_state=state,
        prompt_token_ids=[0],
        generated_token_ids=[1],
        sampling=SamplingParams(),
        on_token=lambda _: next(left) > 0,
        on_end=ends.put,
    )


def test_each_sequence_brings_its_policy_and_state_and_gets_what_it_read():
    attention, ends = FakeAttention(), queue.Queue()
    engine = DecodeEngine(FakeDecoder(), attention)
    state = object()
    planned = sequence_of(ThresholdPolicy(0.1), state, 3, ends)
    exact = sequence_of(ExactPolicy(), None, 2, ends)
    engine.submit(planned)
    engine.submit(exact)
    engine.start()
    assert [ends.get(timeout=60) for _ in range(2)] == [None, None]
    engine.stop()
    both = [
        (planned.kv, ThresholdPolicy(0.1), state),
        (exact.kv, ExactPolicy(), None),
    ]
    assert attention.begun == [both, both, both[:1]]
    # By hand: three steps of 10 and 20 bytes out of 120.
    assert (planned.reads.scanned_bytes, planned.reads.attended_bytes) == (30, 60)
    assert planned.reads.share_of_exact == 90 / 360
    assert planned.reads.streaming_share == 9 / 36
    assert planned.reads.groups_of_size == [3, 0, 6, 0]
    assert planned.reads.groups_nothing == 3
    assert exact.reads == ReadTotals()
    assert (exact.reads.share_of_exact, exact.reads.streaming_share) == (0, 0)
    statistics = engine.statistics()
    assert (statistics.steps, statistics.tokens) == (3, 5)
    assert statistics.reads == planned.reads


def test_statistics_are_a_copy():
    engine = DecodeEngine(FakeDecoder(), FakeAttention())
    taken = engine.statistics()
    taken.reads.add(READS)
    assert engine.statistics().reads == ReadTotals()


def test_a_rest_counts_while_it_lasts() -> None:
    engine = DecodeEngine(SimpleNamespace(embedding=torch.zeros(1)), SimpleNamespace())  # type: ignore[arg-type]
    engine.start()
    try:
        while not engine.statistics().idle_seconds:
            pass
        first = engine.statistics().idle_seconds
        assert engine.statistics().idle_seconds > first
    finally:
        engine.stop()
