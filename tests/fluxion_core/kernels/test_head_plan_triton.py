"""Plans made by the GPU's kernels against features, network and selector in torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from fluxion_core.decode.device.pinned import RegisteredStore
from fluxion_core.decode.device.planner import pack_weights
from fluxion_core.decode.device.windows import DeviceWindows
from fluxion_core.errors import ShapeError
from fluxion_core.geometry import KvGeometry, WindowSpec
from fluxion_core.kernels.block_digest import reference as digests
from fluxion_core.kernels.block_score import reference as block_score
from fluxion_core.kernels.dense_attention.triton import WindowAttention
from fluxion_core.kernels.head_plan import triton as words_of
from fluxion_core.kernels.head_plan.launch import (
    CoarseCopies,
    HeadPlan,
    PlanScratch,
    PlanWeights,
    SlotMemory,
    copy_coarse,
)
from fluxion_core.kvstore.step_append import StepAppend
from fluxion_core.kvstore.store import HostKvStore
from fluxion_core.planning.choice_reference import blocks_of, by_price, by_threshold
from fluxion_core.planning.constants import RADII, READ_ALL, READ_NOTHING
from fluxion_core.planning.head_profile import log_squared_errors
from fluxion_core.planning.layer_step import LayerStep
from fluxion_core.planning.planner import Planner, native_policy
from fluxion_core.planning.policy import MarginalPolicy, PredictedPolicy, ThresholdPolicy
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
    oracle_profile,
    oracle_step,
    token,
)
from tests.fluxion_core.planning.random_planner import make_planner, random_network

SOME = (40, 337, 1301)
"""Without a region, with one of few blocks, across slabs."""
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def both_see(tensor: Tensor) -> Tensor:
    """Memory that the host and the GPU see."""
    return tensor.pin_memory() if DEVICE.type == "cuda" else tensor


@dataclass
class Machine:
    """A device's windows and planner for some sequences, one to each row and slot."""

    store: HostKvStore
    planner: Planner
    sequences: list[Decoded]

    def __post_init__(self) -> None:
        geometry, rows = self.store.geometry, len(self.sequences)
        self.registered = RegisteredStore(self.store) if DEVICE.type == "cuda" else None
        self.attention = WindowAttention(WINDOW, HEADS, KV_HEADS, DIM)
        self.windows = DeviceWindows(geometry, WINDOW, rows, DEVICE)
        store = self.store
        self.copies = CoarseCopies.of(
            geometry, store.num_slabs, store.arena_address, store.slab_stride_bytes, DEVICE
        )
        self.weights: PlanWeights = pack_weights(self.planner, DEVICE)
        self.plan = HeadPlan(
            geometry, WINDOW, HEADS, self.attention.num_splits, self.copies, 16,
            self.weights.biases[0].shape[0], parts=2,
        )  # fmt: skip
        self.memory: SlotMemory = self.plan.make_memory(rows, DEVICE)
        self.scratch: PlanScratch = self.plan.make_scratch(rows, DEVICE)
        self.slots = []
        for sequence in self.sequences:
            sequence.kv.slab_table = both_see(sequence.kv.slab_table)
            slot = self.windows.join(sequence.kv)
            self.slots.append(slot)
            estimates = sequence.state.estimates()
            self.memory.estimates[:, slot, :, :13] = estimates.to(DEVICE)
        self.levels = both_see(torch.full((LAYERS, rows, KV_HEADS), 99, dtype=torch.int32))
        self.budgets = both_see(torch.full((LAYERS, rows, HEADS), 99, dtype=torch.int32))
        self.planned = both_see(torch.zeros(LAYERS, rows, KV_HEADS, dtype=torch.int32))
        self.steps = 0

    def close(self) -> None:
        if self.registered is not None:
            torch.cuda.synchronize()
            self.registered.close()

    def step(self, policy: PredictedPolicy, rows: list[Tensor]) -> list[Tensor]:
        """One step's plans of all layers; per layer the profiles [rows, heads, 11]."""
        by_mode, number = native_policy(policy)
        inputs = np.zeros((len(rows), 8), dtype=np.int64)
        for index, sequence in enumerate(self.sequences):
            region = WINDOW.retrieval_region(sequence.kv.num_tokens + 1)
            if not region:
                continue
            inputs[index, words_of.MODE.value] = 2 if by_mode else 1
            inputs[index, words_of.NUMBER.value] = np.float32(number).view(np.int32)
            inputs[index, words_of.REGION_BEGIN.value] = region.start
            inputs[index, words_of.REGION_END.value] = region.stop
            inputs[index, words_of.IS_KNOWN.value] = bool(sequence.memory[0].is_known)
            inputs[index, words_of.SLAB_TABLE.value] = sequence.kv.slab_table.data_ptr()
        words = torch.from_numpy(inputs).to(DEVICE)
        lengths = [sequence.kv.num_tokens + 1 for sequence in self.sequences]
        on_device = torch.tensor([self.slots, lengths], dtype=torch.int32, device=DEVICE)
        self.steps += 1
        number_of_step = torch.tensor([self.steps], dtype=torch.int32, device=DEVICE)
        for sequence in self.sequences:
            copy_coarse(self.store.geometry, sequence.kv.slab_table, self.copies)
        self.plan.list_slabs(words, self.scratch)
        profiles = []
        for layer in range(LAYERS):
            query, key, value = torch.stack([r[layer] for r in rows]).split((HEADS, 2, 2), dim=1)
            for row, slot in enumerate(self.slots):
                entry = WINDOW.slot_index(lengths[row] - 1)
                self.windows.key(layer)[slot, :, entry] = key[row].bfloat16().to(DEVICE)
                self.windows.value(layer)[slot, :, entry] = value[row].bfloat16().to(DEVICE)
            states = self.attention.make_states(len(rows), DEVICE)
            queries = query.contiguous().to(DEVICE)
            window_key = self.windows.key(layer)
            self.attention.launch(
                queries, window_key, self.windows.value(layer), *on_device, states
            )
            self.plan.launch(
                layer, words, *on_device, queries, window_key, states, self.weights, self.memory,
                self.scratch, self.levels[layer], self.budgets[layer], self.planned[layer],
                number_of_step,
            )  # fmt: skip
            shares = self.scratch.shares.sum(1) + self.weights.biases[2]
            profiles.append(shares[:, :HEADS, :11].cpu())
        return profiles


@pytest.mark.parametrize(
    ("policy", "digest_bits"),
    [(ThresholdPolicy(0.6), 16), (MarginalPolicy(20.0), 16), (MarginalPolicy(20.0), 8)],
    ids=str,
)
def test_profiles_and_plans_are_those_of_torch(digest_bits: int, policy: PredictedPolicy):
    planner = make_planner(
        LAYERS, HEADS, KV_HEADS, DIM, network=random_network(3), digest_bits=digest_bits
    )
    store = make_store(digest_bits)
    sequences = [fill(store, planner, length, seed) for seed, length in enumerate(SOME)]
    machine = Machine(store, planner, sequences)
    try:
        seen_levels = follow(machine, policy, digest_bits)
    finally:
        machine.close()
    assert len(seen_levels) >= 2


def follow(machine: Machine, policy: PredictedPolicy, digest_bits: int) -> set[int]:
    """Two steps, each plan held against the oracle's; which levels there were."""
    store, planner, sequences = machine.store, machine.planner, machine.sequences
    generator = torch.Generator().manual_seed(11)
    seen_levels: set[int] = set()
    for _ in range(2):
        rows = [token(generator) for _ in sequences]
        profiles = machine.step(policy, rows)
        append = StepAppend(store.geometry, [sequence.kv for sequence in sequences])
        for layer in range(LAYERS):
            _, key, value = torch.stack([r[layer] for r in rows]).split((HEADS, 2, 2), dim=1)
            append.append(layer, key.contiguous(), value.contiguous())
            for index, sequence in enumerate(sequences):
                step = oracle_step(sequence, rows[index], layer, 16)
                levels, budgets = machine.levels[layer, index], machine.budgets[layer, index]
                if not step.in_region.any():
                    assert torch.all(levels == 99)
                    assert not machine.planned[layer, index].any()
                    continue
                assert torch.all(machine.planned[layer, index] == machine.steps)
                if digest_bits == 8:
                    score_by_spans(sequence, step, rows[index][layer, :HEADS], layer)
                expected = oracle_profile(planner, sequence, step, layer)[0]
                torch.testing.assert_close(profiles[layer][index], expected, atol=2e-3, rtol=1e-4)
                weights = planner.weights.head_weights[layer].view(KV_HEADS, GROUP)
                region = WINDOW.retrieval_region(sequence.kv.num_tokens + 1)
                profile = profiles[layer][index]
                expect_plan(planner, policy, weights, profile, region, levels, budgets)
                seen_levels.update(levels.tolist())
                remember(machine, sequence, step, layer, index, levels, budgets)
        append.advance([False] * len(sequences))
    return seen_levels


def score_by_spans(sequence: Decoded, step: LayerStep, query: Tensor, layer: int) -> None:
    """Scores of 128-token blocks by the store's 8-bit digests. The CPU's own round the query."""
    geometry, store = sequence.kv.store.geometry, sequence.kv.store
    region = WINDOW.retrieval_region(sequence.kv.num_tokens + 1)
    touched = slice(region.start // 128, -(-region.stop // 128))
    for kv_head in range(KV_HEADS):
        offset = geometry.digest_offset(layer, kv_head, 3) - geometry.kv_bytes
        spans = [
            store.slab_digests(slab).flatten()[offset : offset + geometry.level_bytes(3)]
            for slab in sequence.kv.slabs
        ]
        records = torch.stack(spans).view(-1, geometry.record_bytes(3))
        low, high = (part[touched] for part in digests.unpack_spans(records, DIM))
        of_group = query[kv_head * GROUP : (kv_head + 1) * GROUP]
        scores = block_score.score(of_group, low, high, RADII[-1]) / DIM**0.5
        step.bounds[-1][0, kv_head, :, touched] = scores


def expect_plan(
    planner: Planner,
    policy: PredictedPolicy,
    weights: Tensor,
    profile: Tensor,
    region: range,
    levels: Tensor,
    budgets: Tensor,
) -> None:
    """The plan is what the selector makes of a profile. weights: [kv_heads, group], of heads."""
    kv_heads, group = weights.shape
    logs = torch.unflatten(log_squared_errors(profile)[None], 1, (kv_heads, group))
    cost = planner.weights.cost
    if isinstance(policy, ThresholdPolicy):
        plans = by_threshold(logs, torch.tensor([policy.error]), cost)
    else:
        assert isinstance(policy, MarginalPolicy)
        plans = by_price(logs, torch.tensor([policy.price]), cost, weights)
    for kv_head in range(kv_heads):
        level = int(plans.levels[0, kv_head])
        shares = plans.budgets[0, kv_head].tolist()
        blocks = [blocks_of(share, region, max(level, 0)) for share in shares]
        if level != READ_NOTHING and all(n == blocks_of(1.0, region, level) for n in blocks):
            level = READ_ALL
        assert int(levels[kv_head]) == level
        assert level == READ_NOTHING or (
            budgets[kv_head * group : (kv_head + 1) * group].tolist() == blocks
        )


def remember(
    machine: Machine,
    sequence: Decoded,
    step: LayerStep,
    layer: int,
    index: int,
    levels: Tensor,
    budgets: Tensor,
) -> None:
    """What the oracle and the kernels know of the step in the next one."""
    region = WINDOW.retrieval_region(sequence.kv.num_tokens + 1)
    chosen_levels = torch.where(levels == READ_ALL, 0, levels).long()[None]
    shares = torch.zeros(1, KV_HEADS, GROUP)
    for head in range(HEADS):
        level = int(chosen_levels[0, head // GROUP])
        if level >= 0:
            whole = blocks_of(1.0, region, level)
            of_all = int(levels[head // GROUP]) == READ_ALL
            shares[0, head // GROUP, head % GROUP] = 1.0 if of_all else int(budgets[head]) / whole
    chosen = step.chosen_blocks(chosen_levels, shares)
    _, read_lse = step.attend(chosen)
    memory = step.remember(chosen, read_lse)
    sequence.memory[layer] = memory
    told = torch.stack((memory.read_lse[0], memory.read_share[0]), -1)
    machine.memory.told[layer, machine.slots[index]] = told.to(DEVICE)


@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (8, 2), (7, 1), (16, 1)])
@pytest.mark.parametrize(
    "policy",
    [ThresholdPolicy(0.05), ThresholdPolicy(0.7), MarginalPolicy(0.3), MarginalPolicy(30.0)],
    ids=str,
)
def test_choices_are_the_selectors(heads: int, kv_heads: int, policy: PredictedPolicy):
    rows, tiles, head_rows, group = 3, 2, 16, heads // kv_heads
    planner = make_planner(1, heads, kv_heads, DIM, network=random_network(3))
    weights = pack_weights(planner, DEVICE)
    generator = torch.Generator().manual_seed(heads)
    shares = torch.randn(rows, tiles, head_rows, 16, generator=generator)
    shares[..., :8] += -1.0 - 0.5 * torch.arange(8)
    shares[..., 8:11] = shares[..., 8:11] * 0.1 + 0.2
    regions = [range(64, 80), range(64, 1296), range(128, 70_000)]
    is_by_price, number = native_policy(policy)
    words = np.zeros((rows, 8), dtype=np.int64)
    words[:, words_of.MODE.value] = 2 if is_by_price else 1
    words[:, words_of.NUMBER.value] = np.float32(number).view(np.int32)
    words[:, words_of.REGION_BEGIN.value] = [region.start for region in regions]
    words[:, words_of.REGION_END.value] = [region.stop for region in regions]
    sights = torch.randn(rows, heads, 8, generator=generator)
    best = torch.randn(rows, head_rows, generator=generator)
    seen = torch.zeros(5, heads, 2, device=DEVICE)
    slots = torch.tensor([4, 0, 2], dtype=torch.int32, device=DEVICE)
    levels = both_see(torch.full((rows, kv_heads), 99, dtype=torch.int32))
    budgets = both_see(torch.full((rows, heads), 99, dtype=torch.int32))
    planned = both_see(torch.zeros(rows, kv_heads, dtype=torch.int32))
    kept = torch.empty_like(levels, device=DEVICE), torch.empty_like(budgets, device=DEVICE)
    words_of.choose[(rows, kv_heads)](
        torch.from_numpy(words).to(DEVICE), slots, shares.to(DEVICE), weights.biases[2],
        weights.head_weights[0], weights.costs, sights.to(DEVICE), best.to(DEVICE), seen, levels,
        budgets, planned, *kept, torch.tensor([7], dtype=torch.int32, device=DEVICE), GROUP=group,
        GROUP_ROWS=1 << (group - 1).bit_length(), HEAD_ROWS=head_rows, TILES=tiles, IS_KEPT=True,
    )  # fmt: skip
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    assert torch.all(planned == 7)
    assert torch.equal(kept[0].cpu(), levels.cpu())
    assert torch.equal(kept[1].cpu(), budgets.cpu())
    of_heads = planner.weights.head_weights[0].view(kv_heads, group)
    for row, region in enumerate(regions):
        profile = shares[row, :, :heads, :11].sum(0) + weights.biases[2][:11].cpu()
        expect_plan(planner, policy, of_heads, profile, region, levels[row], budgets[row])
        remembered = seen[slots[row]].cpu()
        assert torch.equal(remembered[:, 0], sights[row, :, 0])
        assert torch.equal(remembered[:, 1], best[row, :heads])


def test_shapes_that_no_kernel_takes_are_refused():
    geometry = KvGeometry(2, 1, 32)
    place = CoarseCopies.of(geometry, 1, 0, 1, torch.device("cpu"))
    with pytest.raises(ShapeError, match="17 to a KV head"):
        HeadPlan(geometry, WindowSpec(), 17, 6, place, 4, 320)
    with pytest.raises(ShapeError, match="multiple of 64"):
        HeadPlan(geometry, WindowSpec(), 4, 6, place, 4, 312)
