"""Times of a step on the GPU, from the clock stamps of its kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

LANE_TASKS = 6
"""Tasks of the GPU lane at a time. Few march in step, and nobody reads while all choose: the GPU
alone reads 42, 45, 47 and 48 GB/s with 2, 3, 4 and 6."""


class LaneSpan(NamedTuple):
    """One task that the GPU lane did. Times of the GPU's clock, ns."""

    layer: int
    task: int
    """sequence * kv_heads + KV head."""
    digest_bytes: int
    kv_bytes: int
    begin_ns: int
    end_ns: int


NO_SPANS = np.empty((0, len(LaneSpan._fields)), np.int64)
"""Of a step without the lane, as rows of numbers."""


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


class LaneWork:
    """The lane's part of a step, summed up as soon as the lane is done: the dense part is not yet.

    Args:
        spans: [tasks, 6], any order; columns as in LaneSpan.
    """

    def __init__(self, spans: npt.NDArray[np.int64]) -> None:
        self.spans = spans
        """As given."""
        _, _, digest_bytes, kv_bytes, begins, ends = spans.T
        self.digest_bytes, self.kv_bytes = int(digest_bytes.sum()), int(kv_bytes.sum())
        """Read by the tasks."""
        if not len(spans):
            return
        order = np.argsort(begins)
        begins, reached = begins[order], np.maximum.accumulate(ends[order])
        # An interval that begins after all before it have ended begins a new piece of the union.
        first = np.flatnonzero(np.concatenate(([True], begins[1:] > reached[:-1])))
        self._starts = begins[first]
        self._stops = reached[np.concatenate((first[1:], [len(begins)])) - 1]
        self._before = np.concatenate(([0], np.cumsum(self._stops - self._starts)))

    def covered(self, waits: npt.NDArray[np.int64]) -> int:
        """Nanoseconds of the waits [waits, 2] in which a task ran."""
        if not len(self.spans):
            return 0
        piece = np.searchsorted(self._starts, waits, side="right")
        last = np.maximum(piece - 1, 0)
        inside = np.minimum(waits, self._stops[last]) - self._starts[last]
        covered_until = np.where(piece > 0, self._before[last] + inside, 0)
        return int((covered_until[:, 1] - covered_until[:, 0]).sum())


def step_times(total_seconds: float, stamps: Tensor, skip: Tensor, lane: LaneWork) -> StepTimes:
    """Sum a step up.

    Args:
        total_seconds: of the step's graph.
        stamps: [layers, 3] int64, ns: published, began to wait, was answered.
        skip: [layers] int32: not 0 where the GPU did not wait.
        lane: what it did.
    """
    waits = stamps.numpy()[skip.numpy() == 0, 1:]
    waited = int((waits[:, 1] - waits[:, 0]).sum())
    return StepTimes(
        total_seconds,
        waited / 1e9,
        (waited - lane.covered(waits)) / 1e9,
        len(lane.spans),
        lane.digest_bytes,
        lane.kv_bytes,
    )
