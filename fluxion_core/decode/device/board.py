"""The board of a decode step: pinned memory through which GPU and host hand over layers."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from fluxion_core.decode.device.pinned import pinned
from fluxion_core.geometry import KvGeometry
from fluxion_core.kernels import _native
from fluxion_core.kernels.isa import native_layout

STUCK_NS = 10_000_000_000
"""A hand-over that takes longer than this is a fault: the step ends with an error."""

HostListArrays = tuple[
    npt.NDArray[np.int32],
    npt.NDArray[np.int32],
    npt.NDArray[np.int32],
    npt.NDArray[np.int32],
    int,
    int,
]
"""Pinned: flags and counts, both [layers, capacity, kv_heads], units and masks, both [capacity,
kv_heads, stride]; and where the same units and masks are on the device."""


class Board:
    """Flags and rows of up to `capacity` sequences. Every flag has one writer, and says which step.

    Args:
        geometry: of the store.
        num_heads: query heads of the model.
        capacity: sequences of a step.
        vocab_size: of the model.
        device: where the dense part runs.
    """

    def __init__(
        self,
        geometry: KvGeometry,
        num_heads: int,
        capacity: int,
        vocab_size: int,
        device: torch.device,
    ) -> None:
        layers, dim = geometry.num_layers, geometry.head_dim
        floats = (num_heads + 2 * geometry.num_kv_heads) * dim
        self.published = pinned(layers, capacity, dtype=torch.int32)
        """Written by the GPU: this row of this layer is in `rows`."""
        self.answered = pinned(layers, dtype=torch.int32)
        """Written by the host: this layer's output is whole."""
        self.skip = pinned(layers, dtype=torch.int32)
        """Written by the host before a step: not 0 where the GPU need not wait."""
        self.rows = pinned(layers, capacity, floats, dtype=torch.float32)
        """[layers, capacity, queries | keys | values] float32."""
        self.output = pinned(capacity, num_heads, dim, dtype=torch.float32)
        self.lse = pinned(capacity, num_heads, dtype=torch.float32)
        self.error = pinned(1, dtype=torch.int32)
        """Written by the GPU: 1 + the layer whose answer did not come in time."""
        self.input_words = pinned(2, capacity, dtype=torch.int64)
        """Token ids and positions."""
        self.input_rows = pinned(2, capacity, dtype=torch.int32)
        """Window slots, and lengths with the new token; 0 for rows that are padding."""
        self.logits = pinned(capacity, vocab_size, dtype=torch.float32)
        self.stamps = pinned(layers, 3, dtype=torch.int64)
        """The GPU's clock, ns: published, began to wait, was answered."""
        self.planned = pinned(layers, capacity, geometry.num_kv_heads, dtype=torch.int32)
        """Written by the GPU: this group's plan is in `plan_levels` and `plan_budgets`."""
        self.plan_levels = pinned(layers, capacity, geometry.num_kv_heads, dtype=torch.int32)
        self.plan_budgets = pinned(layers, capacity, num_heads, dtype=torch.int32)
        self.device_queries = torch.zeros(
            capacity, num_heads, dim, dtype=torch.float32, device=device
        )

    def native_driver(
        self,
        geometry: KvGeometry,
        num_heads: int,
        timeout_ns: int,
        lists: HostListArrays | None,
    ) -> _native.StepDriver:
        """The host's side of this board, whose pinned memory it keeps.

        Args:
            geometry: of the store.
            num_heads: query heads of the model.
            timeout_ns: how long the host waits for the device at most.
            lists: of what the device selects and lacks; None where the host selects.
        """
        return _native.StepDriver(
            native_layout(geometry),
            num_heads,
            self.published.numpy(),
            self.answered.numpy(),
            self.skip.numpy(),
            self.rows.numpy(),
            self.output.numpy(),
            self.lse.numpy(),
            self.device_queries.data_ptr(),
            self.planned.numpy(),
            self.plan_levels.numpy(),
            self.plan_budgets.numpy(),
            timeout_ns,
            tier=lists,
        )
