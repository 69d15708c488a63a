"""Head profiles for a model without weights: what could say a step's curves before it reads.

All give [steps, layers, heads, levels, len(BUDGETS)] float32, logs of squared head output errors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fluxion_core.geometry import BLOCK_SIZES
from fluxion_core.lab.unseen.traces import PAIRS, SPREAD, STEPS, Trace
from fluxion_core.planning.choice_reference import by_price
from fluxion_core.planning.constants import BUDGETS, FEATURE_NAMES
from fluxion_core.planning.cost_model import CostModel
from fluxion_core.planning.head_profile import log_squared_errors

COARSE_FEATURES = (
    "window_lse", "query_scale", "bound_1st", "bound_2nd", "bound_4th", "bound_lse", "bound_mean",
    "bound_deviation", "sink_mass", "recent_mass", "window_peak", "window_output_share",
    "window_output_scale",
)  # fmt: skip
"""Of a step, before it reads, that the prompt's queries have as well."""

RIDGE = 30.0
"""Added to the diagonal; inputs are in deviations, and there are 128 rows."""

_LEAST_DEVIATION = 0.02
_HIGHEST = 2.0
"""Log squares are at most so: a head that is lost altogether, and more."""

_GROWN_BUDGETS = [2, 4, 6]
"""Whose growth from block size 16 to 128 is that of their neighbours too."""

_PENALTY_OF_ONE = 1e-3
"""Of the constant: next to none, so that the mean is the prompt's."""

_PRIOR_STEPS = 16.0
"""Steps that the prompt's mean counts, beside evidence."""


def oracle(trace: Trace) -> Tensor:
    """The true curves."""
    return trace.logs[STEPS].float()


def prompt_mean(trace: Trace, rows: slice) -> Tensor:
    """Mean of the squares over some of the prompt's queries, the same in every step."""
    mean = trace.logs[rows].float().exp().mean(0).log()
    return mean.expand(trace.fixed_square.shape[0], *mean.shape)


def deviations(trace: Trace) -> tuple[Tensor, Tensor]:
    """Coarse features in deviations of the prompt's spread queries, head by head.

    Returns:
        Of the steps [steps, layers, heads, features], and of the spread queries.
    """
    columns = torch.tensor([FEATURE_NAMES.index(name) for name in COARSE_FEATURES])
    of_prompt, of_steps = (trace.features[rows][..., columns] for rows in (SPREAD, STEPS))
    mean, deviation = of_prompt.mean(0), of_prompt.std(0).clamp(min=_LEAST_DEVIATION)
    return (of_steps - mean) / deviation, (of_prompt - mean) / deviation


def ridge(trace: Trace, *, every_query: int = 1, of_layer: bool = False) -> Tensor:
    """A ridge from coarse features to head profiles, fitted on the spread queries.

    Its output has the form of the predictor's (planning/head_profile.py), 11 numbers. Means and
    deviations of its inputs can be folded into its weights, 14 x 11 a head: inputs are not clipped.

    Args:
        trace: of the steps.
        every_query: 2 for every second of the queries, and so on.
        of_layer: the heads of a layer share their slopes, not their constants.
    """
    steps, prompt = deviations(trace)
    queries = slice(every_query - 1, None, every_query)
    inputs, observed = prompt[queries], trace.logs[SPREAD][queries].float()
    fit = _weights_of_layer if of_layer else _weights
    weights = fit(inputs, _profiles(observed), RIDGE)
    missing = _log_mean(observed) - _log_mean(log_squared_errors(_apply(inputs, weights)))
    weights[..., -1, :] += _profiles(missing)
    predicted: Tensor = log_squared_errors(_apply(steps, weights))
    return predicted.clamp(max=_HIGHEST)


def fit_ridge(prompt: Tensor, observed: Tensor, steps: Tensor, strength: float = RIDGE) -> Tensor:
    """Logs of squares by a ridge for each head.

    It predicts the mean log; what makes the mean of its squares that of the prompt is added.

    Args:
        prompt: [queries, layers, heads, features], in deviations.
        observed: [queries, layers, heads, values]: logs of squares.
        steps: [steps, layers, heads, features].
        strength: of the penalty.

    Returns:
        [steps, layers, heads, values].
    """
    weights = _weights(prompt, observed, strength)
    missing = _log_mean(observed) - _log_mean(_apply(prompt, weights))
    return (_apply(steps, weights) + missing).clamp(max=_HIGHEST)


def _log_mean(logs: Tensor) -> Tensor:
    """Log of the mean over the queries, of squares."""
    return logs.exp().mean(0).log()


def _profiles(logs: Tensor) -> Tensor:
    """[..., NUM_OUTPUTS] of curves [..., levels, len(BUDGETS)]."""
    grown = logs[..., _GROWN_BUDGETS]
    growths = (grown[..., -1, :] - grown[..., 0, :]) / (len(BLOCK_SIZES) - 1)
    return torch.cat((logs[..., 0, :], growths), -1)


def _apply(inputs: Tensor, weights: Tensor) -> Tensor:
    """[rows, layers, heads, values]."""
    return torch.einsum("nlhf,lhfv->nlhv", _with_one(inputs), weights)


def _weights(inputs: Tensor, targets: Tensor, strength: float) -> Tensor:
    """[layers, heads, features and the constant, values]."""
    rows, values = (part.permute(1, 2, 0, 3) for part in (_with_one(inputs), targets))
    penalty = torch.full((rows.shape[-1],), strength)
    penalty[-1] = _PENALTY_OF_ONE
    solved: Tensor = torch.linalg.solve(rows.mT @ rows + penalty.diag(), rows.mT @ values)
    return solved


def _weights_of_layer(inputs: Tensor, targets: Tensor, strength: float) -> Tensor:
    """Like _weights, with the same slopes for all heads of a layer."""
    middle, height = inputs.mean(0), targets.mean(0)
    rows, values = inputs - middle, targets - height
    squares = torch.einsum("qlhf,qlhg->lfg", rows, rows)
    penalty = strength * torch.eye(rows.shape[-1])
    slopes = torch.linalg.solve(squares + penalty, torch.einsum("qlhf,qlhv->lfv", rows, values))
    constants = height - torch.einsum("lhf,lfv->lhv", middle, slopes)
    each = slopes[:, None].expand(-1, rows.shape[2], -1, -1)
    return torch.cat((each, constants[:, :, None]), 2)


def _with_one(values: Tensor) -> Tensor:
    return torch.cat((values, torch.ones_like(values[..., :1])), -1)


def with_evidence(trace: Trace, curves: Tensor, price: float, *, decay: float = 0.98) -> Tensor:
    """Curves, each corrected by what the steps before it could see for nothing.

    A step that read budget y of a head knows how far its output lies from that of every smaller
    budget; with the error that is expected at y this estimates those errors. A running mean of such
    squares over one of what was expected, for each head and budget, is a factor.

    Args:
        trace: of the steps.
        curves: that plans are made from at first.
        price: by which the steps read.
        decay: of what was seen, a step.
    """
    steps, layers, heads = trace.fixed_square.shape
    prior = _PRIOR_STEPS * curves.exp().mean(0)[:, :, 0]
    seen, expected = prior.clone(), prior.clone()
    corrected = []
    for step in range(steps):
        factor = (seen / expected).clamp(0.05, 20.0)
        now = curves[step] + factor.log()[:, :, None]
        corrected.append(now)
        rows = torch.unflatten(now, 1, (trace.kv_heads, -1))
        plans = by_price(rows, torch.full((layers,), price), CostModel())
        level = plans.levels.clamp(min=0).repeat_interleave(heads // trace.kv_heads, 1)
        grid = torch.tensor([*BUDGETS, 1.0])
        index = torch.searchsorted(grid, plans.budgets.flatten(1).contiguous())
        found, known = _evidence(trace, step, now, level, index)
        before = curves[step].gather(2, _at(level, len(BUDGETS)))[:, :, 0].exp()
        kept = (1 - decay) * prior
        seen = torch.where(known, decay * seen + kept + found, seen)
        expected = torch.where(known, decay * expected + kept + before, expected)
    return torch.stack(corrected)


def _at(level: Tensor, width: int) -> Tensor:
    return level[..., None, None].expand(*level.shape, 1, width)


def _evidence(
    trace: Trace, step: int, curves: Tensor, level: Tensor, index: Tensor
) -> tuple[Tensor, Tensor]:
    """Estimated squares [layers, heads, budgets], and which there are.

    Args:
        trace: of the steps.
        step: which.
        curves: [layers, heads, levels, budgets]: what is expected.
        level, index: [layers, heads]: of what was read.
    """
    row = STEPS.start + step
    moved = trace.moved[row].float().gather(2, _at(level, len(PAIRS)))[:, :, 0]
    truth = trace.logs[row].float().gather(2, _at(level, len(BUDGETS)))[:, :, 0].exp()
    left = curves.gather(2, _at(level, len(BUDGETS)))[:, :, 0].exp()
    left = torch.cat((left, torch.zeros_like(left[..., :1])), -1).gather(-1, index[..., None])
    distance = torch.zeros(*level.shape, len(BUDGETS), len(BUDGETS))
    for number, (smaller, larger) in enumerate(PAIRS):
        distance[..., larger, smaller] = moved[..., number].exp()
    where = index.clamp(max=len(BUDGETS) - 1)[..., None, None]
    of_read = distance.gather(2, where.expand(*level.shape, 1, len(BUDGETS)))[:, :, 0] + left
    # Who read everything knows the errors themselves.
    found = torch.where(index[..., None] == len(BUDGETS), truth, of_read)
    return found, torch.arange(len(BUDGETS)) < index[..., None]
