"""The curve's figures, worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from fluxion_core.lab.training.assess import calibration, error_histogram, label_agreement
from fluxion_core.lab.training.curve import FixedMethod, MethodResult, PlannedMethod
from fluxion_core.lab.training.frontier import (
    REFERENCE,
    bytes_at_kl,
    family,
    figures,
    relative_bytes_at_reference,
    standard_ways,
)
from fluxion_core.lab.training.losses import loss_report


def result(kl: list[float], share: float, squares: float = 0.0) -> MethodResult:
    rows = len(kl)
    return MethodResult(
        kl=torch.tensor(kl),
        agrees=torch.ones(rows, dtype=torch.bool),
        scanned=torch.full((rows,), share / 4),
        attended=torch.full((rows,), 3 * share / 4),
        squares=torch.full((rows, 2, 3), squares),
        streaming=torch.zeros(rows),
    )


def test_bytes_at_a_kl_lie_between_points_on_logarithmic_axes():
    points = [(4.0, 0.001), (1.0, 0.1)]
    assert bytes_at_kl(points, 0.01) == pytest.approx(2.0)
    assert bytes_at_kl(points, 0.1) == pytest.approx(1.0)
    assert math.isnan(bytes_at_kl(points, 0.2))


def test_figures_are_relative_to_the_reference():
    near, far = (PlannedMethod("marginal", price, "network") for price in (1.0, 10.0))
    documents = [
        {
            REFERENCE: result([0.02, 0.04], 0.2),
            near: result([0.01, 0.01], 0.1),
            far: result([0.09, 0.09], 0.02),
        }
    ] * 3
    rows = {row.way: row for row in figures(documents)}
    assert rows[str(near)].relative_bytes == pytest.approx(0.5)
    assert rows[str(near)].mean_kl == pytest.approx(0.01)
    value, low, high = relative_bytes_at_reference(documents)["marginal, network"]
    # By hand: 0.03 is half-way between 0.01 and 0.09 in the logarithm.
    assert value == pytest.approx(math.sqrt(0.5 * 0.1), rel=1e-4)
    assert low == pytest.approx(value)
    assert high == pytest.approx(value)


def test_every_way_of_the_curve_has_a_name_and_a_family_of_its_own():
    ways = standard_ways((0.1, 0.2))
    assert len({str(way) for way in ways}) == len(ways)
    assert {family(way) for way in ways} >= {"fixed", "direct", "marginal, network"}
    assert FixedMethod(0, 0.05) in ways


def test_losses_say_which_steps_and_heads_lose():
    predicted = PlannedMethod("marginal", 1.0, "network")
    nearest = PlannedMethod("marginal", 3.0, "oracle")
    other = PlannedMethod("marginal", 1.0, "oracle")
    bad = result([0.5, 0.1, 0.1, 0.1], 0.1, squares=0.02)
    bad.squares[:, 1, 2] = 0.12
    documents = [
        {
            predicted: bad,
            nearest: result([0.1, 0.1, 0.1, 0.1], 0.11, squares=0.02),
            other: result([0.0] * 4, 0.4),
        }
    ]
    first = torch.tensor([True, False, False, False])
    report = loss_report(documents, predicted, torch.ones(2, 3), {"first": first, "rest": ~first})
    assert report.oracle == str(nearest)
    assert report.by_head[1][2] == pytest.approx(1.0)
    assert [kind.share_of_loss for kind in report.kinds] == pytest.approx([1.0, 0.0])
    assert report.worst_steps_share == pytest.approx(0.5 / 0.8)


def test_labels_that_agree_and_labels_that_miss():
    # By hand: errors of 0.05 (streaming at 0.1) and 0.5; the second is predicted as streaming.
    logs = torch.full((2, 4, 8), 2 * math.log(0.05))
    observed = logs.clone()
    observed[1, :, :3] = 2 * math.log(0.5)
    found = label_agreement(logs, observed, 0.1)
    assert found.streaming_true == 0.5
    assert found.streaming_predicted == 1.0
    assert found.class_accuracy == 0.5
    assert found.missed_retrieval == 1.0
    assert found.budget_within_one == 0.5
    assert found.confusion[3][0] == 0.5
    perfect = label_agreement(observed, observed, 0.1)
    assert perfect.budget_exact == perfect.class_accuracy == perfect.budget_enough == 1.0


def test_calibration_and_histogram_hold_every_row():
    predicted = torch.linspace(-8, -1, 48)
    pairs = calibration(predicted, predicted + math.log(2.0), bins=6)
    assert all(observed == pytest.approx(2 * said) for said, observed in pairs)
    shares = error_histogram(predicted, predicted)
    assert sum(map(sum, shares)) == pytest.approx(1.0)
    assert sum(shares[i][i] for i in range(len(shares))) == pytest.approx(1.0)
