"""Layout, build and scan of keys of 2 bits, against the definition."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import Tensor

from fluxion_core.errors import ShapeError
from fluxion_core.geometry import BLOCK_TOKENS, KvGeometry
from fluxion_core.kernels.head_plan.constants import READ_ALL, READ_NOTHING
from fluxion_core.kernels.key_index import layout, reference
from fluxion_core.kernels.key_index import triton as kernels
from fluxion_core.kernels.key_index.launch import KeyIndexKernels, group_list
from fluxion_core.kernels.tier.constants import REGION_BEGIN, REGION_END, ROW_WORDS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LAYERS, LAYER, KV_HEADS, SLABS = 2, 1, 2, 4
UNTOUCHED = -77.0


@dataclass
class Row:
    """A sequence's slabs, its region, and the levels of its KV heads."""

    slabs: list[int] = field(default_factory=lambda: [2, 0, 3])
    region: range = field(default_factory=lambda: range(64, 304))
    levels: list[int] = field(default_factory=lambda: [0, 3])


class Node:
    """Slabs full of random KV, and room for their index."""

    def __init__(self, *rows: Row, head_dim: int = 64, group: int = 3) -> None:
        self.rows = rows
        self.geometry = KvGeometry(LAYERS, KV_HEADS, head_dim, slab_tokens=128)
        self.kernels = KeyIndexKernels(self.geometry, KV_HEADS * group, programs=8)
        generator = torch.Generator().manual_seed(head_dim + group)
        shape = (SLABS, LAYERS, KV_HEADS, self.geometry.slab_blocks, 2, BLOCK_TOKENS, head_dim)
        kv = torch.randn(shape, generator=generator)
        # Means and scales as of real keys, whose channels differ.
        kv = kv * torch.logspace(-1, 0.5, head_dim) + torch.linspace(-20, 20, head_dim)
        self.kv = kv.bfloat16().to(DEVICE)
        self.index = torch.zeros(SLABS, self.kernels.slab_bytes, dtype=torch.uint8, device=DEVICE)
        query = torch.randn(len(rows), KV_HEADS * group, head_dim, generator=generator) / 8
        self.query = query.bfloat16().to(DEVICE)

    def addresses(self, of: Tensor, row: Row) -> Tensor:
        return torch.tensor([of[slab].data_ptr() for slab in row.slabs])

    def build(self) -> None:
        for row in self.rows:
            slabs, places = (self.addresses(of, row) for of in (self.kv, self.index))
            listed = group_list(slabs, places, self.geometry, row.region)
            self.kernels.build(listed.to(DEVICE))

    def keys(self, row: Row, kv_head: int) -> Tensor:
        """[tokens, head_dim] of a row's slabs."""
        return self.kv[row.slabs, LAYER, kv_head, :, 0].flatten(0, 2).cpu()

    def scan(self) -> Tensor:
        words = np.zeros((len(self.rows), ROW_WORDS.value), np.int64)
        index = torch.zeros(len(self.rows), 3, dtype=torch.int64)
        for number, row in enumerate(self.rows):
            words[number, REGION_BEGIN.value] = row.region.start
            words[number, REGION_END.value] = row.region.stop
            index[number, : len(row.slabs)] = self.addresses(self.index, row)
        levels = torch.tensor([row.levels for row in self.rows], dtype=torch.int32)
        scores = torch.full((len(self.rows), self.query.shape[1], 64), UNTOUCHED, device=DEVICE)
        self.kernels.scan(
            LAYER,
            torch.from_numpy(words).to(DEVICE),
            index.to(DEVICE),
            levels.to(DEVICE),
            self.query,
            scores,
        )
        return scores.cpu()

    def expected(self, number: int, kv_head: int) -> Tensor:
        """[group, blocks] of the definition."""
        row, group = self.rows[number], self.kernels.group
        query = self.query[number, kv_head * group : (kv_head + 1) * group].cpu()
        index = reference.quantize(self.keys(row, kv_head))
        units = reference.unit_scores(query, index)
        begin, end = row.region.start // BLOCK_TOKENS, row.region.stop // BLOCK_TOKENS
        return reference.level_scores(units, begin, end, row.levels[kv_head])


@pytest.mark.parametrize("head_dim", layout.HEAD_DIMS)
def test_what_is_packed_is_unpacked(head_dim: int):
    generator = torch.Generator().manual_seed(head_dim)
    index = reference.quantize(torch.randn(2, 192, head_dim, generator=generator).bfloat16())
    packed = layout.pack(index)
    assert packed.shape == (2, 3, layout.group_bytes(head_dim))
    assert layout.group_bytes(head_dim) == 20 * head_dim
    for one, other in zip(layout.unpack(packed, head_dim), index, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


@pytest.mark.parametrize("share", [1, 2, 4])
@pytest.mark.parametrize("place", range(8))
def test_the_gpus_own_unpacking_leaves_a_code_below_its_factor(place: int, share: int):
    # The interpreter has a body of its own for this: here the instructions are done by hand.
    source = kernels._unpacking.fn(place, share)
    shift = re.search(r"shr\.u32 w, \$1, (\d+);", source)
    mask = re.search(r"and\.b32 \$0, (?:w|\$1), (0x[0-9a-f]+);", source)
    assert mask
    factor = 4 ** (place % (8 // share) % 5)
    for first, second in ((0, 3), (1, 2), (3, 3), (2, 0)):
        # Both halves of a register are full of ones, but for the codes looked for.
        words = [0xFFFF & ~(3 << 2 * place) | code << 2 * place for code in (first, second)]
        register = words[0] | words[1] << 16
        left = (register >> int(shift[1]) if shift else register) & int(mask[1], 16)
        assert (left & 0xFFFF, left >> 16) == (first * factor, second * factor)
        # Fractions of float16 have 10 bits; beyond them a number is not subnormal any more.
        assert max(left & 0xFFFF, left >> 16) < 1024


@pytest.mark.parametrize("head_dim", layout.HEAD_DIMS)
def test_groups_are_built_as_they_are_defined(head_dim: int):
    row = Row(region=range(64, 304))
    node = Node(row, head_dim=head_dim)
    # One that is constant, and one that is not finite.
    node.kv[0, LAYER, 1, :, 0, :, 3] = 7
    node.kv[0, LAYER, 1, 5, 0, 2, 9] = math.inf
    node.kv[0, LAYER, 1, 5, 0, 3, 9] = math.nan
    node.build()
    in_order = node.index[row.slabs].view(3, LAYERS, KV_HEADS, 2, -1).cpu()
    for kv_head in range(KV_HEADS):
        packed = layout.pack(reference.quantize(node.keys(row, kv_head)))
        own = in_order[:, LAYER, kv_head].flatten(0, 1)
        # Tokens 64 to 303 are of groups 1 to 4.
        assert torch.equal(own[1:5], packed[1:5])
        assert not own[0].any()
        assert not own[5].any()


@pytest.mark.parametrize(("head_dim", "group"), [(64, 3), (64, 6), (128, 4), (128, 7), (64, 9)])
def test_scores_are_those_of_the_definition(head_dim: int, group: int):
    rows = (
        Row(),
        Row(slabs=[1, 3], region=range(16, 176), levels=[1, 2]),
        Row(slabs=[1], region=range(0), levels=[0, 0]),
    )
    node = Node(*rows, head_dim=head_dim, group=group)
    node.build()
    scores = node.scan()
    for number in range(2):
        for kv_head in range(KV_HEADS):
            expected = node.expected(number, kv_head)
            own = scores[number, kv_head * group : (kv_head + 1) * group]
            # A query by a step is rounded to float16, 2^-11 of it: random over channels.
            torch.testing.assert_close(own[:, : expected.shape[1]], expected, atol=0.005, rtol=1e-4)
            assert (own[:, expected.shape[1] :] == UNTOUCHED).all()
    assert (scores[2] == UNTOUCHED).all()


@pytest.mark.parametrize("level", range(4))
def test_a_region_may_begin_and_end_within_any_block(level: int):
    regions = [range(16, 32), range(16, 128), range(80, 208), range(112, 272), range(64, 256)]
    rows = [Row(region=region, levels=[level, READ_NOTHING.value]) for region in regions]
    node = Node(*rows, head_dim=32)
    node.build()
    scores = node.scan()
    for number in range(len(rows)):
        expected = node.expected(number, 0)
        torch.testing.assert_close(
            scores[number, :3, : expected.shape[1]], expected, atol=0.005, rtol=1e-4
        )
        assert (scores[number, :3, expected.shape[1] :] == UNTOUCHED).all()


def test_who_reads_all_or_nothing_has_no_scores():
    node = Node(Row(levels=[READ_ALL.value, READ_NOTHING.value]))
    node.build()
    assert (node.scan() == UNTOUCHED).all()


def test_shapes_that_no_kernel_takes_are_refused():
    with pytest.raises(ShapeError, match="head_dim is 256"):
        KeyIndexKernels(KvGeometry(1, 1, 256), 4)
    with pytest.raises(ShapeError, match="17 query heads"):
        KeyIndexKernels(KvGeometry(1, 1, 64), 17)
    with pytest.raises(ShapeError, match="0 programs"):
        KeyIndexKernels(KvGeometry(1, 1, 64), 4, programs=0)
