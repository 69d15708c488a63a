"""Attention of a decode step over units in device memory: flash decoding over lists of slots."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fluxion_core.errors import ShapeError
from fluxion_core.geometry import BLOCK_TOKENS, MAX_GROUP
from fluxion_core.kernels.head_shape import check_heads
from fluxion_core.kernels.tier.constants import COUNT_WORDS, RESIDENT
from fluxion_core.kernels.tier.host_wait import HostWait, await_as_last
from fluxion_core.kernels.tile_products import MIN_ROWS, float32_dot

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

LEAST_TILES = tl.constexpr(2)
"""Of a program, where a list has as many: what is not read side by side need not be merged."""
MAX_SPLITS = 128
_LONGEST = 8
"""How often an even share of the programs may work at one list."""


@triton.jit
def _attend_share(
    query,
    tier_ptr,
    slots_ptr,
    masks_ptr,
    begin,
    end,
    units,
    SCALE: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TILE_UNITS: tl.constexpr,
    STAGES: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Highest score in base 2, sum of weights, weighted sum of values, of some tiles of a list."""
    UNIT: tl.constexpr = 2 * 16 * HEAD_DIM
    member = tl.arange(0, GROUP_ROWS)
    token = tl.arange(0, TILE_UNITS * 16)
    in_unit = (token % 16)[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]
    highest = tl.full((GROUP_ROWS,), float("-inf"), tl.float32)
    weight_sum = tl.zeros((GROUP_ROWS,), tl.float32)
    sums = tl.zeros((GROUP_ROWS, HEAD_DIM), tl.float32)
    # A tile ahead: an address that has still to be looked up keeps the pipeline from its loads.
    unit = begin * TILE_UNITS + token // 16
    slot = tl.load(slots_ptr + unit, mask=unit < units, other=0)
    heads = tl.load(masks_ptr + unit, mask=unit < units, other=0)
    for first in tl.range(begin * TILE_UNITS, end * TILE_UNITS, TILE_UNITS, num_stages=STAGES):
        key_ptr = tier_ptr + slot.to(tl.int64)[:, None] * UNIT + in_unit
        is_listed = (first + token // 16 < units)[:, None]
        key = tl.load(key_ptr, mask=is_listed, other=0.0)
        value = tl.load(key_ptr + 16 * HEAD_DIM, mask=is_listed, other=0.0)
        unit = first + TILE_UNITS + token // 16
        slot = tl.load(slots_ptr + unit, mask=unit < units, other=0)

        scores = float32_dot(query, tl.trans(key), EXACT) * (SCALE * LOG2E)
        is_wanted = ((heads[None, :] >> member[:, None]) & 1) != 0
        scores = tl.where(is_wanted, scores, float("-inf"))
        heads = tl.load(masks_ptr + unit, mask=unit < units, other=0)
        new_highest = tl.maximum(highest, tl.max(scores, axis=1))
        reference = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        weights = tl.exp2(scores - reference[:, None])
        before = tl.exp2(highest - reference)
        weight_sum = weight_sum * before + tl.sum(weights, axis=1)
        sums = sums * before[:, None] + float32_dot(weights, value, EXACT)
        highest = new_highest
    return highest, weight_sum, sums


@triton.jit
def _deal(
    counts_ptr,
    groups,
    GROUPS: tl.constexpr,
    SPLITS: tl.constexpr,
    TILE_UNITS: tl.constexpr,
):
    """Group of this program, units of its list, its place of how many that share the list; and how
    many programs have a list.

    Programs are dealt out by the tiles of the lists, at least one to each group; those that are
    left get a group that does not exist.
    """
    index = tl.arange(0, GROUPS)
    is_group = index < groups
    units = tl.load(counts_ptr + index * COUNT_WORDS + RESIDENT, mask=is_group, other=0)
    tiles = (units + TILE_UNITS - 1) // TILE_UNITS
    dealt = tl.num_programs(0) - groups
    tiles_each = tl.maximum((tl.sum(tiles, axis=0) + dealt - 1) // dealt, LEAST_TILES)
    sharing = tl.minimum(tl.maximum((tiles + tiles_each - 1) // tiles_each, 1), SPLITS)
    sharing = tl.where(is_group, sharing, 0)
    end = tl.cumsum(sharing, axis=0)
    is_before = is_group & (end <= tl.program_id(0))
    group = tl.sum(is_before.to(tl.int32), axis=0)
    split = tl.program_id(0) - tl.max(tl.where(is_before, end, 0), axis=0)
    is_own = index == group
    own_units = tl.sum(tl.where(is_own, units, 0), axis=0)
    own_sharing = tl.sum(tl.where(is_own, sharing, 0), axis=0)
    return group, own_units, split, own_sharing, tl.sum(sharing, axis=0)


@triton.jit(
    do_not_specialize=["timeout_ns", "error_code"],
    do_not_specialize_on_alignment=[
        "counts_ptr",
        "answered_ptr",
        "skip_ptr",
        "needs_ptr",
        "stamps_ptr",
    ],
)
def attend_resident(
    query_ptr,
    tier_ptr,
    slots_ptr,
    masks_ptr,
    counts_ptr,
    output_ptr,
    lse_ptr,
    arrivals_ptr,
    answered_ptr,
    skip_ptr,
    needs_ptr,
    step_ptr,
    error_ptr,
    stamps_ptr,
    has_answer_ptr,
    timeout_ns,
    error_code,
    groups,
    query_stride,
    stride,
    SCALE: tl.constexpr,
    GROUPS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    TILE_UNITS: tl.constexpr,
    STAGES: tl.constexpr,
    EXACT: tl.constexpr,
    WAITS: tl.constexpr,
):
    """One program: the state of one GQA group of one row over an even share of its list. The last
    one waits for the host.
    """
    needs = 0
    if WAITS:
        needs = tl.load(needs_ptr)
    own, units, split, sharing, working = _deal(counts_ptr, groups, GROUPS, SPLITS, TILE_UNITS)
    group = own.to(tl.int64)
    member = tl.arange(0, GROUP_ROWS)
    inside = member < tl.where(own < groups, GROUP, 0)
    head = group * GROUP + member
    if split == 0:
        # What no program will write.
        part = tl.arange(0, SPLITS)
        tl.store(
            lse_ptr + head[:, None] * SPLITS + part[None, :],
            tl.full((GROUP_ROWS, SPLITS), float("-inf"), tl.float32),
            mask=inside[:, None] & (part >= tl.where(units > 0, sharing, 0))[None, :],
        )
    if units > 0:
        channel = tl.arange(0, HEAD_DIM)
        query_ptr += group // KV_HEADS * query_stride + group % KV_HEADS * (GROUP * HEAD_DIM)
        at_query = member[:, None] * HEAD_DIM + channel[None, :]
        query = tl.load(query_ptr + at_query, mask=inside[:, None], other=0.0).to(tl.float32)
        tiles = (units + TILE_UNITS - 1) // TILE_UNITS
        # fmt: off
        highest, weight_sum, sums = _attend_share(
            query, tier_ptr, slots_ptr + group * stride, masks_ptr + group * stride,
            split * tiles // sharing, (split + 1) * tiles // sharing, units, SCALE, GROUP_ROWS,
            HEAD_DIM, TILE_UNITS, STAGES, EXACT)
        # fmt: on
        weight_sum = tl.where(weight_sum == 0.0, 1.0, weight_sum)
        state = head * SPLITS + split
        tl.store(lse_ptr + state, (highest + tl.log2(weight_sum)) * LN2, mask=inside)
        tl.store(
            output_ptr + state[:, None] * HEAD_DIM + channel[None, :],
            sums / weight_sum[:, None],
            mask=inside[:, None],
        )
    if WAITS:
        # fmt: off
        await_as_last(own < groups, working, needs, arrivals_ptr, answered_ptr, skip_ptr, step_ptr,
                      error_ptr, stamps_ptr, has_answer_ptr, timeout_ns, error_code)
        # fmt: on


class ResidentStates(NamedTuple):
    """Partial states of rows' resident units, on the device. float32, contiguous."""

    output: Tensor
    """[rows, num_heads, splits, head_dim], normalised; anything where the lse is -inf."""
    lse: Tensor
    """[rows, num_heads, splits], natural log; -inf for a split in which a head reads nothing."""


@dataclass(frozen=True)
class ResidentAttention:
    """The shape of an attention over resident units; everything is checked when it is made.

    A program is one warp, which needs no barrier with others: several share a processor, and one
    multiplies while the next tiles of all are on their way.

    Raises:
        ShapeError: no kernel takes these heads; or what follows is no number that it takes.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    programs: int = 512
    """That share the lists of a launch by their lengths, beside one for each: four to a processor
    of an H200, which holds six."""
    stages: int = 3
    """Tiles of a program: one less is on its way or being multiplied."""
    tile_bytes: int = 16 << 10
    """K and V that a program multiplies at a time; a power of two."""
    is_float32: bool = False
    """Of a float32 model: all bits of queries and weights count; else 16 of them are enough."""

    def __post_init__(self) -> None:
        check_heads(self.num_heads, self.num_kv_heads, self.head_dim)
        if self.group > MAX_GROUP:
            raise ShapeError(f"{self.group} query heads to a KV head; up to {MAX_GROUP}")
        if self.programs <= 0 or self.stages <= 0:
            raise ShapeError(f"{self.programs} programs of {self.stages} stages; at least 1")
        if self.tile_bytes <= 0 or self.tile_bytes & (self.tile_bytes - 1):
            raise ShapeError(f"tile_bytes is {self.tile_bytes}; a power of two")

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.num_heads // self.num_kv_heads

    def num_programs(self, rows: int) -> int:
        """Programs of a launch for so many rows."""
        return self.programs + rows * self.num_kv_heads

    def num_splits(self, rows: int) -> int:
        """Partial states of a head, at most, in a step of so many rows; a power of two."""
        even = max(1, self.programs // (rows * self.num_kv_heads))
        return min(MAX_SPLITS, _LONGEST << (even.bit_length() - 1))

    def make_states(self, rows: int, device: torch.device) -> ResidentStates:
        """Room for the states of `rows` rows."""
        shape = (rows, self.num_heads, self.num_splits(rows))
        return ResidentStates(
            torch.empty(*shape, self.head_dim, dtype=torch.float32, device=device),
            torch.empty(shape, dtype=torch.float32, device=device),
        )

    def launch(
        self,
        query: Tensor,
        tier: Tensor,
        slots: Tensor,
        masks: Tensor,
        counts: Tensor,
        states: ResidentStates,
        wait: HostWait | None = None,
    ) -> None:
        """Attend to each group's resident units, each head to those that it reads; then wait for
        the host.

        Only launches, on the current stream; may be captured in a CUDA graph. Grid: `num_programs`.

        Args:
            query: [rows, num_heads, head_dim] of the model's dtype, unscaled; rows may lie apart.
            tier: uint8, contiguous: units of [K 16 x head_dim | V 16 x head_dim] bfloat16.
            slots: [rows, num_kv_heads, stride] int32, contiguous: places of units in the tier.
            masks: like slots: bit h says that head h of the group reads the unit.
            counts: [rows, num_kv_heads, 2] int32, contiguous: words of constants.py, of which
                RESIDENT says how many are listed; 0 in rows that are padding.
            states: of as many rows; written.
            wait: for the host, by the last of the programs; None: nobody waits.

        Cost: reads listed units once, 64 * head_dim B each, and writes the states of splits that
        have work; the others take nearly nothing.
        """
        group_rows = max(MIN_ROWS, triton.next_power_of_2(self.group))
        groups = query.shape[0] * self.num_kv_heads
        attend_resident[(self.num_programs(query.shape[0]),)](
            query,
            tier.view(torch.bfloat16),
            slots,
            masks,
            counts,
            *states,
            *(wait or (None,) * len(HostWait._fields)),
            groups,
            query.stride(0),
            slots.shape[2],
            SCALE=self.head_dim**-0.5,
            GROUPS=triton.next_power_of_2(groups),
            KV_HEADS=self.num_kv_heads,
            GROUP=self.group,
            GROUP_ROWS=group_rows,
            HEAD_DIM=self.head_dim,
            SPLITS=states.lse.shape[2],
            TILE_UNITS=max(1, self.tile_bytes // (4 * BLOCK_TOKENS * self.head_dim)),
            STAGES=self.stages,
            EXACT=self.is_float32,
            WAITS=wait is not None,
            num_warps=group_rows // MIN_ROWS,
        )
