"""The planner on the device: its weights, and what it keeps for the sequence in each slot.

Plans are made within the step's graph from what is on the device already: the window's attention
and copies of the digests. The host would read both from its own memory, which is what limits a
step. What the host knows alone, what the last step's heads read and what that weighed, it writes
into pinned memory, which each step copies once.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fluxion_core.decode.device.digests import CoarseDigests
from fluxion_core.decode.device.pinned import pinned
from fluxion_core.decode.step import StepRow
from fluxion_core.errors import FluxionError
from fluxion_core.geometry import KvGeometry, WindowSpec
from fluxion_core.kernels import _native
from fluxion_core.kernels.dense_attention.triton import WindowStates
from fluxion_core.kernels.head_plan.launch import (
    HeadPlan,
    PlanScratch,
    PlanWeights,
    SlotMemory,
)
from fluxion_core.kernels.head_plan.triton import (
    BY_PRICE,
    BY_THRESHOLD,
    FEATURE_COLUMNS,
    IS_KNOWN,
    MODE,
    NUMBER,
    OUTPUT_COLUMNS,
    PRIOR_WORDS,
    REGION_BEGIN,
    REGION_END,
    ROW_WORDS,
    SLAB_TABLE,
    TILE,
)
from fluxion_core.kvstore.sequence import SequenceKv
from fluxion_core.planning.constants import RADII
from fluxion_core.planning.planner import Planner, PlannerState, native_policy
from fluxion_core.planning.policy import PredictedPolicy


class DevicePlanner:
    """Makes the plans of up to `capacity` sequences; see plans.NetworkPlans.

    Args:
        planner: with a network.
        geometry: of the store.
        window: which tokens every head always attends to.
        num_splits: partial states of the window's attention per head.
        digests: of the store's 128-token blocks, on the device.
        max_context_tokens: of a sequence.
        capacity: sequences of a step, and slots.
        device: where the dense part runs.
        driver: of the host's side, which waits for the plans.
        is_float32: whether the model is.

    Raises:
        ShapeError: no kernel takes the model's heads.
    """

    def __init__(
        self,
        planner: Planner,
        geometry: KvGeometry,
        window: WindowSpec,
        *,
        num_splits: int,
        digests: CoarseDigests,
        max_context_tokens: int,
        capacity: int,
        device: torch.device,
        driver: _native.StepDriver,
        is_float32: bool = False,
    ) -> None:
        self._digests, self._driver = digests, driver
        self._weights = pack_weights(planner, device)
        self._plan = HeadPlan(
            geometry,
            window,
            planner.num_heads,
            num_splits,
            digests.place,
            geometry.slabs_for(max_context_tokens + 1),
            self._weights.biases[0].shape[0],
            is_float32=is_float32,
        )
        self._memory = self._plan.make_memory(capacity, device)
        self._told = pinned(*self._memory.told.shape, dtype=torch.float32)
        self._input = pinned(capacity, ROW_WORDS.value, dtype=torch.int64)
        self._states: list[PlannerState | None] = [None] * capacity
        """By slot: whose estimates it holds."""
        self._is_known = [False] * capacity
        """By slot: whether it remembers a step."""
        self.begin(0)

    def leave(self, slot: int) -> None:
        """Forget the sequence in a slot."""
        self._states[slot] = None
        self._is_known[slot] = False

    def begin(self, num_rows: int) -> None:
        """A step of so many rows begins: none of them is planned here yet."""
        del num_rows
        self._has_rows = False
        self._words = np.zeros((self._input.shape[0], ROW_WORDS.value), dtype=np.int64)

    def source(
        self,
        index: int,
        row: StepRow,
        state: PlannerState,
        region: range,
        policy: PredictedPolicy,
    ) -> _native.PlanSource:
        """Plan the step's row `index` too; what that needs is copied on the current stream."""
        self._take_slot(row.slot, state, row.sequence)
        self._digests.follow(row.slot, row.sequence, region.stop)
        by_price, number = native_policy(policy)
        words = self._words[index]
        words[MODE.value] = BY_PRICE.value if by_price else BY_THRESHOLD.value
        words[NUMBER.value] = np.float32(number).view(np.int32)
        words[REGION_BEGIN.value] = region.start
        words[REGION_END.value] = region.stop
        words[IS_KNOWN.value] = self._is_known[row.slot]
        words[SLAB_TABLE.value] = row.sequence.slab_table.data_ptr()
        self._is_known[row.slot] = True
        self._has_rows = True
        return _native.DevicePlans(
            self._driver,
            index,
            state.planner.native,
            self._told[:, row.slot].numpy(),
        )

    def write_input(self) -> bool:
        """Hand the step's rows to the graph; whether there is anything to plan."""
        if self._has_rows:
            self._input.numpy()[:] = self._words
        return self._has_rows

    def new_layers(self, size: int, *, device_tells: bool = False) -> LayerPlans:
        """Launches of a graph for `size` rows.

        Args:
            size: rows.
            device_tells: whether the graph itself writes into `told` what its heads read.
        """
        told = None if device_tells else self._told
        return LayerPlans(self._plan, self._weights, self._memory, self._input, told, size)

    def take_copied_bytes(self) -> int:
        """Digests that went over the link since the last call."""
        return self._digests.take_copied_bytes()

    @property
    def told_bytes(self) -> int:
        """Bytes that go over the link in each step that plans."""
        return self._told.nbytes

    def _take_slot(self, slot: int, state: PlannerState, sequence: SequenceKv) -> None:
        if self._states[slot] is state:
            return
        if self._states[slot] is not None:
            raise FluxionError(f"slot {slot} has another sequence's planner state")
        estimates = state.estimates()
        self._memory.estimates[:, slot, :, : estimates.shape[-1]].copy_(estimates)
        self._states[slot] = state
        self._is_known[slot] = False
        self._digests.join(slot, sequence, 0)


class LayerPlans:
    """Launches of a graph for the plans of its rows, with scratch of their own.

    Args:
        plan: the shape.
        weights: of the model.
        memory: of the sequences in all slots.
        input_rows: [capacity, 8] int64, pinned: what to plan, of which the first `size` are read.
        told: pinned; what the host says of the last step. None: the device says it to itself.
        size: rows.
    """

    def __init__(
        self,
        plan: HeadPlan,
        weights: PlanWeights,
        memory: SlotMemory,
        input_rows: Tensor,
        told: Tensor | None,
        size: int,
    ) -> None:
        device = memory.query.device
        self._plan, self._weights, self._memory = plan, weights, memory
        self._input, self._told = input_rows[:size], told
        self._rows = torch.zeros_like(self._input, device=device)
        self._scratch: PlanScratch = plan.make_scratch(size, device)

    @property
    def rows(self) -> Tensor:
        """[rows, 8] int64 on the device: what to plan, words of kernels/head_plan/triton.py."""
        return self._rows

    @property
    def told(self) -> Tensor:
        """[layers, slots, heads, 2] float32 on the device: lse and share of what heads read."""
        return self._memory.told

    def begin(self) -> None:
        """Begin a step, before its layers."""
        self._rows.copy_(self._input, non_blocking=True)
        if self._told is not None:
            self._memory.told.copy_(self._told, non_blocking=True)
        self._plan.list_slabs(self._rows, self._scratch)

    def launch(
        self,
        layer: int,
        slots: Tensor,
        lengths: Tensor,
        query: Tensor,
        window_key: Tensor,
        states: WindowStates,
        levels: Tensor,
        budgets: Tensor,
        planned: Tensor,
        step: Tensor,
        kept: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """A layer's plans; see HeadPlan.launch."""
        self._plan.launch(
            layer,
            self._rows,
            slots,
            lengths,
            query,
            window_key,
            states,
            self._weights,
            self._memory,
            self._scratch,
            levels,
            budgets,
            planned,
            step,
            kept,
        )


def pack_weights(planner: Planner, device: torch.device) -> PlanWeights:
    """A planner's weights as the kernels take them."""
    network = planner.weights.network
    assert network is not None, "a planner without a network plans once, on the host"
    linear = [layer for layer in network.layers if isinstance(layer, torch.nn.Linear)]
    hidden = -(-linear[0].out_features // TILE.value) * TILE.value
    inputs = (FEATURE_COLUMNS.value, hidden, hidden)
    outputs = (hidden, hidden, OUTPUT_COLUMNS.value)

    def padded(tensor: Tensor, *shape: int) -> Tensor:
        room = torch.zeros(shape)
        room[tuple(slice(size) for size in tensor.shape)] = tensor.detach().float().cpu()
        return room.to(device)

    biases = [layer.bias.detach() for layer in linear]
    biases[2] = biases[2] + network.output_mean
    standards = torch.stack((network.feature_mean, network.feature_scale))
    cost, priors = planner.weights.cost, planner.weights.priors
    costs = [(cost.scan(level), spread, 1 - spread) for level, spread in enumerate(cost.spread)]
    first, second, third = (
        padded(layer.weight.T, rows, columns)
        for layer, rows, columns in zip(linear, inputs, outputs, strict=True)
    )
    of_first, of_second, of_third = (
        padded(bias, columns) for bias, columns in zip(biases, outputs, strict=True)
    )
    return PlanWeights(
        padded(standards, 2, FEATURE_COLUMNS.value),
        (first, second, third),
        (of_first, of_second, of_third),
        padded(priors, planner.num_layers, planner.num_heads, PRIOR_WORDS.value),
        padded(planner.weights.head_weights, planner.num_layers, planner.num_heads),
        torch.tensor(costs, dtype=torch.float32, device=device),
        RADII[-1],
    )
