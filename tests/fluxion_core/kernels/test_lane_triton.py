"""Whole tasks of the GPU lane against scores, choice and attention in float64."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from fluxion_core.errors import ShapeError
from fluxion_core.geometry import BLOCK_SIZES, BLOCK_TOKENS, KvGeometry, ceil_div
from fluxion_core.kernels import lane_task
from fluxion_core.kernels.block_digest import cpu as block_digest
from fluxion_core.kernels.block_digest import reference as digests
from fluxion_core.kernels.block_score import reference as block_score
from fluxion_core.kernels.block_topk import reference as block_topk
from fluxion_core.kernels.block_topk.triton import choose_blocks
from fluxion_core.kernels.sparse_attention import reference as sparse_attention
from fluxion_core.kernels.sparse_attention.lane import DigestCopies, LaneKernels

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LAYER, KV_HEAD = 1, 1


def both_see(tensor: Tensor) -> Tensor:
    """Memory that the host and the GPU see."""
    return tensor.pin_memory() if DEVICE.type == "cuda" else tensor


@dataclass
class Sequence:
    """A sequence in slabs with digests, of 2 layers and 2 KV heads, and one runner of the lane."""

    head_dim: int = 64
    group: int = 4
    num_tokens: int = 1024
    slab_tokens: int = 512
    digest_bits: int = 16
    programs: int = 3
    region: range = field(default_factory=lambda: range(64, 752))
    seed: int = 0
    scale: float = 1.0
    digests_on_device: bool = False

    def __post_init__(self) -> None:
        self.geometry = KvGeometry(2, 2, self.head_dim, self.slab_tokens, self.digest_bits)
        geometry = self.geometry
        generator = torch.Generator().manual_seed(self.seed)
        blocks = ceil_div(self.num_tokens, BLOCK_TOKENS)
        shape = (2, blocks, 2, BLOCK_TOKENS, self.head_dim)
        kv = (torch.randn(shape, generator=generator) * self.scale).bfloat16()
        num_slabs = geometry.slabs_for(self.num_tokens)
        # In no order, as a store's slabs are.
        arena = both_see(torch.zeros(num_slabs + 1, geometry.slab_bytes, dtype=torch.uint8))
        order = torch.randperm(num_slabs, generator=generator) + 1
        self.arena, self.table = arena, both_see(order * 0)
        for ordinal, slab in enumerate(order.tolist()):
            self.table[ordinal] = arena[slab].data_ptr()
        for ordinal, inside, count in geometry.split_by_slab(0, self.num_tokens):
            first = ordinal * geometry.slab_blocks
            block_digest.ingest_blocks(
                geometry,
                int(self.table[ordinal]),
                LAYER,
                inside,
                count,
                block_digest.payload_of(kv[:, first:]),
            )
        self.blocks = kv[KV_HEAD]
        self.query = torch.randn(self.group, self.head_dim, generator=generator)
        copies = arena[:, geometry.kv_bytes :].to(DEVICE, copy=True)
        self.copies = copies
        self.lane = LaneKernels(
            geometry,
            2 * self.group,
            self.num_tokens,
            device=DEVICE,
            programs=self.programs,
            digests=DigestCopies(arena.data_ptr(), geometry.slab_bytes, copies.data_ptr())
            if self.digests_on_device
            else None,
        )

    def records(self, level: int) -> Tensor:
        """[records, bytes] of this head's level."""
        offset, size = self.geometry.digest_offset(LAYER, KV_HEAD, level), self.geometry.level_bytes
        rows = [
            self.arena[(int(address) - self.arena.data_ptr()) // self.geometry.slab_bytes]
            for address in self.table
        ]
        whole = torch.stack([row[offset : offset + size(level)] for row in rows])
        return whole.reshape(-1, self.geometry.record_bytes(level))

    def level_blocks(self, level: int) -> range:
        """Blocks of the level that touch the region."""
        size = BLOCK_SIZES[level]
        return range(self.region.start // size, ceil_div(self.region.stop, size))

    def chosen(self, level: int, budgets: list[int], radius: float = 1.0) -> Tensor:
        """[group, 16-token blocks of the sequence] bool, by the oracles."""
        chosen = torch.zeros(self.group, self.blocks.shape[0], dtype=torch.bool)
        if level < 0:
            chosen[:, self.region.start // 16 : self.region.stop // 16] = True
            return chosen
        unpack = digests.unpack_spans if self.digest_bits == 8 else digests.unpack_tiles
        low, high = unpack(self.records(level), self.head_dim)
        touched, factor = self.level_blocks(level), BLOCK_SIZES[level] // BLOCK_TOKENS
        part = slice(touched.start, touched.stop)
        assert radius == 1.0 or self.digest_bits == 16
        center, half = (low[part] + high[part]) / 2, (high[part] - low[part]) / 2 * radius
        scores = block_score.score(self.query.double(), center - half, center + half)
        for head, budget in enumerate(budgets):
            for block in block_topk.choose_top(scores[head], budget).tolist():
                first = (touched.start + block) * factor
                chosen[head, first : first + factor] = True
        chosen[:, : self.region.start // 16] = False
        chosen[:, self.region.stop // 16 :] = False
        return chosen

    def run(
        self,
        level: int,
        budgets: list[int],
        ticket: int = 1,
        radius: float = 1.0,
        listed: tuple[Tensor, Tensor, int] | None = None,
    ) -> tuple[Tensor, Tensor, list[int]]:
        """Output, lse and statistics of one task. listed: units, masks, how many."""
        output = both_see(torch.full((self.group, self.head_dim), math.nan))
        lse = both_see(torch.full((self.group,), math.nan))
        done = both_see(torch.zeros(1, dtype=torch.int64))
        statistics = both_see(torch.full((4,), -1, dtype=torch.int64))
        query = self.query.to(DEVICE)
        touched = self.level_blocks(max(level, 0))
        geometry = self.geometry
        words = {
            lane_task.SLAB_TABLE: self.table.data_ptr(),
            lane_task.KV_OFFSET: geometry.kv_offset(LAYER, KV_HEAD),
            lane_task.RECORD_OFFSET: geometry.digest_offset(LAYER, KV_HEAD, max(level, 0)),
            lane_task.QUERY: query.data_ptr(),
            lane_task.OUTPUT: output.data_ptr(),
            lane_task.LSE: lse.data_ptr(),
            lane_task.DONE: done.data_ptr(),
            lane_task.TICKET: ticket,
            lane_task.LEVEL: level,
            lane_task.FIRST_BLOCK: touched.start,
            lane_task.NUM_BLOCKS: len(touched) if level >= 0 else 0,
            lane_task.REGION_BEGIN: self.region.start,
            lane_task.REGION_END: self.region.stop,
            lane_task.STATISTICS: statistics.data_ptr(),
            lane_task.RADIUS_LACK: struct.unpack("<i", struct.pack("<f", 1 - radius))[0],
        }
        if listed is not None:
            units, masks, words[lane_task.NUM_BLOCKS] = listed
            words[lane_task.LISTED_UNITS] = units.data_ptr()
            words[lane_task.LISTED_MASKS] = masks.data_ptr()
        self.lane.descriptor.zero_()
        for word, value in words.items():
            self.lane.descriptor[word.value] = value
        for head, budget in enumerate(budgets):
            self.lane.descriptor[lane_task.BUDGETS.value + head] = budget
        self.lane.launch()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        assert done.item() == ticket
        return output, lse, statistics.tolist()

    def check(self, level: int, budgets: list[int], radius: float = 1.0) -> None:
        """A task's output and lse against float64, and its bytes against what was chosen."""
        output, lse, (digest_bytes, kv_bytes, begin, end) = self.run(level, budgets, radius=radius)
        self.check_state(output, lse, kv_bytes, self.chosen(level, budgets, radius))
        scanned = 0
        if level >= 0:
            width, touched = self.geometry.record_blocks(level), self.level_blocks(level)
            records = ceil_div(touched.stop, width) - touched.start // width
            scanned = records * self.geometry.record_bytes(level)
        assert digest_bytes == scanned
        assert 0 < begin <= end

    def check_list(self, chosen: Tensor) -> None:
        """The same of a task with a list of what is chosen [group, blocks]; nothing is scanned."""
        units = chosen.any(0).nonzero().flatten().int()
        bits = 1 << torch.arange(self.group, dtype=torch.int32)
        masks = (chosen[:, units].int() * bits[:, None]).sum(0, dtype=torch.int32)
        # Behind a list's end is what nobody may read.
        nothing = torch.full((8,), -7, dtype=torch.int32)
        of_device = [torch.cat((part, nothing)).to(DEVICE) for part in (units, masks)]
        listed = of_device[0], of_device[1], len(units)
        output, lse, (digest_bytes, kv_bytes, begin, end) = self.run(0, [], listed=listed)
        self.check_state(output, lse, kv_bytes, chosen)
        assert digest_bytes == 0
        assert 0 < begin <= end

    def check_state(self, output: Tensor, lse: Tensor, kv_bytes: int, chosen: Tensor) -> None:
        """Output, lse and bytes against what was chosen."""
        exact, exact_lse = sparse_attention.attend_blocks(self.query.double(), self.blocks, chosen)
        plain, _ = sparse_attention.attend_blocks(self.query, self.blocks, chosen)
        allowed = 4 * (plain - exact).abs().max().item() + 2e-5
        assert (output - exact).abs().max().item() <= allowed
        torch.testing.assert_close(lse.double(), exact_lse, atol=2e-5, rtol=1e-5)
        assert kv_bytes == int(chosen.any(0).sum()) * self.geometry.block_bytes


@pytest.mark.parametrize("digest_bits", [16, 8])
@pytest.mark.parametrize("level", [-1, 0, 1, 2, 3])
def test_every_level_reads_what_its_heads_chose(level: int, digest_bits: int):
    sequence = Sequence(digest_bits=digest_bits, seed=level + digest_bits)
    sequence.check(level, [3, 0, 1, 4])


@pytest.mark.parametrize("digest_bits", [16, 8])
@pytest.mark.parametrize("level", [0, 3])
def test_copies_of_digests_serve_in_their_place(level: int, digest_bits: int):
    sequence = Sequence(digest_bits=digest_bits, seed=level, digests_on_device=True)
    expected = sequence.run(level, [3, 0, 1, 4])
    sequence.check(level, [3, 0, 1, 4])
    # The host's are not looked at any more.
    sequence.arena[:, sequence.geometry.kv_bytes :] = 255
    output, lse, (digest_bytes, *_) = sequence.run(level, [3, 0, 1, 4], ticket=2)
    assert torch.equal(output, expected[0])
    assert torch.equal(lse, expected[1])
    assert digest_bytes == expected[2][0]


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("group", [1, 3, 7, 8])
def test_every_group_and_head_dim(group: int, head_dim: int):
    sequence = Sequence(head_dim=head_dim, group=group, seed=group)
    sequence.check(0, [(5 * head + 2) % 11 for head in range(group)])


@pytest.mark.parametrize("slab_tokens", [128, 256, 1024])
@pytest.mark.parametrize("level", [0, 3])
def test_records_of_every_width(level: int, slab_tokens: int):
    Sequence(slab_tokens=slab_tokens, seed=slab_tokens).check(level, [2, 2, 1, 3])


def test_a_region_within_one_block_is_cut_out_of_it():
    # One block of 128 tokens, of which the region has 32.
    Sequence(region=range(144, 176)).check(3, [1, 0, 1, 0])


def test_budgets_beyond_what_there_is_mean_all():
    Sequence().check(2, [1000, 1000, 0, 1000])


def test_no_budget_is_the_empty_state():
    sequence = Sequence()
    output, lse, (_, kv_bytes, _, _) = sequence.run(1, [0, 0, 0, 0])
    assert torch.equal(output, torch.zeros_like(output))
    assert torch.equal(lse, torch.full_like(lse, -math.inf))
    assert kv_bytes == 0


def test_of_equal_scores_the_first_win():
    sequence = Sequence()
    sequence.query.zero_()
    sequence.check(0, [1, 7, 16, 20])


def test_a_smaller_radius_ranks_by_the_middle_of_a_block():
    sequence = Sequence(seed=5)
    budgets = [4, 4, 4, 4]
    assert not torch.equal(sequence.chosen(0, budgets, 0.25), sequence.chosen(0, budgets))
    sequence.check(0, budgets, radius=0.25)


def test_a_runner_does_one_task_after_another():
    sequence = Sequence()
    for level, budgets in [(0, [9, 9, 9, 9]), (-1, [0] * 4), (3, [1, 0, 0, 0]), (0, [1, 2, 3, 4])]:
        sequence.check(level, budgets)


@pytest.mark.parametrize(("group", "share"), [(1, 0.4), (4, 0.0), (4, 0.02), (4, 1.0), (7, 0.4)])
def test_a_list_is_read_in_place_of_a_choice(group: int, share: float):
    sequence = Sequence(group=group, seed=group)
    generator = torch.Generator().manual_seed(group)
    chosen = torch.rand(group, sequence.blocks.shape[0], generator=generator) < share
    chosen[:, : sequence.region.start // 16] = False
    chosen[:, sequence.region.stop // 16 :] = False
    sequence.check_list(chosen)


def test_a_runner_forgets_a_list_and_a_choice():
    sequence = Sequence(region=range(64, 400))
    for level, budgets in [(-1, [0] * 4), (3, [1, 0, 0, 2])]:
        sequence.check(level, budgets)
        sequence.check_list(sequence.chosen(0, [1, 2, 3, 0]))


def test_a_list_longer_than_a_program_copies_at_a_time():
    count, room = 100, 128
    units = torch.arange(200, 200 + room, dtype=torch.int32, device=DEVICE)
    masks = units % 3 + 1
    task = torch.zeros(lane_task.DEVICE_WORDS, dtype=torch.int64, device=DEVICE)
    task[lane_task.NUM_BLOCKS.value] = count
    task[lane_task.LISTED_UNITS.value] = units.data_ptr()
    task[lane_task.LISTED_MASKS.value] = masks.data_ptr()
    ids, heads = torch.full_like(units, -7), torch.full_like(units, -7)
    # What a choice needs, and a list does not.
    scores = torch.zeros(2, room, device=DEVICE)
    marks, arrivals = torch.zeros_like(scores, dtype=torch.int8), torch.zeros_like(units[:1])
    choose_blocks[(2,)](
        task, scores, marks, ids, heads, arrivals, room, GROUP=2, FEW=16, MANY=32, num_warps=4
    )
    assert torch.equal(ids[:count], units[:count])
    assert torch.equal(heads[:count], masks[:count])
    assert (ids[count:] == -7).all()
    assert (heads[count:] == -7).all()
    assert task[lane_task.NUM_LISTED.value] == task[lane_task.KV_BLOCKS.value] == count
    assert not marks.any()
    assert arrivals.item() == 0


def test_more_blocks_than_the_smaller_choice_has_room_for():
    sequence = Sequence(group=1, num_tokens=16 * 1100, region=range(64, 16 * 1080))
    sequence.check(0, [40])


def test_large_scores_neither_overflow_nor_vanish():
    sequence = Sequence(seed=3)
    sequence.query *= 200
    output, lse, _ = sequence.run(0, [5, 5, 5, 5])
    chosen = sequence.chosen(0, [5, 5, 5, 5])
    exact, exact_lse = sparse_attention.attend_blocks(
        sequence.query.double(), sequence.blocks, chosen
    )
    torch.testing.assert_close(output.double(), exact, atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(lse.double(), exact_lse, atol=1e-2, rtol=1e-5)


def test_shapes_that_no_kernel_takes_are_refused():
    geometry = KvGeometry(1, 2, 64)
    for heads, tokens in [(3, 1024), (34, 1024), (4, 0), (4, 16 << 20)]:
        with pytest.raises(ShapeError):
            LaneKernels(geometry, heads, tokens, device=DEVICE)
    with pytest.raises(ShapeError):
        LaneKernels(KvGeometry(1, 2, 80), 4, 1024, device=DEVICE)
    with pytest.raises(ShapeError):
        LaneKernels(geometry, 4, 1024, device=DEVICE, programs=0)
