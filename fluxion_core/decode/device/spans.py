"""Spans of a step with a GPU: CPU workers, the GPU's dense part and tasks, PCIe.

The GPU stamps its kernels with a clock of its own. The CPU's spans say how far it is from the
host's: a layer's tasks begin after the GPU has published the layer, and end before the GPU sees the
answer. What is left between the two, some microseconds, is halved.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import numpy.typing as npt

from fluxion_core.decode.device.times import LANE_TASKS, LaneSpan
from fluxion_core.observe.device_usage import PcieDirection
from fluxion_core.observe.spans import Span
from fluxion_core.observe.trace import TakenSpans
from fluxion_core.pool.cpu_pool import CpuPool
from fluxion_core.pool.spans import PoolSpans, pool_spans

DENSE_TRACK = "gpu"


@dataclass(frozen=True)
class StepRecord:
    """Record of a step. Times of the GPU's clock, ns."""

    stamps: npt.NDArray[np.int64]
    """[layers, 3]: published, began to wait, was answered."""
    tasks: npt.NDArray[np.int64]
    """[tasks, 6] of the GPU lane, any order; columns as in LaneSpan."""
    digests_on_device: bool
    """Whether tasks scan copies of digests there: then only KV comes over PCIe."""
    published_bytes: int
    """Queries, keys and values that a layer sends to the host."""
    answered_bytes: npt.NDArray[np.int64]
    """[layers]: attention states that came back; 0 where the GPU waited for none."""


class RecordedStep(Protocol):
    """A DeviceStep, as far as it is needed here."""

    def record(self) -> StepRecord:
        """Record of the last step."""
        ...


class DeviceSpans:
    """Source of a trace: steps of a GPU and of the CPU pool that works with it.

    Args:
        step: runs them.
        pool: attends beside the GPU.
    """

    def __init__(self, step: RecordedStep, pool: CpuPool) -> None:
        self._step, self._pool = step, pool
        self.tracks = [
            *PoolSpans(pool).tracks,
            DENSE_TRACK,
            *map(_task_track, range(LANE_TASKS)),
            _pcie_track("host_to_device"),
            _pcie_track("device_to_host"),
        ]

    def record(self, *, on: bool) -> None:
        """Keep spans from now on, or no longer."""
        self._pool.record(on=on)

    def take(self, start_ns: int, end_ns: int) -> TakenSpans:
        """Take the spans kept since the last call: of the step between these times."""
        rows = self._pool.take_rows()
        if end_ns == 0:
            return TakenSpans(0, tuple)
        record = self._step.record()
        count = len(rows) + 4 * len(record.stamps) + 2 * len(record.tasks)
        return TakenSpans(count, partial(_spans, record, rows, start_ns, end_ns))


def device_spans(record: StepRecord, host_minus_gpu_ns: int) -> list[Span]:
    """A step's spans on the tracks of the GPU and of PCIe.

    The dense part of a layer begins where the one before it was answered; of the first layer, and
    of the logits, nothing is stamped.
    """

    def span(track: str, name: str, begin: int, end: int, **args: int) -> Span:
        return Span(track, name, begin + host_minus_gpu_ns, end + host_minus_gpu_ns, args)

    spans = []
    to_device, to_host = _pcie_track("host_to_device"), _pcie_track("device_to_host")
    begin = int(record.stamps[0, 0])
    for layer, (published, waits, answered) in enumerate(record.stamps.tolist()):
        moved = record.published_bytes
        spans.append(span(to_host, "publish", published, published, layer=layer, bytes=moved))
        spans.append(span(DENSE_TRACK, "dense", begin, waits, layer=layer))
        if moved := int(record.answered_bytes[layer]):
            spans.append(span(DENSE_TRACK, "wait for host", waits, answered, layer=layer))
            spans.append(span(to_device, "states", answered, answered, layer=layer, bytes=moved))
        begin = answered
    tasks = sorted(map(LaneSpan._make, record.tasks.tolist()), key=lambda task: task.begin_ns)
    free_from: list[int] = []
    for task in tasks:
        place = next((i for i, end in enumerate(free_from) if end <= task.begin_ns), len(free_from))
        free_from[place : place + 1] = [task.end_ns]
        spans.append(
            span(
                _task_track(place),
                "task",
                task.begin_ns,
                task.end_ns,
                layer=task.layer,
                task=task.task,
                bytes=task.digest_bytes + task.kv_bytes,
            )
        )
    for begin, end, moved in _reads(tasks, digests=not record.digests_on_device):
        spans.append(span(to_device, "read in place", begin, end, bytes=moved))
    return spans


def clock_difference(
    record: StepRecord, rows: npt.NDArray[np.void], start_ns: int, end_ns: int
) -> int:
    """Host's clock minus the GPU's, ns; see the head of this file.

    Args:
        record: of a step.
        rows: of the CPU pool, see CpuPool.take_rows.
        start_ns: of the step on the host's clock: all that is known where the CPU did nothing.
        end_ns: likewise.
    """
    least = end_ns - int(record.stamps[-1, 2])
    most = start_ns - int(record.stamps[0, 0])
    layers = np.unique(rows["layer"])
    if len(layers):
        of_layer = [rows[rows["layer"] == layer] for layer in layers]
        begins = np.array([own["start_ns"].min() for own in of_layer])
        ends = np.array([own["end_ns"].max() for own in of_layer])
        most = int((begins - record.stamps[layers, 0]).min())
        least = int((ends - record.stamps[layers, 2]).max())
    return (least + most) // 2


def _spans(
    record: StepRecord, rows: npt.NDArray[np.void], start_ns: int, end_ns: int
) -> Iterator[Span]:
    difference = clock_difference(record, rows, start_ns, end_ns)
    yield from pool_spans(rows)
    yield from device_spans(record, difference)


def _reads(tasks: Sequence[LaneSpan], *, digests: bool) -> list[tuple[int, int, int]]:
    """When tasks, sorted by their beginning, read host memory: begin, end, bytes."""
    reads: list[tuple[int, int, int]] = []
    for task in tasks:
        begin, end = task.begin_ns, task.end_ns
        moved = task.kv_bytes + (task.digest_bytes if digests else 0)
        if reads and begin <= reads[-1][1]:
            before = reads.pop()
            begin, end, moved = before[0], max(before[1], end), before[2] + moved
        reads.append((begin, end, moved))
    return reads


def _task_track(place: int) -> str:
    return f"{DENSE_TRACK} tasks {place}"


def _pcie_track(direction: PcieDirection) -> str:
    return f"pcie {direction}"
