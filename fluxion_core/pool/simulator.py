"""A simulator of the task pool: its rules in Python, and the oracle of its tests.

Rules. A task is claimed whole, the largest first, by whoever is free: a thread of the pool, or
another consumer. A claimed task is done phase by phase; the chunks of a phase are taken in order by
any of the pool's threads. A thread stays with its task while that has chunks to take, then claims
the next task, and when none is left takes chunks of others' tasks, the largest task first. A phase
opens when the last chunk of the one before is done. Another consumer does its tasks alone.

Time is simulated: a chunk takes as long as it says, everything else takes none. Where several act
at the same moment, the lower number goes first. So the same input always gives the same schedule.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class SimulatedTask:
    """A task as the simulator sees it."""

    priority_bytes: int
    """What decides who goes first."""
    phases: tuple[tuple[float, ...], ...]
    """Seconds of each chunk, per phase; a phase without chunks is passed over."""
    other_seconds: float = 0.0
    """How long another consumer needs for the whole task."""


@dataclass(frozen=True)
class SimulatedSpan:
    """One chunk (or, of another consumer, one task: phase and chunk are -1)."""

    worker: int
    """0 to pool_threads - 1, then other consumers."""
    task: int
    phase: int
    chunk: int
    start: float
    end: float


@dataclass
class _RunningTask:
    """A task that the pool has claimed."""

    phase: int = -1
    next_chunk: int = 0
    unfinished: int = 0


@dataclass
class _State:
    tasks: Sequence[SimulatedTask]
    order: list[int]
    running: dict[int, _RunningTask] = field(default_factory=dict)
    current: dict[int, int] = field(default_factory=dict)
    """The task that each thread is at."""
    spans: list[SimulatedSpan] = field(default_factory=list)


def claim_order(priorities: Sequence[int]) -> list[int]:
    """Order in which tasks of these bytes are claimed: largest first, of equals the first."""
    return sorted(range(len(priorities)), key=lambda task: -priorities[task])


def simulate(
    tasks: Sequence[SimulatedTask], pool_threads: int, other_consumers: int = 0
) -> list[SimulatedSpan]:
    """The schedule of one round, in order of the spans' ends.

    Args:
        tasks: of the round.
        pool_threads: of the pool, the waiting thread included; at least 1 unless there are others.
        other_consumers: that claim whole tasks from the same queue.
    """
    state = _State(tasks, claim_order([task.priority_bytes for task in tasks]))
    idle = list(range(pool_threads + other_consumers))
    busy: list[tuple[float, int, SimulatedSpan]] = []
    now = 0.0
    while True:
        for worker in sorted(idle):
            span = _next_span(state, worker, pool_threads, now)
            if span is not None:
                idle.remove(worker)
                heapq.heappush(busy, (span.end, worker, span))
        if not busy:
            return state.spans
        now = busy[0][0]
        while busy and busy[0][0] == now:
            _, worker, span = heapq.heappop(busy)
            state.spans.append(span)
            idle.append(worker)
            if span.phase >= 0:
                _finish_chunk(state, span.task)


def makespan(spans: Sequence[SimulatedSpan]) -> float:
    """Time at which the last span ends; 0 without any."""
    return max((span.end for span in spans), default=0.0)


def _next_span(state: _State, worker: int, pool_threads: int, now: float) -> SimulatedSpan | None:
    if worker in state.current:
        span = _take_chunk(state, worker, state.current[worker], now)
        if span is not None:
            return span
    while state.order:
        task = state.order.pop(0)
        if worker >= pool_threads:
            return SimulatedSpan(worker, task, -1, -1, now, now + state.tasks[task].other_seconds)
        state.running[task] = _RunningTask()
        _open_next_phase(state, task)
        if (span := _take_chunk(state, worker, task, now)) is not None:
            return span
    if worker >= pool_threads:
        return None
    for task in claim_order([task.priority_bytes for task in state.tasks]):
        if task in state.running and (span := _take_chunk(state, worker, task, now)) is not None:
            return span
    return None


def _take_chunk(state: _State, worker: int, task: int, now: float) -> SimulatedSpan | None:
    running, phases = state.running[task], state.tasks[task].phases
    if running.phase >= len(phases) or running.next_chunk >= len(phases[running.phase]):
        return None
    chunk, running.next_chunk = running.next_chunk, running.next_chunk + 1
    state.current[worker] = task
    seconds = phases[running.phase][chunk]
    return SimulatedSpan(worker, task, running.phase, chunk, now, now + seconds)


def _finish_chunk(state: _State, task: int) -> None:
    running = state.running[task]
    running.unfinished -= 1
    if not running.unfinished:
        _open_next_phase(state, task)


def _open_next_phase(state: _State, task: int) -> None:
    running, phases = state.running[task], state.tasks[task].phases
    running.phase += 1
    while running.phase < len(phases) and not phases[running.phase]:
        running.phase += 1
    running.next_chunk = 0
    running.unfinished = len(phases[running.phase]) if running.phase < len(phases) else 0
