"""Where a step's time went on the GPU, from the clock stamps of its kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LaneSpan:
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
    """Read by them over PCIe."""
    lane_kv_bytes: int
    """Likewise."""

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
    waits = [
        (begin, end)
        for (_, begin, end), skipped in zip(stamps.tolist(), skip.tolist(), strict=True)
        if not skipped
    ]
    busy = _union(sorted((span.begin_ns, span.end_ns) for span in spans))
    covered = sum(
        max(0, min(end, lane_end) - max(begin, lane_begin))
        for begin, end in waits
        for lane_begin, lane_end in busy
        if lane_begin < end and lane_end > begin
    )
    waited = sum(end - begin for begin, end in waits)
    return StepTimes(
        total_seconds,
        waited / 1e9,
        (waited - covered) / 1e9,
        len(spans),
        sum(span.digest_bytes for span in spans),
        sum(span.kv_bytes for span in spans),
    )


def _union(intervals: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Of sorted intervals, the disjoint ones that cover the same."""
    united: list[tuple[int, int]] = []
    for begin, end in intervals:
        if united and begin <= united[-1][1]:
            united[-1] = (united[-1][0], max(united[-1][1], end))
        else:
            united.append((begin, end))
    return united
