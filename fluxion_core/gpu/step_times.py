"""Where a step's time went on the GPU, from the clock stamps of its kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor


class LaneSpan(NamedTuple):
    """One task that the GPU lane did. Times of the GPU's clock, ns."""

    layer: int
    task: int
    """sequence * kv_heads + KV head."""
    digest_bytes: int
    kv_bytes: int
    begin_ns: int
    end_ns: int


@dataclass(frozen=True)
class StepTimes:
    """One step. Seconds, of the GPU's clock."""

    total: float
    """From the first kernel to the last."""
    waited: float
    """Of that, the dense part waited for the host's answers."""
    waited_idle: float
    """Of that, no task of the GPU lane ran: the GPU did nothing."""
    lane_tasks: int
    """GQA groups attended to by the GPU."""
    lane_digest_bytes: int
    """Scanned by them; over PCIe, unless there are copies on the device."""
    lane_kv_bytes: int
    """Read by them over PCIe."""

    @property
    def busy(self) -> float:
        """Kernels ran that did not just wait."""
        return self.total - self.waited_idle


def step_times(
    total_seconds: float, stamps: Tensor, skip: Tensor, spans: Sequence[LaneSpan]
) -> StepTimes:
    """Sum a step up.

    Args:
        total_seconds: of the step's graph.
        stamps: [layers, 3] int64, ns: published, began to wait, was answered.
        skip: [layers] int32: not 0 where the GPU did not wait.
        spans: of the lane, any order.
    """
    waits = stamps.numpy()[skip.numpy() == 0, 1:]
    waited = int((waits[:, 1] - waits[:, 0]).sum())
    of_lane = np.array(spans, dtype=np.int64).reshape(-1, len(LaneSpan._fields))
    _, _, digest_bytes, kv_bytes, begins, ends = of_lane.T
    covered = _covered(waits, begins, ends)
    return StepTimes(
        total_seconds,
        waited / 1e9,
        (waited - covered) / 1e9,
        len(of_lane),
        int(digest_bytes.sum()),
        int(kv_bytes.sum()),
    )


_Ints = npt.NDArray[np.int64]


def _covered(waits: _Ints, begins: _Ints, ends: _Ints) -> int:
    """Of the waits [waits, 2], what the union of the intervals covers."""
    if not len(begins):
        return 0
    order = np.argsort(begins)
    begins, reached = begins[order], np.maximum.accumulate(ends[order])
    # An interval that begins after all before it have ended begins a new piece of the union.
    first = np.flatnonzero(np.concatenate(([True], begins[1:] > reached[:-1])))
    starts = begins[first]
    stops = reached[np.concatenate((first[1:], [len(begins)])) - 1]
    before = np.concatenate(([0], np.cumsum(stops - starts)))
    piece = np.searchsorted(starts, waits, side="right")
    last = np.maximum(piece - 1, 0)
    inside = np.minimum(waits, stops[last]) - starts[last]
    covered_until = np.where(piece > 0, before[last] + inside, 0)
    return int((covered_until[:, 1] - covered_until[:, 0]).sum())
