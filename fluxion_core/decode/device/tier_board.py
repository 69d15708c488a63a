"""The board of a step whose device selects blocks: what it and the host tell each other.

Plans that are known before a step go to the device, in one piece; lists of the blocks that are not
in device memory come back layer by layer, and at the step's end how many there were of each. The
rest lies on the device alone: what the kernels of a layer leave for each other.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fluxion_core.decode.device.pinned import pinned
from fluxion_core.decode.step import StepRow
from fluxion_core.geometry import KvGeometry
from fluxion_core.kernels.tier.constants import (
    COUNT_WORDS,
    RADIUS,
    REGION_BEGIN,
    REGION_END,
    ROW_WORDS,
    SLAB_TABLE,
)


class TierBoard:
    """Memory of up to `capacity` rows.

    Args:
        geometry: of the store.
        num_heads: query heads of the model.
        capacity: rows of a step.
        stride: blocks of 16 tokens that a group's list has room for.
        device: where the dense part runs.
    """

    def __init__(
        self,
        geometry: KvGeometry,
        num_heads: int,
        capacity: int,
        stride: int,
        device: torch.device,
    ) -> None:
        layers, kv_heads = geometry.num_layers, geometry.num_kv_heads

        def words(*shape: int) -> tuple[Tensor, Tensor]:
            host = pinned(*shape, dtype=torch.int32)
            return host, torch.zeros_like(host, device=device)

        self.given_levels, self.levels = words(layers, capacity, kv_heads)
        """[layers, capacity, kv_heads] int32, pinned: plans that are known before the step; and on
        the device, where those that are made there join them."""
        self.given_budgets, self.budgets = words(layers, capacity, num_heads)
        """[layers, capacity, num_heads] int32, likewise."""
        self.host_counts, self.counts = words(layers, capacity, kv_heads, COUNT_WORDS.value)
        """[layers, capacity, kv_heads, 2] int32: blocks of each group, selected and resident. The
        pinned copy is whole when the step has ended."""
        self.input_rows = pinned(capacity, ROW_WORDS.value, dtype=torch.int64)
        """[capacity, 8] int64, pinned: see kernels/tier/constants.py."""
        self.missing_units = pinned(capacity, kv_heads, stride, dtype=torch.int32)
        """[capacity, kv_heads, stride] int32, pinned, written by the GPU for one layer after the
        other: blocks of the sequence that are in host memory alone."""
        self.missing_masks = pinned(capacity, kv_heads, stride, dtype=torch.int32)
        """Likewise: which heads of the group read each of them."""
        self.missing_counts = pinned(layers, capacity, kv_heads, dtype=torch.int32)
        """[layers, capacity, kv_heads] int32, pinned, written by the GPU: how many they are."""
        self.listed = pinned(layers, capacity, kv_heads, dtype=torch.int32)
        """Written by the GPU, the number of the step: this group's list is there."""
        self.needs = torch.zeros(layers, dtype=torch.int32, device=device)
        """[layers] int32 on the device: groups of a layer that miss anything."""

    def write_rows(
        self,
        rows: Sequence[StepRow],
        regions: Sequence[range],
        radii: npt.NDArray[np.float32],
    ) -> None:
        """Say what the next step's rows are.

        Args:
            rows: of the step.
            regions: retrieval region of each.
            radii: [rows, 4] float32, of the scores of each block size.
        """
        words = self.input_rows.numpy()
        words[:] = 0
        bits = radii.view(np.int32)
        for index, (row, region) in enumerate(zip(rows, regions, strict=True)):
            words[index, SLAB_TABLE.value] = row.sequence.slab_table.data_ptr()
            words[index, REGION_BEGIN.value] = region.start if region else 0
            words[index, REGION_END.value] = region.stop if region else 0
            first = RADIUS.value
            words[index, first : first + bits.shape[1]] = bits[index]
