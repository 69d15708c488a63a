"""Workloads and figures of `bench serve`, against figures worked out by hand."""

from __future__ import annotations

import io

import numpy as np
import pytest
from rich.console import Console

from fluxion_core.errors import ConfigError
from fluxion_core.lab.benchmark.serve import (
    Length,
    Load,
    Objectives,
    Outcome,
    figures_of,
    plan_requests,
    print_table,
)

LENGTHS = (Length(200, 3.0), Length(2000, 1.0))


def test_the_same_seed_makes_the_same_workload():
    assert plan_requests(LENGTHS, Load(rate=2.0), 50, 7) == plan_requests(
        LENGTHS, Load(rate=2.0), 50, 7
    )
    assert plan_requests(LENGTHS, Load(rate=2.0), 50, 7) != plan_requests(
        LENGTHS, Load(rate=2.0), 50, 8
    )


def test_open_arrivals_have_the_rate_and_lengths_their_weights():
    planned = plan_requests(LENGTHS, Load(rate=5.0), 4000, 1)
    due = np.array([one.due_seconds for one in planned])
    gaps = np.diff(due)
    assert (gaps >= 0).all()
    # Exponential gaps: mean and deviation are 1 / rate.
    assert gaps.mean() == pytest.approx(0.2, rel=0.1)
    assert gaps.std() == pytest.approx(0.2, rel=0.1)
    short = sum(one.prompt_tokens == 200 for one in planned)
    assert short / 4000 == pytest.approx(0.75, abs=0.05)
    assert len({one.seed for one in planned}) == 4000
    assert {one.due_seconds for one in plan_requests(LENGTHS, Load(concurrency=3), 9, 1)} == {0.0}


@pytest.mark.parametrize("text", ["", "x", "0", "-5", "200=0", "200=nan", "200=inf", "2=3=4"])
def test_a_malformed_length_is_refused(text: str):
    with pytest.raises(ConfigError):
        Length.parse(text)


def test_figures_by_hand():
    outcomes = [
        Outcome(200, "OK", 2.0, 1.0, (0.1, 0.3), queue_seconds=0.5),
        Outcome(200, "OK", 4.0, 3.0, (0.2, 0.2)),
        Outcome(2000, "OK", 9.0, 8.0, ()),
        Outcome(2000, "RESOURCE_EXHAUSTED", 0.1),
        # Broken off after two tokens: they count as tokens, and nothing else.
        Outcome(200, "UNAVAILABLE", 1.0, 0.5, (0.1,)),
    ]
    figures = figures_of(Load(rate=1.5), outcomes, 10.0, Objectives(3.0, 0.2))
    assert figures.load == "1.5/s"
    assert figures.statuses == {"OK": 3, "RESOURCE_EXHAUSTED": 1, "UNAVAILABLE": 1}
    assert figures.tokens_per_second == pytest.approx(0.9)
    assert figures.requests_per_second == pytest.approx(0.3)
    # The third was too late with its first token.
    assert figures.goodput == pytest.approx(0.2)
    assert figures.percentiles["first_token"] == {"p50": 3.0, "p90": 8.0, "p99": 8.0}
    assert figures.percentiles["inter_token"] == {"p50": 0.2, "p90": 0.3, "p99": 0.3}
    assert figures.by_length["200"]["end_to_end"] == {"p50": 2.0, "p90": 4.0, "p99": 4.0}
    assert "inter_token" not in figures.by_length["2000"]
    text = io.StringIO()
    print_table(Console(file=text, width=200), [figures], Objectives(3.0, None))
    assert "3 OK, 1 RESOURCE_EXHAUSTED, 1 UNAVAILABLE" in text.getvalue()
    assert "3.00 / 8.00 / 8.00" in text.getvalue()


def test_without_objectives_finished_is_good():
    outcomes = [Outcome(1, "OK", 2.0, 1.0, (5.0,)), Outcome(1, "CANCELLED", 2.0)]
    assert figures_of(Load(concurrency=1), outcomes, 1.0, Objectives()).goodput == 1.0
    slow_tokens = figures_of(Load(concurrency=1), outcomes, 1.0, Objectives(None, 4.9))
    assert slow_tokens.goodput == 0.0
