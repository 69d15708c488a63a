"""Default windows on the device: sink and newest tokens of every running sequence, in slots.

The store holds these tokens too; here they are copied to, so that a step's dense attention reads
device memory alone. A slot is taken when a sequence joins and given back when it leaves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fluxion_core.errors import CapacityError
from fluxion_core.geometry import BLOCK_TOKENS, KvGeometry, WindowSpec
from fluxion_core.kvstore.sequence import SequenceKv


class DeviceWindows:
    """Windows of up to `num_slots` sequences.

    Args:
        geometry: of the model's KV.
        window: sizes of sink and ring.
        num_slots: sequences that may run together.
        device: where the windows are.
    """

    def __init__(
        self, geometry: KvGeometry, window: WindowSpec, num_slots: int, device: torch.device
    ) -> None:
        self.geometry = geometry
        """Of the model's KV."""
        self.window = window
        """Sizes of sink and ring."""
        self.tensors: Tensor = torch.zeros(
            geometry.num_layers,
            2,
            num_slots,
            geometry.num_kv_heads,
            window.slot_tokens,
            geometry.head_dim,
            dtype=torch.bfloat16,
            device=device,
        )
        """[layers, 2 (K, V), slots, kv_heads, slot_tokens, head_dim] bfloat16."""
        self._free = list(range(num_slots - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Slots that a sequence can take."""
        return len(self._free)

    @property
    def slot_bytes(self) -> int:
        """Device memory of one slot."""
        return self.tensors[:, :, 0].numel() * self.tensors.element_size()

    def key(self, layer: int) -> Tensor:
        """[slots, kv_heads, slot_tokens, head_dim] of one layer."""
        return self.tensors[layer, 0]

    def value(self, layer: int) -> Tensor:
        """Like `key`."""
        return self.tensors[layer, 1]

    def block(self, slot: int, first_token: int) -> Tensor:
        """[layers, 2 (K, V), kv_heads, 16, head_dim] in place: a block that a slot holds.

        Args:
            slot: that a sequence has.
            first_token: of the block, a multiple of 16.
        """
        entry = self.window.slot_index(first_token)
        block: Tensor = self.tensors[:, :, slot, :, entry : entry + BLOCK_TOKENS]
        return block

    def join(self, sequence: SequenceKv) -> int:
        """Take a slot and copy a committed sequence's window into it, on the current stream.

        Raises:
            CapacityError: all slots are taken.
        """
        from fluxion_core.kernels.window_fill.triton import fill_window

        if not self._free:
            raise CapacityError(
                "device windows",
                needed=1,
                free=0,
                unit="slots",
                remedy="raise engine.max_running_sequences, or wait for a sequence to end",
            )
        slot = self._free.pop()
        fill_window(
            self.geometry,
            self.window,
            sequence.slab_table,
            sequence.num_tokens,
            slot,
            self.tensors,
        )
        return slot

    def leave(self, slot: int) -> None:
        """Give a slot back. What it held may be overwritten by who joins next."""
        self._free.append(slot)
