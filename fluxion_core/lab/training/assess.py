"""Assessment of a predictor's profiles against labels of steps that it has not seen.

The labels are what head_profile.py and the paper call budgets and classes: at a threshold, the
smallest budget whose error is within it, and streaming where that is 0. A network predicts the mean
of the squared error, so it cannot be right in every single step; how far it is right is said here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fluxion_core.planning.constants import BUDGETS
from fluxion_core.planning.head_profile import smallest_budgets

_GRID = (*BUDGETS, 1.0)
_HISTOGRAM_BINS = 48
_LOWEST_LOG10 = -4.0


@dataclass(frozen=True)
class LabelAgreement:
    """Predicted labels against true ones, at one threshold and block size 16."""

    threshold: float
    streaming_true: float
    """Share of head-steps that need nothing beyond the window."""
    streaming_predicted: float
    class_accuracy: float
    """Share whose class (streaming or retrieval) is predicted."""
    missed_retrieval: float
    """Share of retrieval head-steps that are predicted to be streaming."""
    budget_exact: float
    """Share whose budget on the grid is predicted."""
    budget_within_one: float
    """Share whose budget is at most one step of the grid away."""
    budget_enough: float
    """Share whose predicted budget is at least what is needed."""
    confusion: list[list[float]]
    """[needed][predicted] shares over the grid of budgets and 1."""


def label_agreement(predicted: Tensor, observed: Tensor, threshold: float) -> LabelAgreement:
    """Agreement of labels.

    Args:
        predicted: [rows, levels, len(BUDGETS)]: log of squared head output errors.
        observed: like predicted.
        threshold: head output error.
    """
    limit = torch.tensor(threshold, device=predicted.device)
    grid = torch.tensor(_GRID, device=predicted.device)
    needed = torch.bucketize(smallest_budgets(observed, limit)[:, 0].contiguous(), grid)
    chosen = torch.bucketize(smallest_budgets(predicted, limit)[:, 0].contiguous(), grid)
    is_streaming, says_streaming = needed == 0, chosen == 0
    retrieval = (~is_streaming).sum().clamp(min=1)
    counts = torch.bincount(needed * len(_GRID) + chosen, minlength=len(_GRID) ** 2)
    confusion = (counts / counts.sum()).view(len(_GRID), -1)

    def share(values: Tensor) -> float:
        return float(values.float().mean())

    return LabelAgreement(
        threshold=threshold,
        streaming_true=share(is_streaming),
        streaming_predicted=share(says_streaming),
        class_accuracy=share(is_streaming == says_streaming),
        missed_retrieval=float((says_streaming & ~is_streaming).sum() / retrieval),
        budget_exact=share(needed == chosen),
        budget_within_one=share((needed - chosen).abs() <= 1),
        budget_enough=share(chosen >= needed),
        confusion=confusion.tolist(),
    )


def calibration(predicted: Tensor, observed: Tensor, bins: int = 24) -> list[tuple[float, float]]:
    """(predicted, observed) mean squared errors of head-steps with like predictions.

    Args:
        predicted, observed: [rows]: log of squared head output errors.
        bins: of equally many rows.
    """
    order = predicted.argsort()
    pairs = zip(predicted[order].chunk(bins), observed[order].chunk(bins), strict=True)
    return [(float(p.double().exp().mean()), float(o.double().exp().mean())) for p, o in pairs]


def error_histogram(predicted: Tensor, observed: Tensor) -> list[list[float]]:
    """Shares by log10 of the error, [true][predicted], both from 1e-4 to 1.

    Args:
        predicted, observed: [rows]: log of squared head output errors.
    """

    def bin_of(values: Tensor) -> Tensor:
        place = (values / (2 * math.log(10)) - _LOWEST_LOG10) / -_LOWEST_LOG10
        return (place * _HISTOGRAM_BINS).long().clamp(0, _HISTOGRAM_BINS - 1)

    index = bin_of(observed) * _HISTOGRAM_BINS + bin_of(predicted)
    counts = torch.bincount(index, minlength=_HISTOGRAM_BINS**2)
    shares: list[list[float]] = (counts / counts.sum()).view(_HISTOGRAM_BINS, -1).tolist()
    return shares


def streaming_by_layer(
    predicted: Tensor, observed: Tensor, threshold: float
) -> tuple[Sequence[float], Sequence[float]]:
    """Streaming shares per layer, predicted and true.

    Args:
        predicted, observed: [samples, layers, heads, levels, len(BUDGETS)], logs.
        threshold: head output error.
    """
    limit = torch.tensor(threshold, device=predicted.device)

    def shares(logs: Tensor) -> list[float]:
        streaming = (smallest_budgets(logs, limit)[..., 0] == 0).float()
        values: list[float] = streaming.mean((0, 2)).tolist()
        return values

    return shares(predicted), shares(observed)
