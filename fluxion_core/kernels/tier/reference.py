"""Selection of one group in plain torch, and what it asks for: the oracle."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fluxion_core.geometry import BLOCK_SIZES, BLOCK_TOKENS
from fluxion_core.kernels.block_topk import reference as block_topk
from fluxion_core.kernels.head_plan.constants import READ_ALL, READ_NOTHING
from fluxion_core.kernels.tier.constants import ABSENT, PENDING


def choose_units(scores: Tensor, level: int, budgets: list[int], region: range) -> Tensor:
    """Choose what each head of a group reads.

    Args:
        scores: [group, blocks] of the level's blocks that touch the region; not looked at where all
            or nothing is read.
        level: an index into BLOCK_SIZES, READ_ALL or READ_NOTHING.
        budgets: of each head, in blocks of the level.
        region: in tokens, multiples of 16.

    Returns:
        [group, units] bool, of the region's 16-token units.
    """
    units = torch.arange(region.start // BLOCK_TOKENS, region.stop // BLOCK_TOKENS)
    chosen = torch.zeros(len(budgets), len(units), dtype=torch.bool)
    if level in (READ_ALL.value, READ_NOTHING.value):
        return chosen.fill_(level == READ_ALL.value)
    first = region.start // BLOCK_SIZES[level]
    block = units * BLOCK_TOKENS // BLOCK_SIZES[level] - first
    for head, budget in enumerate(budgets):
        chosen[head] = torch.isin(block, block_topk.choose_top(scores[head], budget))
    return chosen


class UnitLists(NamedTuple):
    """Units that a group reads, in ascending order. Masks have bit h for head h."""

    resident_slots: Tensor
    """[resident] int32."""
    resident_masks: Tensor
    missing_units: Tensor
    """[missing] int32, counted from the sequence's start."""
    missing_masks: Tensor
    missing_blocks: Tensor
    """[missing] int32: the same in the arena."""


def split_units(chosen: Tensor, first_unit: int, arena_blocks: Tensor, table: Tensor) -> UnitLists:
    """List what some head of a group reads: what is in device memory, and what is not.

    Args:
        chosen: [group, units] bool.
        first_unit: of the region.
        arena_blocks: [units] of the region's units.
        table: [arena blocks] int32.
    """
    wanted, masks = (part.int() for part in block_topk.union(chosen))
    blocks = arena_blocks.int()[wanted]
    slots = table[blocks]
    held, missing = slots >= 0, slots < 0
    return UnitLists(
        slots[held],
        masks[held],
        wanted[missing] + first_unit,
        masks[missing],
        blocks[missing],
    )


def ask_for(table: Tensor, blocks: Tensor, asked: int, room: int) -> list[int]:
    """Ask for arena blocks that nobody has asked for, while there is room.

    Args:
        table: [arena blocks] int32; those that are asked for become PENDING.
        blocks: arena blocks, in the order in which they are found missing.
        asked: how many have been asked for before.
        room: how many may be.

    Returns:
        Arena blocks that are asked for now.
    """
    new: list[int] = []
    for block in blocks.tolist():
        if int(table[block]) == ABSENT.value and asked + len(new) < room:
            table[block] = PENDING.value
            new.append(block)
    return new
