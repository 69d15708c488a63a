"""Samples say what a direct computation says, and steps do not notice that they are taken."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fluxion_core.decode.head_errors import HeadErrorSampling
from fluxion_core.decode.host.attention import HostAttention
from fluxion_core.decode.step import HeadErrorSample, StepReads
from fluxion_core.geometry import BLOCK_SIZES
from fluxion_core.kernels.sparse_attention import reference
from fluxion_core.kvstore.digest_index import gather_kv
from fluxion_core.planning.constants import BUDGETS
from fluxion_core.planning.head_profile import log_squared_errors
from fluxion_core.planning.planner import Planner
from fluxion_core.planning.policy import (
    ExactPolicy,
    FixedPolicy,
    MarginalPolicy,
    Policy,
    ThresholdPolicy,
)
from fluxion_core.pool.cpu_pool import CpuPool
from tests.fluxion_core.decode.rows import rows_of
from tests.fluxion_core.planning.predicted_step import (
    DIM,
    GROUP,
    HEADS,
    KV_HEADS,
    LAYERS,
    WINDOW,
    Decoded,
    fill,
    make_store,
    oracle_plan,
    oracle_profile,
    oracle_step,
    token,
)
from tests.fluxion_core.planning.random_planner import make_planner, random_network

POLICIES: list[Policy] = [
    *(MarginalPolicy(20.0), ThresholdPolicy(0.6), FixedPolicy(32, 0.1), ExactPolicy())
]


class Steps:
    """Steps of rows with random tokens, and what came of the last one."""

    def __init__(
        self,
        planner: Planner,
        lengths: list[int],
        policies: list[Policy],
        *,
        one_in: int,
        threads: int = 2,
        digest_bits: int = 16,
    ) -> None:
        store = make_store(digest_bits)
        self.sequences = [fill(store, planner, length, i) for i, length in enumerate(lengths)]
        self.policies = policies
        pool = CpuPool(threads)
        self.sampling = (
            HeadErrorSampling(store.geometry, HEADS, pool, one_in=one_in) if one_in else None
        )
        self.attention = HostAttention(
            store, WINDOW, num_heads=HEADS, pool=pool, planner=planner, sampling=self.sampling
        )
        self.generator = torch.Generator().manual_seed(5)
        self.rows: list[Tensor] = []
        self.outputs = torch.empty(0)
        self.reads: list[StepReads] = []

    def draw(self) -> None:
        """The tokens of the next step."""
        self.rows = [token(self.generator) for _ in self.sequences]

    def run(self) -> None:
        """A step of what was drawn; outputs are [rows, layers, heads, head_dim]."""
        self.attention.begin_step(
            rows_of(
                [s.kv for s in self.sequences], self.policies, [s.state for s in self.sequences]
            )
        )
        outputs = []
        for layer in range(LAYERS):
            parts = torch.stack([row[layer] for row in self.rows]).split((HEADS, 2, 2), dim=1)
            outputs.append(self.attention.attend(layer, *parts))
        self.outputs = torch.stack(outputs, 1)
        self.reads = self.attention.end_step()


def exact_outputs(sequence: Decoded, rows: Tensor, layer: int) -> Tensor:
    """[heads, head_dim] float64 over all tokens, the newest included."""
    outputs = []
    for head in range(HEADS):
        key, value = gather_kv(sequence.kv, layer, head // GROUP)
        outputs.append(reference.attend(rows[layer, head : head + 1].double(), key, value)[0])
    return torch.cat(outputs)


def error_of_group(output: Tensor, full: Tensor, kv_head: int) -> float:
    """Mean squared error; full outputs of the group alone are at hand."""
    group = slice(kv_head * GROUP, (kv_head + 1) * GROUP)
    norms = output.norm(dim=-1)
    norms[group] = full[group].norm(dim=-1)
    return float(((output - full)[group].norm(dim=-1) / norms.max()).square().mean())


@pytest.mark.parametrize("digest_bits", [16, 8])
@pytest.mark.parametrize("mode", ["network", "training-free"])
def test_every_group_measured_is_a_direct_computation(mode: str, digest_bits: int):
    network = random_network(3) if mode == "network" else None
    planner = make_planner(LAYERS, HEADS, KV_HEADS, DIM, network=network, digest_bits=digest_bits)
    lengths = [1301, 1000, 2047, 1301]
    steps = Steps(planner, lengths, POLICIES, one_in=1, digest_bits=digest_bits)
    assert steps.sampling is not None
    for sequence in steps.sequences:
        # Enough for all groups.
        steps.sampling._account(sequence.kv).free_bytes = 1e12
    steps.draw()
    plans = [
        [
            square
            for layer in range(LAYERS)
            for square in expected_squares(planner, s, rows, layer, policy, digest_bits)
        ]
        for s, rows, policy in zip(steps.sequences[:2], steps.rows, POLICIES, strict=False)
    ]
    steps.run()
    assert [len(read.head_errors) for read in steps.reads] == [4, 4, 4, 0]
    for index, sequence in enumerate(steps.sequences[:3]):
        found = sorted(sample.squared_error for sample in steps.reads[index].head_errors)
        truth = []
        for layer in range(LAYERS):
            full = exact_outputs(sequence, steps.rows[index], layer)
            output = steps.outputs[index, layer].double()
            truth += [error_of_group(output, full, kv_head) for kv_head in range(KV_HEADS)]
        assert found == pytest.approx(sorted(truth), rel=1e-3, abs=1e-9)
        assert max(truth) > 1e-3
    for index in range(2):
        predicted = [sample.predicted for sample in steps.reads[index].head_errors]
        assert None not in predicted
        assert sorted(map(float, predicted)) == pytest.approx(sorted(plans[index]), rel=1e-3)
    assert [sample.predicted for sample in steps.reads[2].head_errors] == [None] * 4


def expected_squares(
    planner: Planner, sequence: Decoded, rows: Tensor, layer: int, policy: Policy, digest_bits: int
) -> list[float]:
    """Of each group, the mean of what its plan was made with, by the reference's plan."""
    step = oracle_step(sequence, rows, layer, digest_bits)
    plans = oracle_plan(planner, sequence, step, layer, policy)
    if planner.weights.network is None:
        logs = sequence.profiles[layer].spread_log_squares
    else:
        logs = log_squared_errors(oracle_profile(planner, sequence, step, layer))[0]
    squares = []
    for head in range(HEADS):
        kv_head, inside = divmod(head, GROUP)
        budget = float(plans.budgets[0, kv_head, inside])
        level = max(0, int(plans.levels[0, kv_head]))
        at = (*BUDGETS, 1.0).index(budget)
        squares.append(0.0 if budget == 1 else float(logs[head, level, at].exp()))
    return [float(np.mean(squares[i : i + GROUP])) for i in range(0, HEADS, GROUP)]


def test_a_group_that_reads_everything_is_not_read_again():
    planner = make_planner(LAYERS, HEADS, KV_HEADS, DIM, network=random_network(3))
    steps = Steps(planner, [1000], [ThresholdPolicy(1e-30)], one_in=1)
    for _ in range(2):
        steps.draw()
        steps.run()
    assert steps.reads[0].head_errors
    assert set(steps.reads[0].head_errors) == {HeadErrorSample(0.0, 0.0, 0)}


def test_tokens_and_reads_are_the_same_bits_with_samples_and_without():
    planner = make_planner(LAYERS, HEADS, KV_HEADS, DIM, network=random_network(3))
    lengths, results, taken = [40, 337, 1000, 1301], [], 0
    for one_in in (0, 1, 7):
        steps = Steps(planner, lengths, POLICIES, one_in=one_in)
        for _ in range(12):
            steps.draw()
            steps.run()
            taken += sum(len(read.head_errors) for read in steps.reads)
            bytes_read = [(r.scanned_bytes, r.attended_bytes) for r in steps.reads]
            results.append((one_in, steps.outputs, bytes_read))
    assert taken > 50
    plain = [result for result in results if result[0] == 0]
    for one_in in (1, 7):
        for (_, *without), (_, *sampled) in zip(
            plain, [result for result in results if result[0] == one_in], strict=True
        ):
            assert torch.equal(without[0], sampled[0])
            assert without[1] == sampled[1]


def test_what_is_sampled_of_a_row_depends_neither_on_its_company_nor_on_the_threads():
    planner = make_planner(LAYERS, HEADS, KV_HEADS, DIM, network=random_network(3))
    lengths = [1301, 1000, 500]
    together = Steps(planner, lengths, POLICIES[:3], one_in=3, threads=2)
    by_itself = [Steps(planner, lengths, POLICIES[:3], one_in=3, threads=1) for _ in lengths]
    seen = 0
    for _ in range(20):
        together.draw()
        together.run()
        for index, alone in enumerate(by_itself):
            if len(alone.sequences) > 1:
                alone.sequences = alone.sequences[index : index + 1]
                alone.policies = alone.policies[index : index + 1]
            alone.rows = together.rows[index : index + 1]
            alone.run()
            assert alone.reads[0] == together.reads[index]
        seen += sum(len(read.head_errors) for read in together.reads)
    assert seen > 20


def test_samples_cost_the_share_of_bytes_that_was_asked_for():
    planner = make_planner(LAYERS, HEADS, KV_HEADS, DIM, network=None)
    lengths = [1301] * 6
    steps = Steps(planner, lengths, [FixedPolicy(16, 0.1)] * 6, one_in=8)
    sampled = read = 0
    geometry = steps.sequences[0].kv.store.geometry
    for _ in range(20):
        steps.draw()
        steps.run()
        for one, sequence in zip(steps.reads, steps.sequences, strict=True):
            sampled += sum(sample.read_bytes for sample in one.head_errors)
            window = sequence.kv.num_tokens * geometry.token_bytes - one.region_bytes
            read += one.total_bytes + window
    groups = LAYERS * KV_HEADS
    # Each sequence may be a whole group away from its share, in either direction.
    assert sampled == pytest.approx(read / 8, abs=6 * 1340 * geometry.token_bytes / groups)
    assert sampled > 0


def test_layers_and_kv_heads_are_drawn_alike():
    planner = make_planner(LAYERS, HEADS, KV_HEADS, DIM, network=None)
    steps = Steps(planner, [1301] * 6, [FixedPolicy(16, 0.1)] * 6, one_in=4)
    sampling = steps.sampling
    assert sampling is not None
    drawn = dict.fromkeys([(layer, head) for layer in range(LAYERS) for head in range(2)], 0)
    for _ in range(20):
        steps.draw()
        steps.run()
        for layer, picks in sampling._due.items():
            for _, kv_head in picks:
                drawn[layer, kv_head] += 1
    total = sum(drawn.values())
    assert total > 40
    assert all(count > total / 8 for count in drawn.values())


@pytest.mark.parametrize("where", ["query", "key", "value"])
def test_a_damaged_rows_samples_are_left_out(where: str):
    bad = {"query": slice(HEADS), "key": slice(HEADS, -KV_HEADS), "value": slice(-KV_HEADS, None)}
    planner = make_planner(LAYERS, HEADS, KV_HEADS, DIM, network=None)
    policies: list[Policy] = [FixedPolicy(16, 0.1), FixedPolicy(16, 0.1)]
    steps = Steps(planner, [1000, 1000], policies, one_in=1)
    for is_bad in (False, True):
        steps.draw()
        if is_bad:
            steps.rows[0][:, bad[where]] = torch.nan
        steps.run()
    assert steps.reads[0].head_errors == ()
    assert len(steps.reads[1].head_errors) > 0


def test_without_a_region_there_is_nothing_to_measure():
    planner = make_planner(LAYERS, HEADS, KV_HEADS, DIM, network=None)
    steps = Steps(planner, [100], [FixedPolicy(BLOCK_SIZES[0], 0.1)], one_in=1)
    for _ in range(3):
        steps.draw()
        steps.run()
    assert steps.reads == [StepReads(0, 0)]
