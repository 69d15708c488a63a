"""Numbers that Python, C++ and Triton share."""

from __future__ import annotations

from pathlib import Path

import pytest

from fluxion_core.kernels import _native, lane_task
from fluxion_core.planning.constants import BUDGETS, FEATURE_NAMES, NUM_KV_STATISTICS, NUM_PRIORS
from fluxion_core.planning.generate import CONSTEXPRS, HEADER, constexprs, header


@pytest.mark.parametrize(("path", "text"), [(HEADER, header()), (CONSTEXPRS, constexprs())])
def test_what_is_checked_in_is_what_the_constants_say(path: Path, text: str):
    assert path.read_text() == text, "run: python -m fluxion_core.planning.generate"


def test_the_native_module_was_built_from_the_same_order_of_features():
    assert tuple(_native.feature_names()) == FEATURE_NAMES


def test_budgets_double_as_the_gpu_makes_them_of_their_indices():
    assert BUDGETS[0] == 0
    assert list(BUDGETS[1:]) == [2.0 ** (i - len(BUDGETS)) for i in range(1, len(BUDGETS))]


def test_features_that_are_copied_in_a_loop_lie_side_by_side():
    def from_first(name: str, count: int) -> tuple[str, ...]:
        first = FEATURE_NAMES.index(name)
        return FEATURE_NAMES[first : first + count]

    assert all(name.startswith("prior_") for name in from_first("prior_nothing", NUM_PRIORS))
    assert from_first("key_scale", NUM_KV_STATISTICS)[2] == "value_scale"
    assert from_first("sink_mass", 3) == ("sink_mass", "recent_mass", "window_peak")
    assert from_first("query_cosine", 2) == ("query_cosine", "query_change")
    of_budget = ("estimate_nothing", "estimate_nothing_worst")
    assert from_first(of_budget[0], 4) == (*of_budget, "estimate_small", "estimate_small_worst")
    assert from_first("estimate_mass", 2) == ("estimate_mass", "estimate_mass_worst")


def test_every_word_of_a_lane_task_that_the_host_writes_has_a_place_of_its_own():
    places = [getattr(lane_task, name).value for name in lane_task.HOST_WORDS]
    assert places == sorted(set(places))
