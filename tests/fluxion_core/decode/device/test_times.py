"""Waits that the lane's tasks cover: by hand, and against a count of every nanosecond."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fluxion_core.decode.device.times import LaneSpan, LaneWork, step_times


def _work(*spans: LaneSpan) -> LaneWork:
    return LaneWork(np.array(spans, np.int64).reshape(-1, len(LaneSpan._fields)))


def test_by_hand() -> None:
    stamps = torch.tensor([[0, 10, 20], [30, 40, 60], [70, 80, 90]])
    skip = torch.tensor([0, 0, 1], dtype=torch.int32)
    spans = _work(
        LaneSpan(1, 0, 5, 7, 35, 45),
        LaneSpan(1, 1, 5, 9, 42, 50),
        LaneSpan(2, 0, 1, 1, 82, 88),
    )
    times = step_times(1e-6, stamps, skip, spans)
    # Waited 10 and 20 ns, the third layer not; the union of the tasks covers 40 to 50.
    assert times.waited == pytest.approx(30e-9)
    assert times.waited_idle == pytest.approx(20e-9)
    assert times.busy == pytest.approx(980e-9)
    assert (times.lane_tasks, times.lane_digest_bytes, times.lane_kv_bytes) == (3, 11, 17)


def test_without_a_lane_every_wait_is_idle() -> None:
    times = step_times(1.0, torch.tensor([[0, 1, 4]]), torch.zeros(1, dtype=torch.int32), _work())
    assert times.waited_idle == times.waited == pytest.approx(3e-9)


_INTERVAL = st.tuples(st.integers(0, 60), st.integers(0, 20)).map(lambda t: (t[0], t[0] + t[1]))


@given(st.lists(st.integers(0, 12), min_size=2, max_size=8), st.lists(_INTERVAL, max_size=8))
def test_every_nanosecond(gaps: list[int], tasks: list[tuple[int, int]]) -> None:
    edges = torch.tensor(gaps[: len(gaps) // 2 * 2]).cumsum(0).view(-1, 2)
    stamps = torch.cat((edges[:, :1], edges), 1)
    spans = _work(*(LaneSpan(0, 0, 0, 0, begin, end) for begin, end in tasks))
    times = step_times(1.0, stamps, torch.zeros(len(stamps), dtype=torch.int32), spans)
    idle = sum(
        not any(begin <= moment < end for begin, end in tasks)
        for first, last in edges.tolist()
        for moment in range(first, last)
    )
    assert times.waited_idle == pytest.approx(idle * 1e-9)
