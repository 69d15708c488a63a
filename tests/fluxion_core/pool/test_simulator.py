"""The simulator's rules, by hand and by law."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fluxion_core.pool.simulator import SimulatedTask, claim_order, makespan, simulate


def task(size: int, *phases: tuple[float, ...], other: float = 0.0) -> SimulatedTask:
    return SimulatedTask(size, phases, other)


def test_the_largest_goes_first_and_of_equals_the_first():
    assert claim_order([5, 9, 9, 1]) == [1, 2, 0, 3]


def test_three_equal_tasks_fill_two_threads():
    # By hand: without chunks, two threads need 2 x 2; in chunks the third task is shared: 3.
    whole = [task(1, (2.0,))] * 3
    chunked = [task(1, (1.0, 1.0))] * 3
    assert makespan(simulate(whole, 2)) == 4.0
    assert makespan(simulate(chunked, 2)) == 3.0


def test_a_phase_waits_for_all_chunks_of_the_one_before():
    spans = simulate([task(1, (1.0, 3.0), (), (1.0, 1.0))], 2)
    attend = [span for span in spans if span.phase == 2]
    assert [span.start for span in attend] == [3.0, 3.0]
    assert {span.worker for span in attend} == {0, 1}


def test_another_consumer_takes_whole_tasks_from_the_same_queue():
    tasks = [task(3, (4.0,), other=1.0), task(2, (4.0,), other=1.0), task(1, (4.0,), other=1.0)]
    spans = simulate(tasks, pool_threads=1, other_consumers=1)
    assert [(span.task, span.worker) for span in spans] == [(1, 1), (2, 1), (0, 0)]


TASKS = st.lists(
    st.builds(
        SimulatedTask,
        st.integers(0, 5),
        st.lists(st.lists(st.sampled_from([0.5, 1.0, 2.5]), max_size=4).map(tuple), max_size=3).map(
            tuple
        ),
        st.sampled_from([0.5, 3.0]),
    ),
    max_size=8,
)


@given(tasks=TASKS, threads=st.integers(1, 4), others=st.integers(0, 1))
@settings(max_examples=150, deadline=None)
def test_every_chunk_runs_once_and_no_schedule_is_longer_than_one_thread(tasks, threads, others):
    spans = simulate(tasks, threads, others)
    by_others = {span.task for span in spans if span.phase == -1}
    expected = {
        (index, phase, chunk)
        for index, task in enumerate(tasks)
        if index not in by_others
        for phase, chunks in enumerate(task.phases)
        for chunk in range(len(chunks))
    }
    done = [(span.task, span.phase, span.chunk) for span in spans if span.phase >= 0]
    assert len(done) == len(set(done))
    assert set(done) == expected
    if not others:
        total = sum(sum(map(sum, task.phases)) for task in tasks)
        assert makespan(spans) <= total
        assert makespan(simulate(tasks, 1)) == pytest.approx(total)
    # Nobody does two things at a time.
    for worker in range(threads + others):
        own = sorted((s for s in spans if s.worker == worker), key=lambda s: s.start)
        assert all(a.end <= b.start for a, b in itertools.pairwise(own))
