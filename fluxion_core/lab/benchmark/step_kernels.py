"""Kernels of a decode step: how many there are, what each takes, and how long the GPU waits for it.

A step is a CUDA graph, whose kernels run one after the other: what lies between the end of one and
the begin of the next is what a launch costs. The profiler adds to both; a step without it is
shorter than what its kernels add up to here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from rich.table import Table
from torch.profiler import ProfilerActivity, profile


class KernelSpan(NamedTuple):
    """One kernel, or copy, on the GPU."""

    name: str
    begin: float
    """Microseconds of the profiler's clock."""
    end: float


class KernelTime(NamedTuple):
    """One kind of kernel, over some steps."""

    name: str
    per_step: float
    """How many a step has."""
    microseconds: float
    """Of one, in the mean."""
    gap_microseconds: float
    """In which nothing ran before one, in the mean; without the first one of a step."""

    @property
    def step_milliseconds(self) -> float:
        """Time of all that a step has, gaps included."""
        return self.per_step * (self.microseconds + self.gap_microseconds) / 1e3


def record_kernels(run: Callable[[], object], steps: int) -> list[list[KernelSpan]]:
    """Kernels of each of some steps in the order of their begins. Needs a CUDA device.

    Args:
        run: one step; whatever it launches has ended when it returns, or ends soon.
        steps: how many.
    """
    run()
    recorded = []
    for _ in range(steps):
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            run()
            torch.cuda.synchronize()
        spans = [
            KernelSpan(event.name, event.time_range.start, event.time_range.end)
            for event in profiler.events() or ()
            if event.device_type.name == "CUDA"
        ]
        recorded.append(sorted(spans, key=lambda span: span.begin))
    return recorded


def kernel_times(steps: Sequence[Sequence[KernelSpan]]) -> list[KernelTime]:
    """Means by kind, in the order in which a step has the first of each.

    Args:
        steps: spans of each step, by their begins.
    """
    durations: dict[str, list[float]] = {}
    gaps: dict[str, list[float]] = {}
    for spans in steps:
        last = None
        for span in spans:
            durations.setdefault(span.name, []).append(span.end - span.begin)
            gaps.setdefault(span.name, [])
            if last is not None:
                gaps[span.name].append(max(0.0, span.begin - last))
            last = span.end if last is None else max(last, span.end)
    return [
        KernelTime(
            name,
            len(of_name) / len(steps),
            sum(of_name) / len(of_name),
            sum(gaps[name]) / max(1, len(gaps[name])),
        )
        for name, of_name in durations.items()
    ]


def kernel_table(title: str, times: Sequence[KernelTime]) -> Table:
    """Times by kind, and their sum."""
    table = Table("kernel", "a step", "us each", "us before", "ms a step", title=title)
    for one in times:
        table.add_row(
            one.name[:72],
            f"{one.per_step:.1f}",
            f"{one.microseconds:.2f}",
            f"{one.gap_microseconds:.2f}",
            f"{one.step_milliseconds:.3f}",
        )
    count = sum(one.per_step for one in times)
    table.add_row(
        "all", f"{count:.1f}", "", "", f"{sum(one.step_milliseconds for one in times):.3f}"
    )
    return table
