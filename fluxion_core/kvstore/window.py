"""The default window on the device: sink and recent tokens of every running sequence.

A slot holds one sequence: `sink_tokens` entries, then a ring for the recent ones. A token's entry
is `WindowSpec.slot_index(position)`. Entries outside the window may hold older tokens; `step_mask`
says which count.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fluxion_core.errors import CapacityError
from fluxion_core.geometry import BLOCK_TOKENS, KvGeometry, WindowSpec
from fluxion_core.kvstore.store import SequenceKv


class DeviceWindow:
    """Window slots for a fixed number of sequences.

    Args:
        geometry: layout of the store that slots are filled from.
        spec: which tokens the window holds.
        num_slots: sequences at a time.
        device: where the slots are.
        dtype: of keys and values; bfloat16 holds exactly what the store holds.
    """

    def __init__(
        self,
        geometry: KvGeometry,
        spec: WindowSpec,
        num_slots: int,
        *,
        device: torch.device,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.spec = spec
        self._geometry = geometry
        shape = (
            geometry.num_layers,
            num_slots,
            geometry.num_kv_heads,
            spec.slot_tokens,
            geometry.head_dim,
        )
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        """[layers, slots, kv_heads, slot_tokens, head_dim]; zeros where nothing was written."""
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        """Like keys."""
        self._free_slots = list(range(num_slots - 1, -1, -1))
        self._num_slots = num_slots
        entries = torch.arange(spec.slot_tokens, device=device)
        self._entries = entries
        self._is_sink = entries < spec.sink_tokens

    @property
    def num_free_slots(self) -> int:
        """Slots that nobody holds."""
        return len(self._free_slots)

    @property
    def bytes_per_slot(self) -> int:
        """Device memory of one slot, keys and values."""
        return 2 * self.keys[:, 0].numel() * self.keys.element_size()

    def take_slot(self) -> int:
        """A free slot.

        Raises:
            CapacityError: there is none.
        """
        if not self._free_slots:
            raise CapacityError(
                "window slots",
                needed=1,
                free=0,
                unit="slots",
                remedy="retry later or raise engine.max_running_sequences",
            )
        return self._free_slots.pop()

    def free_slot(self, slot: int) -> None:
        """Give a slot back."""
        assert slot not in self._free_slots
        self._free_slots.append(slot)

    def fill(self, slot: int, sequence: SequenceKv) -> None:
        """Copy a committed sequence's window from the store."""
        spec, num_tokens = self.spec, sequence.num_tokens
        self._copy(slot, sequence, range(min(spec.sink_tokens, num_tokens)))
        self._copy(slot, sequence, range(spec.recent_start(num_tokens), num_tokens))

    def append(
        self, layer: int, slots: Tensor, entries: Tensor, key: Tensor, value: Tensor
    ) -> None:
        """Write one token of every sequence of a step.

        Args:
            layer: 0 to num_layers - 1.
            slots: [batch] int64, on the device.
            entries: [batch] int64; `slot_index` of each token's position.
            key: [batch, kv_heads, head_dim].
            value: like key.
        """
        self.keys[layer][slots, :, entries] = key.to(self.keys.dtype)
        self.values[layer][slots, :, entries] = value.to(self.values.dtype)

    def step_mask(self, num_tokens: Sequence[int]) -> Tensor:
        """Which entries count for sequences of these lengths: [batch, slot_tokens] bool.

        An entry of the ring counts if the newest position that falls on it has been written and
        is not below the window's lower edge.
        """
        spec, device = self.spec, self.keys.device
        total = torch.tensor(num_tokens, device=device).unsqueeze(1)
        start = torch.tensor(
            [spec.recent_start(count) for count in num_tokens], device=device
        ).unsqueeze(1)
        behind = (total - 1 - self._entries) % spec.ring_tokens
        newest = total - 1 - behind
        in_ring = (newest >= start) & (newest < total)
        return torch.where(self._is_sink, self._entries < total, in_ring)

    def _copy(self, slot: int, sequence: SequenceKv, positions: range) -> None:
        if not positions:
            return
        geometry, store = self._geometry, sequence.store
        for ordinal, inside, count in geometry.split_by_slab(positions.start, len(positions)):
            first_block = inside // BLOCK_TOKENS
            last_block = (inside + count - 1) // BLOCK_TOKENS + 1
            blocks = store.slab_kv(sequence.slabs[ordinal])[:, :, first_block:last_block]
            skip = inside - first_block * BLOCK_TOKENS
            # [layers, kv_heads, 2, tokens, head_dim]
            tokens = blocks.transpose(2, 3).flatten(3, 4)[:, :, :, skip : skip + count]
            start = ordinal * geometry.slab_tokens + inside
            entries = torch.tensor(
                [self.spec.slot_index(position) for position in range(start, start + count)],
                device=self.keys.device,
            )
            self.keys[:, slot][:, :, entries] = tokens[:, :, 0].to(self.keys)
            self.values[:, slot][:, :, entries] = tokens[:, :, 1].to(self.values)
