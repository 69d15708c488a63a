"""Launches of the scan and the build of keys of 2 bits; shapes are checked once, here."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fluxion_core.errors import ShapeError
from fluxion_core.geometry import MAX_GROUP, KvGeometry
from fluxion_core.kernels.head_shape import check_heads
from fluxion_core.kernels.key_index.layout import check_head_dim, group_bytes
from fluxion_core.kernels.key_index.reference import GROUP_TOKENS
from fluxion_core.kernels.key_index.triton import build_groups, scan_groups
from fluxion_core.kernels.tier.constants import ROW_WORDS

COLUMNS = 8
"""Heads of a group are filled up to a multiple of this: columns of a product."""


@dataclass(frozen=True)
class KeyIndexKernels:
    """The shape of an index of 2 bits; everything is checked when it is made.

    Args:
        geometry: layout of the slabs.
        num_heads: query heads of the model.
        programs: that scan a layer, at most, unless it has more groups of heads: as many as run at
            a time. 16 of one warp find room on each of an H200's 132 multiprocessors.

    Raises:
        ShapeError: no kernel takes these shapes.
    """

    geometry: KvGeometry
    num_heads: int
    programs: int = 2112

    def __post_init__(self) -> None:
        check_heads(self.num_heads, self.geometry.num_kv_heads, self.geometry.head_dim)
        check_head_dim(self.geometry.head_dim)
        if self.group > MAX_GROUP:
            raise ShapeError(f"{self.group} query heads to a KV head; up to {MAX_GROUP}")
        if self.programs <= 0:
            raise ShapeError(f"{self.programs} programs that scan")

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.num_heads // self.geometry.num_kv_heads

    @property
    def slab_groups(self) -> int:
        """Groups of 64 tokens of a slab."""
        return self.geometry.slab_tokens // GROUP_TOKENS

    @property
    def slab_bytes(self) -> int:
        """The index of a slab: all layers, KV heads and groups."""
        heads = self.geometry.num_layers * self.geometry.num_kv_heads
        return heads * self.slab_groups * group_bytes(self.geometry.head_dim)

    def scan(
        self,
        layer: int,
        rows: Tensor,
        index: Tensor,
        levels: Tensor,
        query: Tensor,
        scores: Tensor,
    ) -> None:
        """Score the blocks of each group's level that touch its row's region.

        Only a launch, on the current stream; may be captured in a CUDA graph.

        Args:
            layer: of the model.
            rows: [rows, ROW_WORDS] int64 on the device; see tier/constants.py for the words.
            index: [rows, slabs] int64 on the device: addresses of the indices of a row's slabs, of
                `slab_bytes` each, in token order up to the region's end.
            levels: [rows, num_kv_heads] int32, this layer's: a block size's index, READ_ALL or
                READ_NOTHING.
            query: [rows, num_heads, head_dim] of the model's dtype, unscaled; rows may lie apart.
                Counts as bfloat16.
            scores: [rows, num_heads, stride] float32; takes the scores, from the first block that
                touches the region on: logarithms of sums of exp(q.k / sqrt(head_dim)).

        Cost: reads 20 * head_dim bytes for each 64 tokens of the region and KV head, whatever the
        level, and writes 4 for each block and head.
        """
        assert rows.shape[1] == ROW_WORDS.value
        geometry = self.geometry
        tasks = len(rows) * geometry.num_kv_heads
        runs = -(-index.shape[1] * geometry.slab_tokens // GROUP_TOKENS)
        scan_groups[(tasks, max(1, min(runs, self.programs // tasks)))](
            rows,
            index,
            levels,
            query,
            scores,
            layer,
            query.stride(0),
            index.shape[1],
            scores.shape[2],
            KV_HEADS=geometry.num_kv_heads,
            GROUP=self.group,
            COLUMNS=-(-self.group // COLUMNS) * COLUMNS,
            HEAD_DIM=geometry.head_dim,
            SLAB_GROUPS=self.slab_groups,
            num_warps=1,
        )

    def build(self, groups: Tensor) -> None:
        """Index groups of all layers and KV heads from the K that is stored of them.

        Only a launch, on the current stream. A group may be built again: it becomes the same.

        Args:
            groups: [groups, 3] int64 on the device: address of a slab, wherever the device can
                read it, in the layout of KvGeometry; address of its index; which of its groups.
                All 64 tokens of a group are there.

        Cost: reads K, 128 * head_dim bytes a group, layer and KV head; writes 20 * head_dim.
        """
        geometry = self.geometry
        heads = geometry.num_layers * geometry.num_kv_heads
        if len(groups):
            build_groups[(len(groups), heads)](
                groups, HEAD_DIM=geometry.head_dim, SLAB_GROUPS=self.slab_groups, num_warps=4
            )


def group_list(slabs: Tensor, places: Tensor, geometry: KvGeometry, tokens: range) -> Tensor:
    """Groups that hold any of a sequence's tokens, as `KeyIndexKernels.build` takes them.

    Args:
        slabs: [slabs] int64: addresses of the sequence's slabs, in token order.
        places: [slabs] int64: addresses of their indices.
        geometry: layout of the slabs.
        tokens: of the sequence.

    Returns:
        [groups, 3] int64.
    """
    group = torch.arange(tokens.start // GROUP_TOKENS, -(-tokens.stop // GROUP_TOKENS))
    slab_groups = geometry.slab_tokens // GROUP_TOKENS
    slab = group // slab_groups
    return torch.stack([slabs[slab], places[slab], group % slab_groups], -1)
