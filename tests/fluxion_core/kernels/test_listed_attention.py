"""Attention over a device's lists against attention that chooses itself, and plain torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fluxion_core.geometry import KvGeometry, ceil_div
from fluxion_core.kernels import _native
from fluxion_core.kernels.block_digest import cpu as block_digest
from fluxion_core.kernels.isa import native_layout
from fluxion_core.kernels.merge import reference as merge
from fluxion_core.kernels.sparse_attention import reference
from fluxion_core.planning.constants import RADII, READ_ALL, READ_NOTHING
from fluxion_core.pool.cpu_pool import CpuPool
from tests.fluxion_core.planning.random_planner import make_planner, random_network, random_profile

GEOMETRY = KvGeometry(num_layers=2, num_kv_heads=2, head_dim=32, slab_tokens=256)
LAYOUT = native_layout(GEOMETRY)
HEADS, GROUP, LAYER = 6, 3, 1
REGIONS = (range(64, 64), range(64, 400), range(32, 1600))
"""The first row has none."""
ROOM = 128

Units = list[tuple[int, int]]
"""Of one group: 16-token blocks, each with a mask of the heads that read it."""


class Rows:
    """Three sequences in slabs, their layer 1 filled and digested, and a query each."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.memory, self.tables, self.blocks = [], [], []
        views = []
        for region in REGIONS:
            tokens = region.stop + 128
            slabs = GEOMETRY.slabs_for(tokens)
            memory = torch.zeros(slabs, GEOMETRY.slab_bytes, dtype=torch.uint8)
            # In no order, as a store's slabs are.
            order = torch.randperm(slabs, generator=generator)
            table = memory.data_ptr() + order * GEOMETRY.slab_bytes
            shape = (2, ceil_div(tokens, 16), 2, 16, GEOMETRY.head_dim)
            kv = torch.randn(shape, generator=generator).bfloat16()
            for ordinal, inside, count in GEOMETRY.split_by_slab(0, tokens):
                payload = block_digest.payload_of(kv[:, ordinal * GEOMETRY.slab_blocks :])
                at = int(table[ordinal])
                block_digest.ingest_blocks(GEOMETRY, at, LAYER, inside, count, payload)
            self.memory.append(memory)
            self.tables.append(table)
            self.blocks.append(kv)
            views.append((table.data_ptr(), tokens, region.start, region.stop, 0))
        self.views = np.array(views, np.int64)
        self.query = torch.randn(3, HEADS, GEOMETRY.head_dim, generator=generator)

    def attention(self, sources: list[_native.PlanSource]) -> _native.LayerAttention:
        return _native.LayerAttention(LAYOUT, self.views, HEADS, sources)

    def run(
        self,
        tasks: _native.LayerAttention,
        lists: list[list[Units]] | None = None,
        threads: int = 1,
    ) -> tuple[Tensor, Tensor]:
        """Output and lse of a layer; NaN where nothing is written."""
        output, lse = torch.full_like(self.query, torch.nan), torch.full((3, HEADS), torch.nan)
        pool = CpuPool(threads)
        arrays = (self.query.numpy(), output.numpy(), lse.numpy())
        tasks.submit(pool.native, LAYER, *arrays, 0, lists=None if lists is None else packed(lists))
        pool.wait()
        tasks.finish_layer()
        return output, lse

    def units_of(self, tasks: _native.LayerAttention, row: int, kv_head: int) -> Units:
        """What the last layer's task has read, by the addresses of its runs."""
        units = []
        for address, count, heads, last_tokens in tasks.runs(row, kv_head):
            assert last_tokens == 16
            offsets = (address - self.tables[row]).tolist()
            inside = [0 <= offset < GEOMETRY.slab_bytes for offset in offsets]
            ordinal = inside.index(True)
            offset = offsets[ordinal] - GEOMETRY.kv_offset(LAYER, kv_head)
            first = ordinal * GEOMETRY.slab_blocks + offset // GEOMETRY.block_bytes
            units += [(first + i, heads) for i in range(count)]
        return units

    def chosen(self, row: int, kv_head: int, units: Units) -> Tensor:
        chosen = torch.zeros(GROUP, self.blocks[row].shape[1], dtype=torch.bool)
        for unit, mask in units:
            for head in range(GROUP):
                chosen[head, unit] = bool(mask >> head & 1)
        return chosen


def packed(lists: list[list[Units]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lists [row][kv_head] as arrays; behind their ends is what nobody may read."""
    units = np.full((3, 2, ROOM), -7, np.int32)
    masks = np.full((3, 2, ROOM), -7, np.int32)
    counts = np.zeros((3, 2), np.int32)
    for row, of_row in enumerate(lists):
        for kv_head, listed in enumerate(of_row):
            counts[row, kv_head] = len(listed)
            for place, (unit, mask) in enumerate(listed):
                units[row, kv_head, place], masks[row, kv_head, place] = unit, mask
    return units, masks, counts


def plans(*levels: int, budget: int = 5) -> list[_native.PlanSource]:
    """The same plan for each row; heads have budgets of their own."""
    budgets = budget + np.arange(HEADS, dtype=np.int32)[None] % 4
    return [_native.GivenPlans(np.array([levels], np.int32), budgets) for _ in REGIONS]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("levels", [(0, 1), (2, 3), (READ_ALL, 0), (READ_NOTHING, 3)], ids=str)
def test_a_list_of_all_that_was_chosen_gives_the_same_bits(levels: tuple[int, int], threads: int):
    rows = Rows()
    plain = rows.attention(plans(*levels))
    output, lse = rows.run(plain, threads=threads)
    lists = [[rows.units_of(plain, row, kv_head) for kv_head in range(2)] for row in range(3)]
    listed = rows.attention(plans(*levels))
    listed_output, listed_lse = rows.run(listed, lists, threads)
    counts = np.zeros((2, 4, 2, 2), np.int32)
    for row in range(3):
        for kv_head, level in enumerate(levels):
            counts[LAYER, row, kv_head, 0] = len(lists[row][kv_head])
            part = (row, slice(kv_head * GROUP, kv_head * GROUP + GROUP))
            if row > 0 and level == READ_NOTHING:
                assert listed_output[part].isnan().all()
                continue
            assert torch.equal(listed_output[part], output[part])
            assert torch.equal(listed_lse[part], lse[part])
            assert listed.runs(row, kv_head) == plain.runs(row, kv_head)
    listed.count_selected(counts)
    for row in range(3):
        assert listed.read_bytes(row) == plain.read_bytes(row)
        assert listed.group_counts(row) == plain.group_counts(row)


def test_a_part_here_and_the_rest_elsewhere_are_the_whole():
    rows = Rows()
    plain = rows.attention(plans(0, 2))
    output, lse = rows.run(plain)
    lists = [[rows.units_of(plain, row, kv_head) for kv_head in range(2)] for row in range(3)]
    some = [[units[1::3] for units in of_row] for of_row in lists]
    part, part_lse = rows.run(rows.attention(plans(0, 2)), some)
    for row in (1, 2):
        for kv_head in range(2):
            heads = slice(kv_head * GROUP, kv_head * GROUP + GROUP)
            units, missing = lists[row][kv_head], set(some[row][kv_head])
            assert 0 < len(missing) < len(units)
            rest = rows.chosen(row, kv_head, [unit for unit in units if unit not in missing])
            state = reference.attend_blocks(
                rows.query[row, heads], rows.blocks[row][kv_head].float(), rest
            )
            here = part[row, heads], part_lse[row, heads]
            whole, whole_lse = merge.merge(*map(torch.stack, zip(state, here, strict=True)))
            torch.testing.assert_close(whole, output[row, heads], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(whole_lse, lse[row, heads], rtol=1e-5, atol=1e-5)


def test_of_an_empty_list_nothing_is_written():
    rows = Rows()
    lists: list[list[Units]] = [[[], []], [[], [(9, 0b010)]], [[(2, 0b111)], []]]
    output, lse = rows.run(rows.attention(plans(0, 0)), lists)
    # Nor of a head that reads nothing of its group's list is the output more than the empty state.
    assert lse[1].isnan().tolist() == [True] * 3 + [False] * 3
    assert output[1].isnan().any(-1).tolist() == [True] * 3 + [False] * 3
    assert lse[1, 3:].isinf().tolist() == [True, False, True]
    assert lse[2].isnan().tolist() == [False] * 3 + [True] * 3
    # A row without a region has no lists.
    assert lse[0].tolist() == [-torch.inf] * HEADS


def test_units_side_by_side_for_the_same_heads_are_one_run():
    # By hand: slabs of 16 units; 15 and 16 lie in two of them.
    rows = Rows()
    lists: list[list[Units]] = [
        [[], []],
        [[], []],
        [[(4, 7), (5, 7), (6, 7), (7, 1), (9, 1), (15, 2), (16, 2)], []],
    ]
    tasks = rows.attention(plans(0, 0))
    rows.run(tasks, lists)
    runs = [(count, heads) for _, count, heads, _ in tasks.runs(2, 0)]
    assert runs == [(3, 7), (1, 1), (1, 1), (1, 2), (1, 2)]
    assert rows.units_of(tasks, 2, 0) == lists[2][0]
    assert tasks.runs(2, 1) == []


def test_what_a_device_selected_is_counted_by_row():
    rows = Rows()
    tasks = rows.attention(plans(0, READ_ALL))
    lists: list[list[Units]] = [[[], []], [[(4, 1)], []], [[], []]]
    rows.run(tasks, lists)
    counts = np.zeros((2, 3, 2, 2), np.int32)
    # What of the row without a region would be counted is not.
    counts[:, 0] = 99
    counts[0, 1], counts[1, 1], counts[1, 2] = [[5, 2], [1, 0]], [[7, 7], [3, 1]], [[4, 0], [0, 0]]
    tasks.count_selected(counts)
    unit = GEOMETRY.block_bytes
    # Of two slabs and of seven, a record of 16 blocks each.
    record = GEOMETRY.record_bytes(0)
    assert tasks.read_bytes(0) == (0, 0, 0, 0)
    assert tasks.read_bytes(1) == (2 * record, 16 * unit, 0, 10 * unit)
    assert tasks.read_bytes(2) == (7 * record, 4 * unit, 0, 0)


def test_plans_that_are_known_are_written_down_for_the_device():
    planner = make_planner(2, HEADS, 2, GEOMETRY.head_dim, network=random_network(0))
    levels, budgets = np.array([[0, 3], [READ_ALL, 2]], np.int32), np.ones((2, HEADS), np.int32)
    budgets[1] = np.arange(HEADS)
    given = _native.GivenPlans(levels, budgets, planner.native)
    replayed = _native.ReplayedPlans(levels[1:], budgets[1:], _native.GivenPlans(levels, budgets))
    rows = Rows()
    recorder = _native.PlanRecorder(replayed, 2, HEADS)
    for second in (replayed, recorder):
        to = np.full((2, 4, 2), 77, np.int32), np.full((2, 4, HEADS), 77, np.int32)
        radii = np.full((4, 4), 77, np.float32)
        rows.attention([given, given, second]).write_given_plans(*to, radii)
        for layer in range(2):
            # A row without a region reads nothing, nor do rows that there are not.
            assert to[0][layer, [0, 3]].tolist() == [[READ_NOTHING] * 2] * 2
            assert to[1][layer, [0, 3]].tolist() == [[0] * HEADS] * 2
            assert to[0][layer, 1:3].tolist() == [levels[layer].tolist(), levels[1].tolist()]
            assert to[1][layer, 1:3].tolist() == [budgets[layer].tolist(), budgets[1].tolist()]
        np.testing.assert_array_equal(radii[1], np.array(RADII, np.float32))
        assert (radii[[0, 2, 3]] == 1).all()
    assert recorder.levels == []


def test_plans_that_are_made_here_go_with_no_lists():
    planner = make_planner(2, HEADS, 2, GEOMETRY.head_dim, network=random_network(0))
    profile = random_profile(HEADS, 2, torch.Generator().manual_seed(0))
    state = planner.new_state([profile] * 2)
    rows = Rows()
    made = _native.PredictedPlans(planner.native, state.native, True, 0.1)
    given = plans(0, 0)
    tasks = rows.attention([given[0], made, given[2]])
    places = np.zeros((2, 3, 2), np.int32), np.zeros((2, 3, HEADS), np.int32)
    with pytest.raises(ValueError, match="made here, layer by layer, go with no lists"):
        tasks.write_given_plans(*places, np.zeros((3, 4), np.float32))
    with pytest.raises(ValueError, match="made here, layer by layer, go with no lists"):
        rows.run(tasks, [[[], []]] * 3)
