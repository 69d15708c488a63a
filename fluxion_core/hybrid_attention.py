"""Decode attention: the default window dense, the retrieval region from host memory, merged by lse.

The attention port that the decode engine puts behind the model. Once per layer, for all sequences
of a step: append k and v to window and store, attend over the window, attend over the region in
place, merge. The softmax over window and region together is exact, whatever computes each part.

What does not change: KV that is stored is never moved or rewritten, and a sequence's result does
not depend on what else is in the batch.

Policies: `exact` reads the whole retrieval region. Not here: how KV comes into the store, and the
model's weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fluxion_core.geometry import BF16_BYTES
from fluxion_core.kernels.dense_attention import cpu as dense_attention
from fluxion_core.kernels.merge import cpu as merge
from fluxion_core.kernels.sparse_attention import cpu as sparse_attention
from fluxion_core.kvstore.store import HostKvStore, SequenceKv, StepAppend
from fluxion_core.kvstore.window import DeviceWindow


class HybridAttention:
    """Attention of decode steps over window and host store, policy `exact`.

    A step is `begin_step`, one `attend` per layer in order, `end_step`. One thread only.

    Args:
        store: where sequences are held.
        window: the device-resident part; on the CPU in this implementation.
    """

    def __init__(self, store: HostKvStore, window: DeviceWindow) -> None:
        self._geometry = store.geometry
        self._window = window
        self._step: _Step | None = None

    def begin_step(self, sequences: Sequence[SequenceKv], slots: Sequence[int]) -> None:
        """Prepare one token for each of these committed sequences.

        Args:
            sequences: with room for one more token.
            slots: their window slots.

        Raises:
            FluxionError: a sequence's reservation is used up.
        """
        self._step = _Step(self._window, StepAppend(self._geometry, sequences), sequences, slots)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See AttentionPort; row i is the next token of sequence i of the step."""
        step = self._step
        assert step is not None, "begin_step comes first"
        key, value = key.to(torch.bfloat16).contiguous(), value.to(torch.bfloat16).contiguous()
        step.append.append(layer, key, value)
        self._window.append(layer, step.slots, step.entries, key, value)
        wide = query.float().contiguous()
        output, lse = dense_attention.attend_window(
            wide,
            self._window.keys[layer][step.slots].float(),
            self._window.values[layer][step.slots].float(),
            step.window_bias,
        )
        if step.has_regions:
            retrieved, retrieved_lse = sparse_attention.attend_block_runs(
                self._geometry, layer, wide, step.regions
            )
            merge.merge_into(output, lse, retrieved, retrieved_lse)
        return output.to(query.dtype)

    def end_step(self) -> list[int]:
        """Count the new tokens; returns the host KV bytes read for each sequence."""
        step = self._step
        assert step is not None, "begin_step comes first"
        step.append.advance()
        self._step = None
        geometry = self._geometry
        per_token = geometry.num_layers * geometry.num_kv_heads * 2 * geometry.head_dim * BF16_BYTES
        return [tokens * per_token for tokens in step.region_tokens]


class _Step:
    """What is the same in all layers of a step."""

    def __init__(
        self,
        window: DeviceWindow,
        append: StepAppend,
        sequences: Sequence[SequenceKv],
        slots: Sequence[int],
    ) -> None:
        spec, device = window.spec, window.keys.device
        positions = [sequence.num_tokens for sequence in sequences]
        # The new token counts: it attends to itself.
        lengths = [position + 1 for position in positions]
        regions = [spec.retrieval_region(length) for length in lengths]
        self.append = append
        self.slots = torch.tensor(slots, device=device)
        self.entries = torch.tensor([spec.slot_index(p) for p in positions], device=device)
        self.window_bias = dense_attention.window_bias(window.step_mask(lengths))
        self.region_tokens = [len(region) for region in regions]
        self.has_regions = any(self.region_tokens)
        self.regions = sparse_attention.BlockRuns.build(
            [sequence.slab_table for sequence in sequences], regions
        )
