"""One network for all models: features without a model's units, and a correction as its output.

What has a model's units becomes a difference within its layer or a deviation from the prompt's own
queries. The output is added to the mean curve of the prompt's spread queries, or to a ridge's: a
network that knows nothing about a model leaves its plans training-free.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fluxion_core.lab.training.fit import weighted_deviance
from fluxion_core.lab.unseen.curves import deviations, oracle, prompt_mean, ridge
from fluxion_core.lab.unseen.traces import LAST, SPREAD, STEPS, Trace
from fluxion_core.planning.constants import (
    BUDGETS,
    CLIP,
    CLIP_DEVIATIONS,
    FEATURE_NAMES,
    NUM_OUTPUTS,
    SMALL_BUDGET,
)
from fluxion_core.planning.head_profile import log_squared_errors

UNITLESS = (
    "layer_depth", "region_length", "key_mean_share", "value_mean_share", "sink_value_scale",
    "bound_1st", "bound_lse", "bound_deviation", "window_output_share", "window_output_scale",
    "sink_mass", "recent_mass", "window_peak", "query_cosine", "query_change", "window_lse_change",
    "bound_change", "estimate_mass", "estimate_mass_worst", "bound_excess", "bound_1st_excess",
    "bound_rank",
)  # fmt: skip
"""Features as they are: shares, and logits beside the window's lse."""

DIFFERENCES = (
    ("group_bound", "bound_1st"), ("layer_bound", "bound_1st"), ("layer_bound_lse", "bound_lse"),
    ("bound_1st", "bound_2nd"), ("bound_1st", "bound_4th"), ("bound_1st", "bound_mean"),
)  # fmt: skip

OF_LAYER = ("key_scale", "value_scale")
"""Less the mean over the layer's heads."""

_LARGE_BUDGET = BUDGETS.index(1 / 8)
_PROFILED = (0, SMALL_BUDGET, _LARGE_BUDGET)
"""Budgets whose spread over the prompt's queries is seen."""


def unitless_features(trace: Trace, *, with_ridge: bool) -> Tensor:
    """[steps, layers, heads, features] float32.

    Args:
        trace: of the steps.
        with_ridge: whether what a ridge of the prompt says beyond its mean is among them.
    """
    seen = dict(zip(FEATURE_NAMES, trace.features[STEPS].unbind(-1), strict=True))
    columns = [seen[name] for name in UNITLESS]
    columns += [seen[more] - seen[less] for more, less in DIFFERENCES]
    columns += [seen[name] - seen[name].mean(2, keepdim=True) for name in OF_LAYER]
    steps = columns[0].shape[0]
    columns += [column.expand(steps, *column.shape) for column in _prompt_columns(trace)]
    columns += deviations(trace)[0].unbind(-1)
    if with_ridge:
        beyond = base_of(trace, with_ridge=True) - prompt_mean(trace, SPREAD)
        columns += [*beyond[..., 0, :].unbind(-1), beyond[..., -1, SMALL_BUDGET]]
    return torch.stack(columns, -1).clamp(-CLIP, CLIP)


def _prompt_columns(trace: Trace) -> list[Tensor]:
    """What the prompt's queries needed, [layers, heads] each."""
    spread, last = (trace.logs[rows].float() for rows in (SPREAD, LAST))
    mean, mean_of_last = (logs.exp().mean(0).log() for logs in (spread, last))
    columns = [*mean[..., 0, :].unbind(-1)]
    columns += [mean[..., -1, budget] - mean[..., 0, budget] for budget in (1, *_PROFILED[1:])]
    for budget in _PROFILED:
        logs, of_mean = spread[..., 0, budget], mean[..., 0, budget]
        columns += [logs.std(0), logs.amax(0) - of_mean, mean_of_last[..., 0, budget] - of_mean]
    return columns


def base_of(trace: Trace, *, with_ridge: bool) -> Tensor:
    """Curves that a network corrects."""
    return ridge(trace) if with_ridge else prompt_mean(trace, SPREAD)


class Samples(NamedTuple):
    """Head-steps of one model."""

    features: Tensor
    """[rows, features]."""
    base: Tensor
    """[rows, levels, len(BUDGETS)]: the curve that is corrected."""
    logs: Tensor
    """Like base: the truth."""


def samples_of(traces: Sequence[Trace], *, with_ridge: bool, every: int = 2) -> Samples:
    """Samples of every so many steps."""
    parts = []
    for trace in traces:
        values = (
            unitless_features(trace, with_ridge=with_ridge),
            base_of(trace, with_ridge=with_ridge),
            oracle(trace),
        )
        parts.append([value[::every].flatten(0, 2) for value in values])
    return Samples(*(torch.cat(column) for column in zip(*parts, strict=True)))


class CorrectionMlp(nn.Module):
    """Features to a correction of a given curve, as large as the shipped network's output."""

    mean: Tensor
    scale: Tensor

    def __init__(self, num_features: int, hidden: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(num_features))
        self.register_buffer("scale", torch.ones(num_features))
        self.layers = nn.Sequential(
            nn.Linear(num_features, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, NUM_OUTPUTS),
        )
        last = self.layers[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, features: Tensor, base: Tensor) -> Tensor:
        """[..., levels, len(BUDGETS)] for [..., features] and the curve that is corrected."""
        scaled = ((features - self.mean) * self.scale).clamp(-CLIP_DEVIATIONS, CLIP_DEVIATIONS)
        return base + log_squared_errors(self.layers(scaled))


def fit_universal(
    models: Sequence[Samples],
    *,
    steps: int = 400,
    batch: int = 4096,
    hidden: int = 192,
    learning_rate: float = 2e-3,
    seed: int = 0,
) -> CorrectionMlp:
    """Train a network; every model has the same share of a batch."""
    torch.manual_seed(seed)
    network = CorrectionMlp(models[0].features.shape[1], hidden)
    seen = torch.cat([of.features[:: max(1, len(of.features) // 50_000)] for of in models])
    network.mean.copy_(seen.mean(0))
    network.scale.copy_(1 / seen.std(0).clamp(min=1e-3))
    optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=steps, pct_start=0.05
    )
    for _ in range(steps):
        drawn = []
        for of in models:
            index = torch.randint(0, len(of.features), (batch // len(models),))
            drawn.append([part[index] for part in of])
        features, base, logs = (torch.cat(parts) for parts in zip(*drawn, strict=True))
        loss = weighted_deviance(network(features, base), logs).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return network.eval()


@torch.no_grad()
def universal(trace: Trace, network: CorrectionMlp, *, with_ridge: bool) -> Tensor:
    """Curves of a trace's steps by a network."""
    features = unitless_features(trace, with_ridge=with_ridge)
    curves: Tensor = network(features, base_of(trace, with_ridge=with_ridge))
    return curves
