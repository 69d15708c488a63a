"""Simulated caches: who stays and who leaves, worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from fluxion_core.errors import ConfigError
from fluxion_core.lab.benchmark.recorded_selections import RecordedSelections
from fluxion_core.lab.benchmark.selection_cache import (
    POLICIES,
    SimulatedCache,
    selected_units,
    simulate,
)


def hits_of(cache: SimulatedCache, *steps: tuple[int, ...]) -> list[int]:
    return [cache.select(np.array(step, np.int64)) for step in steps]


@pytest.mark.parametrize("policy", POLICIES)
def test_what_fits_is_missed_once(policy: str):
    cache = SimulatedCache(policy, 10, 4, 0)
    assert hits_of(cache, (1, 2), (1, 2), (2, 3, 4), (1, 2, 3, 4)) == [0, 2, 1, 4]
    assert cache.num_filled == 4
    assert cache.held.tolist() == [1, 2, 3, 4]


def test_lru_gives_up_what_was_selected_longest_ago():
    cache = SimulatedCache("lru", 10, 2, 0)
    assert hits_of(cache, (1,), (2,), (1,), (3,), (1, 3)) == [0, 0, 1, 0, 2]


def test_only_lru_gives_up_what_the_step_has_just_read():
    steps = ((1, 2), (1, 2, 3, 4), (1, 2))
    assert hits_of(SimulatedCache("lru", 10, 2, 0), *steps) == [0, 2, 0]
    assert hits_of(SimulatedCache("lru-old", 10, 2, 0), *steps) == [0, 2, 2]


def test_lfu_keeps_what_is_selected_often():
    steps = ((1,), (1,), (1,), (2,), (3,), (1,))
    assert hits_of(SimulatedCache("lfu", 10, 2, 0), *steps) == [0, 1, 1, 0, 0, 1]
    assert hits_of(SimulatedCache("lru", 10, 2, 0), *steps) == [0, 1, 1, 0, 0, 0]


def test_counts_of_all_units_keep_out_what_is_selected_once():
    cache = SimulatedCache("lfu-all", 10, 1, 0)
    assert hits_of(cache, (1,), (1,), (2,), (1,)) == [0, 1, 0, 1]
    assert cache.num_filled == 1


def test_the_hand_passes_by_what_was_selected_since_its_last_turn():
    cache = SimulatedCache("clock", 10, 3, 0)
    # The first turn takes all marks and lets 1 go; 2 is marked again, so that 3 is next.
    assert hits_of(cache, (1, 2, 3), (4,), (2,), (5,), (2, 4, 5)) == [0, 0, 1, 0, 3]


def test_nothing_is_asked_for_while_a_fill_runs():
    cache = SimulatedCache("lru", 10, 4, 2)
    assert hits_of(cache, (1,), (1, 2), (1, 2), (1, 2), (1, 2), (1, 2), (1, 2)) == [
        *(0, 0, 0),  # the fill of 1 runs for two steps after it was asked for
        *(1, 1, 1),  # 2 is asked for once it has ended, and takes as long
        2,
    ]


def test_a_fill_brings_the_first_units_up_to_its_limit():
    cache = SimulatedCache("lru", 10, 4, 0, fill_units=2)
    assert hits_of(cache, (1, 2, 3), (1, 2, 3), (1, 2, 3)) == [0, 2, 3]


def test_a_cache_of_another_name_is_refused():
    with pytest.raises(ConfigError, match="mru"):
        SimulatedCache("mru", 10, 2, 0)


def test_a_text_is_counted_from_the_warm_up_on_and_around_its_change():
    # One group of two heads; units 8 to 15 are the region. Topics: unit 8, then unit 9.
    steps, change = 40, 20
    bits = np.zeros((1, steps, 1, 1, 2, 2), np.uint8)
    bits[0, :change, 0, 0, 0, 1] = 1
    bits[0, change:, 0, 0, 1, 1] = 2
    regions = np.broadcast_to(np.array([8, 16], np.int32), (1, steps, 2))
    levels = np.zeros((1, steps, 1, 1), np.int8)
    recorded = RecordedSelections("exact", ("a",), (change,), {}, bits, levels, regions)
    units = selected_units(recorded, 0)
    assert [one.tolist() for one in units] == [[8]] * change + [[9]] * (steps - change)
    figure = simulate(
        recorded, 0, units, cache="lru", fill_steps=0, fill_permille=0, capacity=0.125, warm_up=4
    )
    assert figure.selected == 1 / 8
    assert figure.hits == pytest.approx(35 / 36)
    assert figure.hits_before_change == 1
    assert figure.hits_at_change == pytest.approx(15 / 16)
    assert figure.fills == pytest.approx(1 / 36)
