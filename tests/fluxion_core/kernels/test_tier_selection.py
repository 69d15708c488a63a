"""Selection on the device: scores, choice, lists and requests against the oracle and the CPU's."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import Tensor

from fluxion_core.errors import ShapeError
from fluxion_core.geometry import BLOCK_SIZES, BLOCK_TOKENS, KvGeometry, ceil_div
from fluxion_core.kernels import _native
from fluxion_core.kernels.block_digest import cpu as block_digest
from fluxion_core.kernels.block_digest import reference as digests
from fluxion_core.kernels.block_score import reference as block_score
from fluxion_core.kernels.head_plan.constants import READ_ALL, READ_NOTHING
from fluxion_core.kernels.isa import native_layout
from fluxion_core.kernels.tier import constants, reference
from fluxion_core.kernels.tier.selection import (
    GroupLists,
    GroupSelection,
    HostLists,
    PlacedDigests,
    ScoresHook,
    TierTables,
)
from fluxion_core.pool.cpu_pool import CpuPool

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LAYERS, LAYER, KV_HEADS = 2, 1, 2
ALL, NOTHING = READ_ALL.value, READ_NOTHING.value
ABSENT, PENDING = constants.ABSENT.value, constants.PENDING.value
STEP, OLD_STEP = 7, 3
UNTOUCHED = -77
NUM_SLOTS = 320
REGION_TOKENS = 1024


def both_see(tensor: Tensor) -> Tensor:
    """Memory that the host and the GPU see."""
    return tensor.pin_memory() if DEVICE.type == "cuda" else tensor


def int32s(*shape: int, value: int = 0) -> Tensor:
    return torch.full(shape, value, dtype=torch.int32, device=DEVICE)


@dataclass
class Row:
    """A sequence in some slabs, its retrieval region, and the plan of its groups."""

    slabs: list[int] = field(default_factory=lambda: [2, 0, 3])
    region: range = field(default_factory=lambda: range(64, 592))
    levels: list[int] = field(default_factory=lambda: [0, 0])
    budgets: list[int] = field(default_factory=lambda: [3, 0, 1, 4, 2, 2, 0, 9] * 2)
    radii: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)


class Node:
    """Slabs with digests, copies of these, an empty table, and rows that select from them."""

    def __init__(
        self,
        *rows: Row,
        group: int = 4,
        head_dim: int = 16,
        slab_tokens: int = 256,
        digest_bits: int = 16,
        num_slabs: int = 5,
        max_requests: int = 300,
        region_tokens: int = REGION_TOKENS,
        is_float32: bool = False,
    ) -> None:
        # A graph for more rows than there are: the last one is padding.
        self.rows = [*rows, Row(slabs=[], region=range(0))]
        self.group, self.heads = group, KV_HEADS * group
        self.geometry = KvGeometry(LAYERS, KV_HEADS, head_dim, slab_tokens, digest_bits)
        self.generator = torch.Generator().manual_seed(group + head_dim + digest_bits)
        self._fill_slabs(num_slabs)
        self.selection = GroupSelection(
            self.geometry,
            self.heads,
            region_tokens,
            max_slabs=ceil_div(region_tokens, slab_tokens) + 1,
            digests=PlacedDigests(
                self.arena.data_ptr(),
                self.geometry.slab_bytes,
                self.copies.data_ptr(),
                self.places,
            ),
            is_float32=is_float32,
            scoring_programs=8,
        )
        self.slab_units = self.geometry.kv_bytes // self.geometry.block_bytes
        self.tables = TierTables(
            int32s(num_slabs * self.slab_units, value=ABSENT),
            int32s(NUM_SLOTS, value=OLD_STEP),
            int32s(max_requests, value=UNTOUCHED),
            int32s(1),
        )
        self.query = torch.randn(len(self.rows), self.heads, head_dim, generator=self.generator).to(
            DEVICE
        )

    def _fill_slabs(self, num_slabs: int) -> None:
        geometry = self.geometry
        self.arena = both_see(torch.zeros(num_slabs, geometry.slab_bytes, dtype=torch.uint8))
        shape = (KV_HEADS, geometry.slab_blocks, 2, BLOCK_TOKENS, geometry.head_dim)
        for slab in self.arena:
            for layer in range(LAYERS):
                kv = torch.randn(shape, generator=self.generator).bfloat16()
                block_digest.ingest_blocks(
                    geometry,
                    slab.data_ptr(),
                    layer,
                    0,
                    geometry.slab_tokens,
                    block_digest.payload_of(kv),
                )
        self.copies = self.arena[:, geometry.kv_bytes :].to(DEVICE, copy=True)
        self.places = torch.arange(num_slabs, dtype=torch.int32).to(DEVICE)

    def place(self, places: list[int]) -> None:
        """Have digests of each slab in a place, -1 for none. What is not to be read is spoilt."""
        kv_bytes = self.geometry.kv_bytes
        digests = self.arena[:, kv_bytes:].clone()
        self.copies.fill_(0x7F)
        self.places.copy_(torch.tensor(places))
        for slab, place in enumerate(places):
            if place >= 0:
                self.copies[place].copy_(digests[slab])
                self.arena[slab, kv_bytes:] = 0x7F

    def hold(self, share: float) -> None:
        """Give so much of the arena a slot, in no order; as far as there are slots."""
        table = self.tables.table
        units = torch.randperm(len(table), generator=self.generator)
        held = units[: min(int(share * len(units)), NUM_SLOTS)]
        table[held.to(DEVICE)] = torch.arange(len(held), dtype=torch.int32).to(DEVICE)

    def arena_blocks(self, row: Row, kv_head: int) -> Tensor:
        """[units] of the row's region."""
        units = torch.arange(row.region.start // BLOCK_TOKENS, row.region.stop // BLOCK_TOKENS)
        blocks = self.geometry.slab_blocks
        slabs = torch.tensor(row.slabs, dtype=torch.int64)[units // blocks]
        place = (LAYER * KV_HEADS + kv_head) * blocks + units % blocks
        return slabs * self.slab_units + place

    def scores(self, index: int, kv_head: int, level: int) -> Tensor:
        """[group, blocks] float64 of those that touch the region."""
        row, geometry = self.rows[index], self.geometry
        begin = geometry.digest_offset(LAYER, kv_head, level)
        records = self.arena[row.slabs, begin : begin + geometry.level_bytes(level)]
        unpack = digests.unpack_spans if geometry.digest_bits == 8 else digests.unpack_tiles
        records = records.reshape(-1, geometry.record_bytes(level))
        low, high = unpack(records, geometry.head_dim)
        size = BLOCK_SIZES[level]
        part = slice(row.region.start // size, ceil_div(row.region.stop, size))
        heads = slice(kv_head * self.group, (kv_head + 1) * self.group)
        query = self.query[index, heads].cpu().double()
        return block_score.score(query, low[part], high[part], row.radii[level])

    def chosen(self, index: int, kv_head: int) -> Tensor:
        """[group, units] bool, by the oracle."""
        row, level = self.rows[index], self.rows[index].levels[kv_head]
        scores = torch.zeros(self.group, 0)
        if level >= 0 and row.region:
            scores = self.scores(index, kv_head, level)
        budgets = row.budgets[kv_head * self.group : (kv_head + 1) * self.group]
        return reference.choose_units(scores, level, budgets, row.region)

    def row_words(self) -> Tensor:
        words = torch.zeros(len(self.rows), constants.ROW_WORDS.value, dtype=torch.int64)
        self.slab_addresses = [
            both_see(torch.tensor([self.arena[slab].data_ptr() for slab in row.slabs]).long())
            for row in self.rows
        ]
        for row, addresses, to in zip(self.rows, self.slab_addresses, words, strict=True):
            to[constants.SLAB_TABLE.value] = addresses.data_ptr() if row.region else 0
            to[constants.REGION_BEGIN.value] = row.region.start
            to[constants.REGION_END.value] = row.region.stop
            for level, radius in enumerate(row.radii):
                bits = struct.unpack("<i", struct.pack("<f", radius))[0]
                to[constants.RADIUS.value + level] = bits
        return words.to(DEVICE)

    def run(self, *, is_short: bool = False, scores_hook: ScoresHook | None = None) -> Selected:
        """One layer of a step."""
        selection, rows = self.selection, len(self.rows)
        scratch = selection.make_scratch(rows, DEVICE)
        scratch.scores.fill_(float("nan"))
        scratch.marks.fill_(UNTOUCHED)
        lists = selection.make_lists(rows, DEVICE)
        for part in lists:
            part.fill_(UNTOUCHED)
        groups = (rows, KV_HEADS)
        host = HostLists(
            *(both_see(int32s(*groups, selection.stride, value=UNTOUCHED).cpu()) for _ in "um"),
            *(both_see(int32s(*groups, value=UNTOUCHED).cpu()) for _ in "cl"),
        )
        counts, needs = int32s(*groups, 2, value=UNTOUCHED), int32s(LAYERS)
        words = self.row_words()
        selection.begin(words, scratch)
        selection.launch(
            LAYER,
            words,
            # As a fused projection leaves them: parts of wider rows.
            torch.cat([self.query, self.query[:, :1]], dim=1)[:, : self.heads],
            torch.tensor([row.levels for row in self.rows], dtype=torch.int32).to(DEVICE),
            torch.tensor([row.budgets[: self.heads] for row in self.rows], dtype=torch.int32).to(
                DEVICE
            ),
            self.tables,
            scratch,
            lists,
            counts,
            needs,
            host,
            int32s(1, value=STEP),
            is_short=is_short,
            scores_hook=scores_hook,
        )
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        return Selected(
            GroupLists(*(part.cpu() for part in lists)), counts.cpu(), needs.cpu(), host
        )

    def check(self) -> Selected:
        """Run a layer, and hold everything that it wrote against the oracle; where regions are
        short, in both ways.
        """
        longest = max(len(row.region) for row in self.rows)
        if self.selection.is_short(longest):
            before = [part.clone() for part in self.tables]
            self.check_way(is_short=True)
            for part, was in zip(self.tables, before, strict=True):
                part.copy_(was)
        return self.check_way(is_short=False)

    def check_way(self, *, is_short: bool) -> Selected:
        """Run a layer in one way, and hold everything that it wrote against the oracle."""
        table, stamps = self.tables.table.cpu().clone(), self.tables.stamps.cpu().clone()
        asked: list[int] = []
        room = len(self.tables.requests)
        selected = self.run(is_short=is_short)
        missing_groups = 0
        for index, row in enumerate(self.rows):
            for kv_head in range(KV_HEADS):
                chosen = self.chosen(index, kv_head)
                blocks = self.arena_blocks(row, kv_head)
                lists = reference.split_units(
                    chosen, row.region.start // BLOCK_TOKENS, blocks, table
                )
                selected.check_group(index, kv_head, lists)
                heads = slice(kv_head * self.group, (kv_head + 1) * self.group)
                assert selected.lists.head_units[index, heads].tolist() == chosen.sum(1).tolist()
                stamps[lists.resident_slots] = STEP
                missing_groups += len(lists.missing_units) > 0
                asked += reference.ask_for(table, lists.missing_blocks, len(asked), room)
        assert selected.needs.tolist() == [0, missing_groups]
        assert torch.equal(self.tables.stamps.cpu(), stamps)
        self.check_requests(table, asked, room)
        return selected

    def check_requests(self, table: Tensor, asked: list[int], room: int) -> None:
        """Which were asked for; with too little room it depends on who came first."""
        requests = self.tables.requests.cpu()[: len(asked)].tolist()
        count = self.tables.request_count.item()
        if len(asked) < room:
            assert sorted(requests) == sorted(asked)
            assert count == len(asked)
            assert torch.equal(self.tables.table.cpu(), table)
        else:
            assert len(set(requests)) == room <= count
        pending = (self.tables.table == PENDING).nonzero().flatten().tolist()
        assert sorted(requests) == pending
        assert (self.tables.requests[len(asked) :] == UNTOUCHED).all()


@dataclass
class Selected:
    """What one layer wrote, on the host."""

    lists: GroupLists
    counts: Tensor
    needs: Tensor
    host: HostLists

    def check_group(self, row: int, kv_head: int, expected: reference.UnitLists) -> None:
        resident, missing = len(expected.resident_slots), len(expected.missing_units)
        assert self.counts[row, kv_head].tolist() == [resident + missing, resident]
        assert self.host.counts[row, kv_head].item() == missing
        assert self.host.listed[row, kv_head].item() == STEP
        for part, of in (
            (self.lists.resident_slots, expected.resident_slots),
            (self.lists.resident_masks, expected.resident_masks),
            (self.lists.missing_units, expected.missing_units),
            (self.lists.missing_masks, expected.missing_masks),
            (self.host.units, expected.missing_units),
            (self.host.masks, expected.missing_masks),
        ):
            listed = part[row, kv_head]
            assert listed[: len(of)].tolist() == of.tolist()
            assert (listed[len(of) :] == UNTOUCHED).all()


@pytest.mark.parametrize("digest_bits", [16, 8])
@pytest.mark.parametrize("level", [NOTHING, ALL, 0, 1, 2, 3])
def test_every_level_lists_what_its_heads_chose(level: int, digest_bits: int):
    node = Node(Row(levels=[level, 0]), digest_bits=digest_bits)
    node.hold(0.3)
    node.check()


@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize("level", [ALL, 0])
def test_what_is_read_may_be_resident_or_missing_altogether(level: int, share: float):
    node = Node(Row(levels=[level, 3]))
    node.hold(share)
    selected = node.check()
    assert bool(selected.needs[LAYER]) == (share == 0.0)


@pytest.mark.parametrize("group", [1, 3, 7])
@pytest.mark.parametrize("digest_bits", [16, 8])
def test_every_group(group: int, digest_bits: int):
    budgets = [(5 * head + 2) % 7 for head in range(KV_HEADS * group)]
    node = Node(Row(levels=[1, 0], budgets=budgets), group=group, digest_bits=digest_bits)
    node.hold(0.4)
    node.check()


@pytest.mark.parametrize("slab_tokens", [128, 512])
@pytest.mark.parametrize("level", [0, 3])
def test_slabs_of_every_length(level: int, slab_tokens: int):
    row = Row([1, 4, 0, 3], range(64, 64 + 3 * slab_tokens), [level, level])
    node = Node(row, slab_tokens=slab_tokens, head_dim=32, region_tokens=2048)
    node.hold(0.4)
    node.check()


def test_rows_of_every_length_beside_each_other():
    node = Node(
        Row([2], range(64, 160), [0, 1], [1, 2, 3, 4, 0, 0, 0, 0]),
        Row([], range(0)),
        Row([4, 1, 3], range(64, 768), [3, ALL]),
        # Stored, but no longer than its window.
        Row([0], range(64, 64), [0, 3]),
        Row([0, 1, 2, 3], range(64, 592), [NOTHING, 2]),
    )
    node.hold(0.5)
    selected = node.check()
    assert selected.counts[1].tolist() == selected.counts[3].tolist() == [[0, 0]] * KV_HEADS


@pytest.mark.parametrize("level", [0, 1, 2, 3])
@pytest.mark.parametrize("region", [range(144, 176), range(112, 272), range(240, 736)])
def test_the_region_cuts_blocks_at_its_edges(level: int, region: range):
    node = Node(Row(region=region, levels=[level, 3], budgets=[1, 0, 2, 9, 1, 1, 1, 1]))
    node.hold(0.4)
    node.check()


@pytest.mark.parametrize("budget", [-1, 0, 33, 34, 1000])
def test_budgets_of_nothing_and_of_more_than_there_is(budget: int):
    node = Node(Row(levels=[0, 3], budgets=[budget, 1, budget, 0, budget, budget, budget, budget]))
    node.check()


def test_of_equal_scores_the_first_win():
    node = Node(Row(levels=[0, 2], budgets=[1, 7, 33, 20, 1, 8, 5, 3]))
    node.query.zero_()
    node.check()


def test_a_smaller_radius_ranks_by_the_middle_of_a_block():
    budgets = [4] * 8
    narrow = Node(Row(levels=[0, 3], budgets=budgets, radii=(0.25, 1.0, 1.0, 0.5)))
    wide = Node(Row(levels=[0, 3], budgets=budgets))
    assert not torch.equal(narrow.chosen(0, 0), wide.chosen(0, 0))
    narrow.check()


@pytest.mark.parametrize("units", [500, 1900, 2500])
def test_as_many_blocks_as_each_size_of_the_choice_has_registers_for(units: int):
    # 512, 2048 and 8192; the last one is also more than a pass of the lists.
    region = range(64, 64 + 16 * units)
    row = Row([3, 1, 0], region, [0, ALL], [40, units])
    node = Node(row, group=1, slab_tokens=16384, region_tokens=16 * 8192)
    node.hold(0.1)
    selected = node.check()
    assert selected.counts[0, :, 0].tolist() == [40, units]


@pytest.mark.parametrize("digest_bits", [16, 8])
@pytest.mark.parametrize("level", [0, 1, 2, 3])
@pytest.mark.parametrize("places", [[1, -1, 0, -1, -1], [-1] * 5, [3, 4, 0, 1, 2]], ids=str)
def test_digests_are_read_in_their_place_or_where_the_host_has_them(
    places: list[int], level: int, digest_bits: int
):
    rows = [Row(levels=[level, 0]), Row([0, 4, 1], levels=[3, level])]
    node = Node(*rows, digest_bits=digest_bits)
    node.hold(0.3)
    expected = node.run()
    assert expected.counts[:2, :, 0].all()
    node.place(places)
    got = node.run()
    assert all(map(torch.equal, got.lists, expected.lists))
    assert torch.equal(got.counts, expected.counts)


@pytest.mark.parametrize("level", [ALL, 0, 1, 2, 3])
def test_the_device_reads_what_the_host_would(level: int):
    # With 16 bits: some CPUs score those of 8 with a query of 8 bits.
    row = Row(levels=[level, level], region=range(80, 656))
    node = Node(row)
    selected = node.run()
    table = np.array([node.arena[slab].data_ptr() for slab in row.slabs], np.int64)
    view = np.array([[table.ctypes.data, 768, row.region.start, row.region.stop, 0]], np.int64)
    plans = _native.GivenPlans(
        np.array([row.levels], np.int32), np.array([row.budgets[: node.heads]], np.int32)
    )
    tasks = _native.LayerAttention(native_layout(node.geometry), view, node.heads, [plans])
    pool, query = CpuPool(1), node.query[:1].cpu()
    output, lse = torch.empty_like(query), torch.empty(1, node.heads)
    tasks.submit(pool.native, LAYER, query.numpy(), output.numpy(), lse.numpy(), 0)
    pool.wait()
    for kv_head in range(KV_HEADS):
        expected = [
            (address + block * node.geometry.block_bytes, heads)
            for address, count, heads, _ in tasks.runs(0, kv_head)
            for block in range(count)
        ]
        count = selected.counts[0, kv_head, 0]
        units = selected.host.units[0, kv_head, :count].tolist()
        masks = selected.host.masks[0, kv_head, :count].tolist()
        slab_blocks = node.geometry.slab_blocks
        listed = [
            (
                int(table[unit // slab_blocks])
                + node.geometry.kv_offset(LAYER, kv_head, unit % slab_blocks),
                mask,
            )
            for unit, mask in zip(units, masks, strict=True)
        ]
        assert listed == expected
        assert len(listed) > 0


@pytest.mark.parametrize("digest_bits", [16, 8])
@pytest.mark.parametrize("is_float32", [False, True])
def test_scores_of_a_float32_model_lose_no_bit_of_its_queries(digest_bits: int, is_float32: bool):
    node = Node(
        Row(levels=[0, 2]),
        head_dim=128,
        digest_bits=digest_bits,
        is_float32=is_float32,
    )
    # By hand: two halves lack the last term, 3.8e-6 of each product and of their sum.
    node.query.fill_(1 + 2**-9 + 2**-18)
    seen = []
    node.run(scores_hook=lambda layer, scores, step: seen.append(scores.cpu().double()))
    worst = 0.0
    for kv_head, level in enumerate(node.rows[0].levels):
        exact = node.scores(0, kv_head, level)
        heads = slice(kv_head * node.group, (kv_head + 1) * node.group)
        found = seen[0][0, heads, : exact.shape[1]]
        worst = max(worst, ((found - exact).abs().max() / exact.abs().max()).item())
    is_exact = is_float32 or DEVICE.type == "cpu"
    assert worst < (1e-6 if is_exact else 1e-5)
    if not is_exact and digest_bits == 16:
        assert worst > 3e-6


def test_what_two_rows_miss_together_is_asked_for_once():
    # The second row shares a prefix of one slab with the first, and its query is the same.
    shared = [ALL, 0]
    node = Node(Row([2, 0, 3], levels=shared), Row([2, 4, 1], levels=shared))
    node.query[1] = node.query[0]
    node.check()
    misses = sum(node.run().host.counts[:2].flatten().tolist())
    assert 0 < node.tables.request_count.item() < misses


def test_what_has_been_asked_for_is_missing_until_it_is_there():
    node = Node(Row(levels=[ALL, 0]))
    first = node.check()
    asked = node.tables.request_count.item()
    second = node.run()
    assert node.tables.request_count.item() == asked
    assert all(map(torch.equal, first.lists, second.lists))
    assert all(map(torch.equal, first.host, second.host))


@pytest.mark.parametrize("room", [1, 20, 33])
def test_what_there_is_no_room_to_ask_for_stays_absent(room: int):
    node = Node(Row(levels=[ALL, ALL]), Row([4, 1, 0], levels=[0, ALL]), max_requests=room)
    node.check()
    assert (node.tables.table == PENDING).sum().item() == room


def test_a_group_that_misses_nothing_needs_nobody():
    node = Node(Row(levels=[0, 0]))
    table = node.tables.table
    table[:] = torch.arange(len(table), dtype=torch.int32).to(DEVICE)
    selected = node.check()
    assert selected.needs.tolist() == [0, 0]
    assert node.tables.request_count.item() == 0
    # The second group misses one unit of all.
    slot = selected.lists.resident_slots[0, 1, 0].item()
    table[slot] = ABSENT
    assert node.run().needs.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("heads", "region_tokens", "max_slabs"), [(3, 1024, 9), (34, 1024, 9), (4, 0, 9), (4, 1024, 1)]
)
def test_shapes_that_no_kernel_takes_are_refused(heads: int, region_tokens: int, max_slabs: int):
    digests = PlacedDigests(0, 1, 0, int32s(1))
    with pytest.raises(ShapeError):
        GroupSelection(KvGeometry(1, 2, 64), heads, region_tokens, max_slabs, digests)


def test_others_may_change_scores_before_blocks_are_chosen():
    node = Node(Row(levels=[0, 0], budgets=[2] * 8))
    seen = []

    def prefer_the_last(layer: int, scores: Tensor, step: Tensor) -> None:
        seen.append((layer, int(step)))
        scores[:] = torch.arange(scores.shape[-1])

    selected = node.run(scores_hook=prefer_the_last)
    assert seen == [(LAYER, STEP)]
    last = node.rows[0].region.stop // BLOCK_TOKENS
    assert selected.host.units[0, :, :2].tolist() == [[last - 2, last - 1]] * KV_HEADS
