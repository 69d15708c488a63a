"""Attention over resident units against float64, and the end of a layer with a tier."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from fluxion_core.errors import ShapeError
from fluxion_core.kernels.dense_attention.triton import WindowStates
from fluxion_core.kernels.handover import reference as handover
from fluxion_core.kernels.head_plan.triton import MODE
from fluxion_core.kernels.head_plan.triton import ROW_WORDS as PLAN_WORDS
from fluxion_core.kernels.merge import reference as merge
from fluxion_core.kernels.tier import attention_reference as reference
from fluxion_core.kernels.tier.attention import ResidentAttention, ResidentStates
from fluxion_core.kernels.tier.constants import (
    REGION_BEGIN,
    REGION_END,
    RESIDENT,
    ROW_WORDS,
    SELECTED,
)
from fluxion_core.kernels.tier.host_wait import HostWait
from fluxion_core.kernels.tier.merge import HostStates, ReadMemory, TierMerge

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SLOTS = 40
STRIDE = 64
STEP = 7
LENGTHS = [[0, 1], [13, 3], [40, 8]]
"""Nothing, one, less than a tile, a tile or two, tiles and a rest, several for every split."""


def pinned(tensor: Tensor) -> Tensor:
    """Memory that both sides see."""
    return tensor.pin_memory() if DEVICE.type == "cuda" else tensor


def on_device(values: list[int], dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=DEVICE)


@dataclass
class Tier:
    """Units in device memory, and lists of them for the KV heads of some rows.

    `lengths` says how many units each KV head of each row lists; which, and which heads read them,
    is random.
    """

    attention: ResidentAttention
    lengths: list[list[int]]
    query_scale: float = 1.0
    query_dtype: torch.dtype = torch.float32
    query: Tensor = field(init=False)

    def __post_init__(self) -> None:
        shape = self.attention
        generator = torch.Generator().manual_seed(shape.num_heads * shape.head_dim)
        units = torch.randn(SLOTS, 2, 16, shape.head_dim, generator=generator)
        self.tier = units.bfloat16().view(torch.uint8).flatten()
        self.query = torch.randn(
            len(self.lengths), shape.num_heads, shape.head_dim, generator=generator
        )
        self.query = (self.query * self.query_scale).to(self.query_dtype).float()
        self.slots = [
            [torch.randperm(SLOTS, generator=generator)[:length].tolist() for length in row]
            for row in self.lengths
        ]
        everybody = 1 << shape.group
        self.masks = [
            [torch.randint(1, everybody, (length,), generator=generator).tolist() for length in row]
            for row in self.lengths
        ]

    def states(self, wait: HostWait | None = None) -> ResidentStates:
        """Launch. What the kernel need not write is NaN."""
        shape, rows = self.attention, len(self.lengths)
        # Beyond a list lies what an earlier one left.
        lists = torch.full((2, rows, shape.num_kv_heads, STRIDE), 1 << 30, dtype=torch.int32)
        counts = torch.full((rows, shape.num_kv_heads, 2), 1 << 20, dtype=torch.int32)
        for row, lengths in enumerate(self.lengths):
            for kv_head, length in enumerate(lengths):
                lists[0, row, kv_head, :length] = torch.tensor(self.slots[row][kv_head])
                lists[1, row, kv_head, :length] = torch.tensor(self.masks[row][kv_head])
                counts[row, kv_head, RESIDENT.value] = length
        states = shape.make_states(rows, DEVICE)
        for part in states:
            part.fill_(math.nan)
        slots, masks = lists.to(DEVICE)
        # As a fused projection leaves them: parts of wider rows.
        wide = torch.cat([self.query, self.query[:, :1]], dim=1).to(self.query_dtype).to(DEVICE)
        query, counts = wide[:, : shape.num_heads], counts.to(DEVICE)
        shape.launch(query, self.tier.to(DEVICE), slots, masks, counts, states, wait)
        return states

    def merged(self) -> tuple[Tensor, Tensor]:
        """Output and lse, float64, of all splits."""
        output, lse = (part.double().cpu() for part in self.states())
        is_empty = (lse == -math.inf).unsqueeze(-1)
        output = torch.where(is_empty, torch.zeros_like(output), output)
        return merge.merge(output.movedim(2, 0), lse.movedim(2, 0))

    def check(self, margin: float = 1e-5) -> None:
        """Hold the states against float64, by the error of plain float32."""
        exact, exact_lse = reference.attend_resident(
            self.query.double(), self.tier, self.slots, self.masks
        )
        plain, _ = reference.attend_resident(self.query, self.tier, self.slots, self.masks)
        output, lse = self.merged()
        allowed = 4 * (plain - exact).abs().max().item() + margin
        assert (output - exact).abs().max().item() <= allowed
        torch.testing.assert_close(lse, exact_lse, atol=2 * margin, rtol=margin)


def test_a_float32_model_loses_no_bit_of_its_queries_and_weights():
    Tier(ResidentAttention(8, 2, 64, programs=8, is_float32=True), [[9, 30]]).check(margin=2e-6)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("group", "kv_heads"), [(1, 2), (3, 2), (4, 2), (7, 1)])
def test_every_head_attends_to_the_units_that_it_reads(head_dim: int, group: int, kv_heads: int):
    attention = ResidentAttention(
        group * kv_heads, kv_heads, head_dim, programs=len(LENGTHS) * kv_heads
    )
    Tier(attention, [row[:kv_heads] for row in LENGTHS]).check()


def test_a_group_may_have_more_heads_than_half_a_tile_of_a_tensor_core():
    Tier(ResidentAttention(12, 1, 16, programs=2), [[40]]).check()


def test_a_list_of_any_length_is_read_to_its_end():
    attention = ResidentAttention(1, 1, 64, programs=4)
    Tier(attention, [[length] for length in (0, 1, 3, 4, 5, 8, 15, 24, 39)]).check()
    Tier(replace(attention, programs=8), [[length] for length in (7, 17, 25)]).check()


def test_a_head_without_units_is_the_empty_state():
    tier = Tier(ResidentAttention(4, 1, 64, programs=3), [[20]])
    tier.masks[0][0] = [0b0101] * 20
    tier.check()
    _, lse = tier.merged()
    assert lse.isinf().tolist() == [[False, True, False, True]]


def test_heads_that_begin_to_read_late_are_right():
    # Of a split's first tiles these heads read nothing, and of its last all.
    tier = Tier(ResidentAttention(3, 1, 64, programs=1), [[33]])
    tier.masks[0][0] = [0b001] * 30 + [0b110] * 3
    tier.check()


def test_rows_without_lists_write_nothing_but_their_lse():
    states = Tier(ResidentAttention(4, 2, 64, programs=8), [[0, 0], [0, 0]]).states()
    assert (states.lse == -math.inf).all()
    assert states.output.isnan().all()


def test_two_equal_units_are_their_mean():
    # By hand: a query of zeros weighs all tokens alike; values of 0 and of 2.
    tier = Tier(ResidentAttention(1, 1, 16, programs=1), [[2]])
    units = torch.zeros(2, 2, 16, 16)
    units[1, 1] = 2.0
    tier.tier = units.bfloat16().view(torch.uint8).flatten()
    tier.query.zero_()
    tier.slots, tier.masks = [[[1, 0]]], [[[1, 1]]]
    output, lse = tier.merged()
    assert torch.equal(output, torch.ones(1, 1, 16, dtype=torch.float64))
    assert lse.item() == pytest.approx(math.log(32))


def test_large_scores_neither_overflow_nor_vanish():
    tier = Tier(ResidentAttention(4, 1, 64, programs=4), [[30]], query_scale=200)
    output, lse = tier.merged()
    exact, exact_lse = reference.attend_resident(
        tier.query.double(), tier.tier, tier.slots, tier.masks
    )
    torch.testing.assert_close(output, exact, atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(lse, exact_lse, atol=1e-2, rtol=1e-5)


def test_queries_of_bfloat16_are_exact():
    tier = Tier(ResidentAttention(8, 2, 64, programs=8), [[9, 30]], query_dtype=torch.bfloat16)
    tier.check()


def test_any_number_of_splits_stages_and_units_at_a_time_makes_the_same_state():
    shape = ResidentAttention(4, 2, 64)
    for other in (
        replace(shape, programs=1, stages=1),
        replace(shape, programs=6, tile_bytes=4 << 10),
        replace(shape, programs=20, tile_bytes=32 << 10),
    ):
        Tier(other, [[11, 27]]).check()


def test_a_launch_has_programs_for_every_row():
    shape = ResidentAttention(32, 8, 128)
    rows = (1, 2, 4, 16, 32, 64)
    assert [shape.num_programs(count) for count in rows] == [520, 528, 544, 640, 768, 1024]
    assert [shape.num_splits(count) for count in rows] == [128, 128, 128, 32, 16, 8]
    states = shape.make_states(4, torch.device("cpu"))
    assert states.output.shape == (4, 32, 128, 128)
    assert states.lse.shape == (4, 32, 128)


def test_programs_are_dealt_out_by_the_lengths_of_lists():
    # By hand: tiles of 4 units; 10, 1, 0 and 5 of them, for 5 programs: 4 tiles each.
    tier = Tier(ResidentAttention(2, 2, 64, programs=5), [[40, 4], [0, 20]])
    used = (tier.states().lse > -math.inf).sum(-1)
    assert used.tolist() == [[3, 1], [0, 2]]
    tier.check()
    # The longest takes what there is; two tiles are one program's.
    tier = Tier(ResidentAttention(2, 2, 64, programs=12), [[40, 8], [0, 0]])
    assert (tier.states().lse > -math.inf).sum(-1).tolist() == [[5, 1], [0, 0]]
    tier.check()


def test_shapes_that_no_kernel_takes_are_refused():
    for heads, kv_heads, head_dim in [(3, 2, 64), (2, 2, 80), (34, 2, 64)]:
        with pytest.raises(ShapeError):
            ResidentAttention(heads, kv_heads, head_dim)
    for wrong in ({"programs": 0}, {"stages": 0}, {"tile_bytes": 0}, {"tile_bytes": 3000}):
        with pytest.raises(ShapeError):
            replace(ResidentAttention(4, 2, 64), **wrong)
    with pytest.raises(ShapeError):
        TierMerge(3, 2, 64)


@dataclass
class Layer:
    """States of a layer's three parts, and what its end makes of them.

    In row 0 every group misses something, in row 1 only the first one, in row 2 none: there the
    host's states are what an earlier layer left, and must not be read.
    """

    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 64
    window_splits: int = 3
    resident_splits: int = 5
    needs: int = 3
    answered_step: int = STEP
    skip: int = 0
    timeout_ns: int = 10**10
    dtype: torch.dtype = torch.float32
    empty: tuple[str, ...] = ()
    """Of window, resident and host, which have nothing."""
    modes: tuple[int, int, int] = (1, 0, 2)
    """What the rows' planners want."""
    tells: bool = True

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.resident_splits)

        def random_states(name: str, *splits: int) -> tuple[Tensor, Tensor]:
            shape = (3, self.heads, *splits)
            output = torch.randn(*shape, self.head_dim, generator=generator)
            lse = 3 * torch.randn(shape, generator=generator)
            lse[torch.rand(shape, generator=generator) < 0.2] = -math.inf
            if name in self.empty:
                lse.fill_(-math.inf)
            output[lse == -math.inf] = math.nan
            return output, lse

        self.window = random_states("window", self.window_splits)
        self.resident = random_states("resident", self.resident_splits)
        self.host = random_states("host")
        self.misses = torch.tensor(
            [True] * self.kv_heads + [True] + [False] * (2 * self.kv_heads - 1)
        )
        self.misses = self.misses.reshape(3, self.kv_heads)
        self.head_units = torch.randint(0, 50, (3, self.heads), generator=generator).int()
        self.told = torch.full((4, self.heads, 2), math.nan)
        self.run()

    def run(self) -> None:
        group = self.heads // self.kv_heads
        is_missing = self.misses.repeat_interleave(group, dim=1)
        of_host = [part.clone() for part in self.host]
        of_host[0][~is_missing], of_host[1][~is_missing] = math.nan, math.inf
        counts = torch.zeros(3, self.kv_heads, 2, dtype=torch.int32)
        counts[..., RESIDENT.value] = 3
        counts[..., SELECTED.value] = 3 + 2 * self.misses.int()
        # Row 2 has no region of its own: nothing is told of it, whatever its planner wants.
        rows = torch.zeros(3, ROW_WORDS.value, dtype=torch.int64)
        rows[:2, REGION_BEGIN.value] = 64
        rows[:2, REGION_END.value] = 64 + 16 * 50
        plans = torch.zeros(3, PLAN_WORDS.value, dtype=torch.int64)
        plans[:, MODE.value] = torch.tensor(self.modes)
        self.error = pinned(torch.zeros(1, dtype=torch.int32))
        self.stamps, has_answer = on_device([-1, -1], torch.int64), on_device([-1])
        told = self.told.to(DEVICE)
        # As a projection takes them: rows lie apart.
        room = torch.zeros(3, self.heads + 1, self.head_dim, device=DEVICE, dtype=self.dtype)
        memory = ReadMemory(
            plans.to(DEVICE),
            rows.to(DEVICE),
            on_device([2, 0, 3]),
            self.head_units.to(DEVICE),
            told,
        )
        on = [part.to(DEVICE) for part in (*self.window, *self.resident)]
        self.wait(has_answer)
        TierMerge(self.heads, self.kv_heads, self.head_dim).merge(
            WindowStates(on[0], on[1], on[1]),
            ResidentStates(on[2], on[3]),
            HostStates(*(pinned(part) for part in of_host)),
            counts.to(DEVICE),
            has_answer,
            room[:, : self.heads],
            memory if self.tells else None,
        )
        self.has_answer = has_answer.item()
        self.output, self.told = room[:, : self.heads].cpu(), told.cpu()
        self.rest = room[:, self.heads :].cpu()

    def wait(self, has_answer: Tensor) -> None:
        """Wait behind lists of units, of which some are empty."""
        attention = ResidentAttention(self.heads, self.kv_heads, self.head_dim, programs=5)
        arrivals = on_device([0])
        wait = HostWait(
            arrivals,
            pinned(torch.tensor([self.answered_step])),
            pinned(torch.tensor([self.skip], dtype=torch.int32)),
            on_device([self.needs]),
            on_device([STEP]),
            self.error,
            self.stamps,
            has_answer,
            self.timeout_ns,
            error_code=21,
        )
        lengths = [[20] * self.kv_heads, [0] * self.kv_heads]
        states = Tier(attention, lengths).states(wait)
        assert states.lse[0].isfinite().any()
        assert arrivals.item() == 0

    def host_lse(self, *, is_there: bool) -> Tensor:
        """Of the groups that the host answers for."""
        is_missing = self.misses.repeat_interleave(self.heads // self.kv_heads, dim=1)
        nothing = torch.full_like(self.host[1], -math.inf)
        return torch.where(is_missing & is_there, self.host[1], nothing)

    def check(self, *, has_host: bool, atol: float = 1e-6) -> None:
        """Hold everything that was written against the oracles."""
        host_lse = self.host_lse(is_there=has_host).double()
        outputs = torch.cat([self.window[0], self.resident[0]], dim=2).double()
        lses = torch.cat([self.window[1], self.resident[1]], dim=2).double()
        expected = handover.merge_parts(outputs, lses, self.host[0].double(), host_lse)
        torch.testing.assert_close(self.output.double(), expected, atol=atol, rtol=atol)
        assert (self.rest == 0).all()
        lse = reference.read_lse(self.resident[1].double(), host_lse)
        told = torch.full((4, self.heads, 2), math.nan).double()
        for row, slot in enumerate((2, 0)):
            if self.modes[row] and self.tells:
                told[slot, :, 0], told[slot, :, 1] = lse[row], self.head_units[row] / 50
        torch.testing.assert_close(self.told.double(), told, atol=1e-5, rtol=1e-6, equal_nan=True)
        assert self.has_answer == has_host


@pytest.mark.parametrize("resident_splits", [1, 5, 128])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(2, 2, 64), (6, 2, 64), (8, 2, 128), (14, 2, 64)]
)
def test_window_tier_and_host_merge_to_one_attention(
    heads: int, kv_heads: int, head_dim: int, resident_splits: int
):
    layer = Layer(heads, kv_heads, head_dim, resident_splits=resident_splits)
    layer.check(has_host=True)
    assert layer.error.item() == 0
    begin, end = layer.stamps.tolist()
    assert 0 < begin <= end


@pytest.mark.parametrize(
    "empty",
    [
        ("window",),
        ("resident",),
        ("host",),
        ("window", "resident"),
        ("window", "host"),
        ("resident", "host"),
        ("window", "resident", "host"),
    ],
)
def test_parts_that_are_empty_leave_the_others(empty: tuple[str, ...]):
    Layer(empty=empty).check(has_host=True)


def test_a_layer_without_misses_neither_waits_nor_reads_the_host():
    # The host has not answered, and would not: a wait would end with an error.
    layer = Layer(needs=0, answered_step=STEP - 1, timeout_ns=1000)
    layer.check(has_host=False)
    assert layer.error.item() == 0
    begin, end = layer.stamps.tolist()
    assert 0 < begin == end


def test_a_layer_that_is_skipped_neither_waits_nor_reads_the_host():
    layer = Layer(skip=1, answered_step=STEP - 1, timeout_ns=1000)
    layer.check(has_host=False)
    assert layer.error.item() == 0
    begin, end = layer.stamps.tolist()
    assert 0 < begin == end


def test_an_answer_of_a_later_step_is_an_answer():
    Layer(answered_step=STEP + 1).check(has_host=True)


def test_a_host_that_does_not_answer_is_given_up_and_named():
    layer = Layer(answered_step=STEP - 1, timeout_ns=1000)
    assert layer.error.item() == 21
    layer.check(has_host=False)
    begin, end = layer.stamps.tolist()
    assert end - begin >= 1000


def test_the_output_is_of_the_models_dtype():
    Layer(dtype=torch.bfloat16).check(has_host=True, atol=2e-2)


def test_rows_whose_planner_does_not_ask_are_told_nothing():
    assert Layer(modes=(0, 0, 0)).told.isnan().all()
    layer = Layer(tells=False)
    layer.check(has_host=True)
    assert layer.told.isnan().all()


def test_a_region_far_below_the_window_is_told_all_the_same():
    layer = Layer()
    layer.window[1][0] = 500.0
    layer.window[0][0] = 1.0
    layer.run()
    layer.check(has_host=True)
    assert layer.told[2, :, 0].max() < 100
