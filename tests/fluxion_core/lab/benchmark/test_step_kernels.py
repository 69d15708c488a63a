"""Kernels of a step by kind: how many, how long, and what lies between them."""

from __future__ import annotations

import pytest
import torch

from fluxion_core.lab.benchmark.step_kernels import (
    KernelSpan,
    KernelTime,
    kernel_times,
    record_kernels,
)


def test_kinds_are_counted_by_step_and_gaps_belong_to_who_comes_after_them():
    first = [KernelSpan("a", 10.0, 12.0), KernelSpan("b", 13.0, 17.0), KernelSpan("a", 19.0, 23.0)]
    second = [KernelSpan("a", 100.0, 103.0), KernelSpan("b", 103.0, 105.0)]
    # The step's first kernel waits for nobody: of "a" one gap of 2 us counts, of "b" 1 and 0.
    assert kernel_times([first, second]) == [
        KernelTime("a", 1.5, 3.0, 2.0),
        KernelTime("b", 1.0, 3.0, 0.5),
    ]
    assert kernel_times([first, second])[0].step_milliseconds == pytest.approx(0.0075)


def test_what_runs_beside_another_has_no_gap_and_hides_none():
    spans = [KernelSpan("a", 0.0, 10.0), KernelSpan("b", 2.0, 4.0), KernelSpan("c", 11.0, 12.0)]
    gaps = {one.name: one.gap_microseconds for one in kernel_times([spans])}
    assert gaps == {"a": 0.0, "b": 0.0, "c": 1.0}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_kernels_of_a_step_are_recorded():
    tensor = torch.ones(1024, device="cuda")
    steps = record_kernels(lambda: tensor.mul_(2.0).add_(1.0), 2)
    assert [len(spans) for spans in steps] == [2, 2]
    assert all(span.end > span.begin for spans in steps for span in spans)
