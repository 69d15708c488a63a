"""Recorded selections on a shape with random weights: plans for the host, marks for the device.

A step's plans say, for each group, the recorded level and how many of its blocks each head reads;
the marks, in place of the scores that the step has made, are 1 for those blocks and 0 for all
others, so that the step's own kernels choose exactly them. Regions are stretched: block b of n
stands for the recorded region's block b * recorded // n of the same level.

Launched into a step's graph, `MarkedScores` reads the number of the recorded step from a word on
the device, which whoever runs steps sets before each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import numpy.typing as npt
import torch
import triton
from torch import Tensor

from fluxion_core.errors import ConfigError
from fluxion_core.geometry import BLOCK_SIZES, BLOCK_TOKENS, ceil_div
from fluxion_core.kernels import _native
from fluxion_core.kernels.recorded_marks.triton import mark_scores
from fluxion_core.lab.benchmark.recorded_selections import RecordedSelections
from fluxion_core.models.config import ModelConfig
from fluxion_core.observe.device_usage import PolicyKind
from fluxion_core.planning.policy import PlanInputs, Policy, parse_policy

ROW_STEPS = 7
HEAD_STEPS = 3
"""A row, or a KV head, that takes the selections of another one begins so many steps later."""

_TILE = 1024


@dataclass(frozen=True, eq=False)
class GivenPolicy(Policy):
    """One row's plans of all layers of one step."""

    levels: npt.NDArray[np.int32]
    """[layers, kv_heads]: index into BLOCK_SIZES, READ_ALL or READ_NOTHING."""
    budgets: npt.NDArray[np.int32]
    """[layers, heads]: blocks of that level."""
    kind_of: PolicyKind
    """Of the policy that was recorded."""

    @property
    def kind(self) -> PolicyKind:
        """Name of the policy without its numbers."""
        return self.kind_of

    def plans(self, inputs: PlanInputs) -> _native.PlanSource:
        """Source of one row's plans in one step."""
        del inputs
        return _native.GivenPlans(self.levels, self.budgets)


class SelectionReplay:
    """Plans of a shape's rows by recorded selections.

    Group (layer, KV head) of row r follows the recorded group of the layer in proportion and of the
    KV head modulo the recorded ones; heads of the group, and texts, are taken in turn likewise.

    Args:
        recorded: selections of a real model.
        config: of the shape.
    """

    def __init__(self, recorded: RecordedSelections, config: ModelConfig) -> None:
        self.recorded, self.config = recorded, config
        texts, _, layers, kv_heads, group, _ = recorded.bits.shape
        self._kind = parse_policy(recorded.policy).kind
        self._layer = np.arange(config.num_layers)[:, None] * layers // config.num_layers
        heads = np.arange(config.num_kv_heads)[None, :]
        self._kv_head, self._turn = heads % kv_heads, heads // kv_heads
        self._member = np.arange(config.num_heads // config.num_kv_heads) % group
        self._num_texts = texts
        self._counts: dict[
            tuple[int, int, int, int], tuple[npt.NDArray[np.int8], npt.NDArray[np.int32]]
        ] = {}

    def policy(self, region: range, step: int, row: int) -> GivenPolicy:
        """Plans of one row for one step.

        Args:
            region: of the row, in tokens; multiples of 16, not empty.
            step: any number from 0 on.
            row: of the batch.
        """
        texts = (row + self._turn) % self._num_texts
        late = ROW_STEPS * (row // self._num_texts) + HEAD_STEPS * self._turn
        levels = np.zeros((self.config.num_layers, self.config.num_kv_heads), np.int32)
        budgets = np.zeros((*levels.shape, len(self._member)), np.int32)
        for turn in np.unique(self._turn):
            of_turn = np.flatnonzero(self._turn[0] == turn)
            text = int(texts[0, of_turn[0]])
            at = reflected(step + int(late[0, of_turn[0]]), self.recorded.num_steps)
            own_levels, own_budgets = self._plans_at(text, at, region)
            place = (self._layer, self._kv_head[:, of_turn])
            levels[:, of_turn] = own_levels[place]
            budgets[:, of_turn] = own_budgets[place][..., self._member]
        flat = budgets.reshape(self.config.num_layers, self.config.num_heads)
        return GivenPolicy(levels, flat, self._kind)

    def _plans_at(
        self, text: int, step: int, region: range
    ) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.int32]]:
        """Recorded levels [layers, kv_heads], and budgets [layers, kv_heads, group] here."""
        key = (text, step, region.start, region.stop)
        if key not in self._counts:
            units = self.recorded.units(text, step)
            levels = self.recorded.levels[text, step]
            weights = self._weights(text, step, region, units.shape[-1])
            # Of units by levels: of each level's blocks one unit is looked at, for all they are.
            counts = units.astype(np.float32) @ weights
            chosen = np.maximum(levels, 0)[..., None, None].astype(np.int64)
            budgets = np.take_along_axis(counts, chosen, axis=-1)[..., 0]
            budgets *= (levels >= 0)[..., None]
            self._counts[key] = (levels, budgets.astype(np.int32))
        return self._counts[key]

    def _weights(
        self, text: int, step: int, region: range, num_units: int
    ) -> npt.NDArray[np.float32]:
        """[units, levels]: blocks here that look at a recorded unit."""
        begin, end = (int(unit) for unit in self.recorded.regions[text, step])
        weights = np.zeros((num_units, len(BLOCK_SIZES)), np.float32)
        for level, size in enumerate(BLOCK_SIZES):
            here = ceil_div(region.stop, size) - region.start // size
            recorded = -(-end >> level) - (begin >> level)
            block = np.arange(here) * recorded // here + (begin >> level)
            looked_at = np.maximum(block << level, begin)
            weights[:, level] = np.bincount(looked_at, minlength=num_units)
        return weights


def reflected(step: int, num_steps: int) -> int:
    """Step of a recording that is gone through forwards and backwards."""
    at = step % max(1, 2 * (num_steps - 1))
    return min(at, 2 * (num_steps - 1) - at)


class MarkedScores:
    """Marks in place of a step's scores; called for each layer of a graph that is captured.

    Args:
        recordings: that steps may follow, of as many texts, steps and heads; none: scores stay.
        config: of the shape.
        max_rows: of a step.
        device: of the step.

    Raises:
        ConfigError: recordings that differ, or are too large for the kernel's numbers.
    """

    def __init__(
        self,
        recordings: Sequence[RecordedSelections],
        config: ModelConfig,
        max_rows: int,
        device: torch.device,
    ) -> None:
        shapes = {recorded.bits.shape for recorded in recordings} or {(1, 1, 1, 1, 1, 1)}
        if len(shapes) > 1:
            raise ConfigError(f"recorded selections of different shapes: {sorted(shapes)}")
        (self._shape,) = shapes
        if prod(self._shape) >= 2**31:
            raise ConfigError(f"recorded selections of {prod(self._shape)} B; below 2 GiB")
        self._config = config
        texts, steps, layers, kv_heads = self._shape[:4]

        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self._bits = zeros(*self._shape, dtype=torch.uint8)
        self._levels = zeros(texts, steps, layers, kv_heads, dtype=torch.int8)
        self._recorded_regions = zeros(texts, steps, 2, dtype=torch.int32)
        self._regions = zeros(max_rows, 2, dtype=torch.int32)
        self._step = zeros(1, dtype=torch.int32)
        self._is_followed = False
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._synchronize()

    def follow(self, replay: SelectionReplay | None, regions: Sequence[range]) -> None:
        """Say what the next steps' rows follow; `begin_step` comes next. Waits for the device.

        Args:
            replay: of one of the recordings; None: their scores stay.
            regions: of each row, in tokens.
        """
        self._is_followed = replay is not None
        if replay is not None:
            self._bits.copy_(torch.from_numpy(replay.recorded.bits))
            self._levels.copy_(torch.from_numpy(replay.recorded.levels))
            self._recorded_regions.copy_(torch.from_numpy(replay.recorded.regions))
        units = [[region.start // BLOCK_TOKENS, region.stop // BLOCK_TOKENS] for region in regions]
        self._regions.zero_()
        self._regions[: len(units)] = torch.tensor(units, dtype=torch.int32)
        self._synchronize()

    def begin_step(self, step: int) -> None:
        """Say which step comes next, as `SelectionReplay.policy` was told.

        Waits until the device knows it, and for nothing else: what runs beside steps goes on.
        """
        with torch.cuda.stream(self._stream):
            self._step.fill_(step if self._is_followed else -1)
        if self._stream is not None:
            self._stream.synchronize()

    def _synchronize(self) -> None:
        if self._stream is not None:
            torch.cuda.synchronize(self._stream.device)

    def __call__(self, layer: int, scores: Tensor, step: Tensor) -> None:
        """Overwrite a layer's scores.

        Args:
            layer: of the shape.
            scores: [rows, heads, stride] float32, of blocks from the first one in the region on.
            step: of the engine; recorded steps have numbers of their own.
        """
        del step
        rows, heads, stride = scores.shape
        texts, steps, layers, kv_heads, group, num_bytes = self._shape
        mark_scores[(rows, heads, triton.cdiv(stride, _TILE))](
            self._bits,
            self._levels,
            self._recorded_regions,
            self._regions,
            self._step,
            scores,
            layer * layers // self._config.num_layers,
            stride,
            TEXTS=texts,
            STEPS=steps,
            LAYERS=layers,
            KV_HEADS=kv_heads,
            GROUP=group,
            HEAD_BYTES=num_bytes,
            SHAPE_GROUP=heads // self._config.num_kv_heads,
            ROW_STEPS=ROW_STEPS,
            HEAD_STEPS=HEAD_STEPS,
            TILE=_TILE,
            num_warps=4,
        )
