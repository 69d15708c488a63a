"""How many threads a pool gets."""

from __future__ import annotations

import pytest

from fluxion_core.pool import cpu_pool as scheduler
from fluxion_core.pool import thread_choice
from fluxion_core.pool.cpu_pool import CpuPool, default_threads
from fluxion_core.pool.thread_choice import make_pool, most_as_fast


@pytest.mark.parametrize(("cpus", "threads"), [(1, 1), (3, 3), (4, 3), (8, 7), (16, 14), (32, 28)])
def test_an_eighth_of_many_cpus_is_left_to_others(
    monkeypatch: pytest.MonkeyPatch, cpus: int, threads: int
):
    monkeypatch.setattr(scheduler, "num_usable_cpus", lambda: cpus)
    assert default_threads() == threads


def test_fewer_threads_are_taken_only_where_they_are_clearly_faster():
    # By hand: the best is 0.50; a tenth more is 0.55.
    assert most_as_fast({14: 0.54, 11: 0.50, 7: 0.80}) == 14
    # A machine that takes CPUs away now and then: all of them are slower than some.
    assert most_as_fast({28: 1.9, 21: 0.50, 14: 0.53}) == 21


def test_what_is_asked_for_is_not_measured():
    pool, choice = make_pool(2)
    assert (pool.num_threads, choice.num_threads, choice.measured) == (2, 2, "nothing")


def test_a_choice_is_among_what_was_timed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(thread_choice, "_MEASURED_FROM_CPUS", 1)
    monkeypatch.setattr(thread_choice, "_BUFFER_BYTES", 16 << 20)
    monkeypatch.setattr(thread_choice, "_ROUND_BYTES", 8 << 20)
    pool, choice = make_pool(None)
    assert pool.num_threads == choice.num_threads in choice.gigabytes_per_second
    assert max(choice.gigabytes_per_second) == default_threads()
    assert all(rate > 0 for rate in choice.gigabytes_per_second.values())


def test_a_pool_never_watched_finds_no_stalls():
    pool = CpuPool(2, watches=False)
    assert (pool.stalls, pool.num_left_out) == (0, 0)
