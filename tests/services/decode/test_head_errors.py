"""A level misses its aim only beyond chance, and an operator is told so, not at every sample."""

from __future__ import annotations

import logging
import math
import random

import pytest

from fluxion_core.decode.step import HeadErrorSample
from fluxion_core.planning.policy import (
    ExactPolicy,
    FixedPolicy,
    MarginalPolicy,
    Policy,
    ThresholdPolicy,
)
from services.decode.head_errors import (
    FACTOR,
    JUDGED_SAMPLES,
    LEAST_SAMPLES,
    WARN_SECONDS,
    WINDOW_SAMPLES,
    HeadErrors,
    LevelErrors,
    misses_aim,
)

LEVELS: dict[str, Policy] = {
    "EXACT": ExactPolicy(),
    "BALANCED": MarginalPolicy(0.1),
    "FAST": MarginalPolicy(0.4),
}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_figures_are_root_mean_squares_by_level():
    errors = HeadErrors(LEVELS)
    errors.add(LEVELS["FAST"], [HeadErrorSample(0.04, 0.01, 100), HeadErrorSample(0.0, 0.03, 50)])
    errors.add(FixedPolicy(16, 0.05), [HeadErrorSample(0.25, None, 10)])
    errors.add(ThresholdPolicy(0.3), [HeadErrorSample(0.09, 0.16, 7)])
    # By hand: the roots of 0.04 / 2 and of 0.04 / 2.
    half = math.sqrt(0.02)
    assert errors.figures() == {
        "FAST": LevelErrors(pytest.approx(half), pytest.approx(half), False, 2, 150),
        "fixed": LevelErrors(0.5, None, False, 1, 10),
        "threshold": LevelErrors(pytest.approx(0.3), pytest.approx(0.4), False, 1, 7),
    }


def test_what_left_the_window_counts_no_more():
    errors = HeadErrors(LEVELS)
    errors.add(LEVELS["FAST"], [HeadErrorSample(1.0, 1.0, 1)] * 10)
    errors.add(LEVELS["FAST"], [HeadErrorSample(0.25, 0.25, 1)] * WINDOW_SAMPLES)
    assert errors.figures()["FAST"] == LevelErrors(0.5, 0.5, False, WINDOW_SAMPLES + 10, 1010)


def tailed(generator: random.Random, mean: float) -> float:
    """Squares with a long tail: log-normal, a twentieth of them half of the sum."""
    sigma = 1.6
    return mean * math.exp(generator.gauss(-sigma * sigma / 2, sigma))


@pytest.mark.parametrize(("ratio", "most", "least"), [(1.0, 0, 0), (FACTOR, 1, 0), (6.0, 200, 190)])
def test_a_level_misses_its_aim_beyond_chance(ratio: float, most: int, least: int):
    generator = random.Random(3)
    missed = 0
    for _ in range(200):
        true = [tailed(generator, 0.01 * ratio) for _ in range(WINDOW_SAMPLES)]
        missed += misses_aim(true, [0.01] * WINDOW_SAMPLES)
    assert least <= missed <= most


def test_few_samples_say_nothing():
    generator = random.Random(3)
    true = [1.0 + generator.random() for _ in range(LEAST_SAMPLES)]
    assert misses_aim(true, [0.01] * LEAST_SAMPLES)
    assert not misses_aim(true[1:], [0.01] * (LEAST_SAMPLES - 1))


def test_the_log_says_it_once_in_a_while(caplog: pytest.LogCaptureFixture):
    clock = Clock()
    errors = HeadErrors(LEVELS, clock=clock)
    generator = random.Random(3)
    with caplog.at_level(logging.WARNING):
        for _ in range(3 * LEAST_SAMPLES):
            sample = HeadErrorSample(1.0 + generator.random(), 0.01, 1)
            errors.add(LEVELS["FAST"], [sample])
            errors.add(LEVELS["BALANCED"], [HeadErrorSample(0.01, 0.01, 1)])
        assert errors.figures()["FAST"].misses_aim
        assert not errors.figures()["BALANCED"].misses_aim
        assert len(caplog.messages) == 1
        assert "level=FAST" in caplog.messages[0]
        assert "predicted=0.100" in caplog.messages[0]
        clock.now = WARN_SECONDS
        errors.add(LEVELS["FAST"], [HeadErrorSample(1.0, 0.01, 1)] * JUDGED_SAMPLES)
        assert len(caplog.messages) == 2


def test_what_predicts_nothing_has_no_aim():
    errors = HeadErrors(LEVELS)
    errors.add(FixedPolicy(16, 0.05), [HeadErrorSample(1.0, None, 1)] * WINDOW_SAMPLES)
    figures = errors.figures()["fixed"]
    assert (figures.true, figures.predicted, figures.misses_aim) == (1.0, None, False)
