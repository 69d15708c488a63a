"""Fit the predictor to collected samples.

What is fitted is the conditional mean of the squared head output error, whose logarithm the network
gives. The loss of one value is `r - log r - 1` with `r = observed / predicted`, the deviance of a
gamma distribution: least where the prediction is the mean, and hard on what comes out a hundred
times worse than predicted. Rare spikes count as much as they cost. It is weighted by the root of
the prediction, so that the network is spent on heads whose errors matter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fluxion_core.geometry import BLOCK_SIZES
from fluxion_core.lab.training.collect import Samples
from fluxion_core.planning.constants import BUDGETS, SMALL_BUDGET
from fluxion_core.planning.cost_model import CostModel, fit_spread
from fluxion_core.planning.features import FEATURES, PRIORS
from fluxion_core.planning.head_profile import log_squared_errors
from fluxion_core.planning.network import HeadProfileMlp

RATIO_CAP = 4.0
"""Log of observed / predicted from which on the loss grows linearly."""

IMPORTANT_SQUARE = 0.003
"""Squared head output error whose weight is 1; weights lie within the bounds below."""
LEAST_WEIGHT, MOST_WEIGHT = 0.1, 4.0


@dataclass(frozen=True)
class TrainingSet:
    """Samples of several documents, with priors filled in."""

    features: Tensor
    """[rows, NUM_FEATURES]."""
    log_squares: Tensor
    """[rows, levels, len(BUDGETS)] float16."""


def fit_priors(shards: Sequence[Samples]) -> Tensor:
    """Per head, of all documents: [layers, heads, 3], see features.py."""
    return _priors(_squares_of_heads(shards).mean(0))


def with_priors(shards: Sequence[Samples], device: torch.device) -> TrainingSet:
    """One set of all shards; a document's priors come from the other documents."""
    squares = _squares_of_heads(shards)
    rows, labels = [], []
    for index, shard in enumerate(shards):
        others = (squares.sum(0) - squares[index]) / max(1, len(shards) - 1)
        seen = shard.features.to(device, copy=True)
        seen[..., PRIORS] = _priors(others if len(shards) > 1 else squares[0]).to(device)
        rows.append(seen.flatten(0, 2))
        labels.append(shard.log_squares.to(device).flatten(0, 2))
    return TrainingSet(torch.cat(rows), torch.cat(labels))


def _squares_of_heads(shards: Sequence[Samples]) -> Tensor:
    """[documents, layers, heads, levels, len(BUDGETS)]: mean squared errors."""
    return torch.stack([shard.log_squares.float().exp().mean(0) for shard in shards])


def _priors(squares: Tensor) -> Tensor:
    logs = squares.log()
    small = logs[..., SMALL_BUDGET]
    growth = (small[..., -1] - small[..., 0]) / (len(BLOCK_SIZES) - 1)
    return torch.stack((logs[..., 0, 0], small[..., 0], growth), -1)


def fit_cost(shards: Sequence[Samples], digest_bits: int = 16) -> CostModel:
    """The cost model's spread of each block size."""
    levels = torch.cat([shard.plan_levels for shard in shards])
    shares = torch.cat([shard.plan_shares for shard in shards])
    unions = torch.cat([shard.plan_unions for shard in shards])
    spread = [
        fit_spread(shares[levels == level], unions[levels == level])
        for level in range(len(BLOCK_SIZES))
    ]
    return CostModel((spread[0], spread[1], spread[2], spread[3]), digest_bits)


def deviance(predicted: Tensor, observed: Tensor, cap: float = RATIO_CAP) -> Tensor:
    """Loss of log means against log observations, elementwise."""
    ratio = observed - predicted
    capped = ratio.clamp(max=cap)
    return capped.exp() * (1 + ratio - capped) - ratio - 1


def weighted_deviance(predicted: Tensor, observed: Tensor) -> Tensor:
    """Deviance in which a head counts the more, the larger its predicted error.

    With the weight `predicted ** 0.5` it is least at the mean as well, as the deviance of a Tweedie
    distribution of power 1.5 is, but spends the network on heads that matter.
    """
    weight = (0.5 * (predicted.detach() - math.log(IMPORTANT_SQUARE))).exp()
    return weight.clamp(LEAST_WEIGHT, MOST_WEIGHT) * deviance(predicted, observed, 6.0)


def squared_log_error(predicted: Tensor, observed: Tensor) -> Tensor:
    """The loss that fits the average log error: what is compared with."""
    return (observed - predicted) ** 2


def pinball(quantile: float) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss that fits a quantile: what is compared with."""

    def loss(predicted: Tensor, observed: Tensor) -> Tensor:
        ratio = observed - predicted
        return torch.maximum(quantile * ratio, (quantile - 1) * ratio)

    return loss


def fit(
    data: TrainingSet,
    *,
    epochs: float = 30.0,
    batch: int = 16_384,
    learning_rate: float = 2e-3,
    loss: Callable[[Tensor, Tensor], Tensor] = weighted_deviance,
    without: Sequence[str] = (),
    seed: int = 0,
    on_step: Callable[[int, int, float], None] | None = None,
) -> HeadProfileMlp:
    """Train a network.

    Args:
        data: on the device to train on.
        epochs: passes over the data.
        batch: rows of a step.
        learning_rate: the highest; warms up, then falls as a cosine.
        loss: elementwise, of log squares.
        without: feature groups that the network does not see, for ablation.
        seed: of weights and order.
        on_step: called now and then with step, steps and mean loss.
    """
    device = data.features.device
    torch.manual_seed(seed)
    network = HeadProfileMlp().to(device)
    rows = data.features.shape[0]
    sample = torch.randint(0, rows, (min(rows, 1_000_000),), device=device)
    seen = data.features[sample]
    network.feature_mean.copy_(seen.mean(0))
    scale = 1 / seen.std(0).clamp(min=1e-3)
    hidden = [feature.group in without for feature in FEATURES]
    scale[torch.tensor(hidden, device=device)] = 0.0
    network.feature_scale.copy_(scale)
    labels = data.log_squares[sample].float()
    network.output_mean[: len(BUDGETS)] = labels[:, 0].mean(0)

    def batch_loss(features: Tensor, log_squares: Tensor) -> Tensor:
        return loss(log_squared_errors(network(features)), log_squares).mean()

    minimise(
        network, data, batch_loss,
        epochs=epochs, batch=batch, learning_rate=learning_rate, on_step=on_step,
    )  # fmt: skip
    return network.eval()


def minimise(
    network: nn.Module,
    data: TrainingSet,
    batch_loss: Callable[[Tensor, Tensor], Tensor],
    *,
    epochs: float,
    batch: int,
    learning_rate: float,
    on_step: Callable[[int, int, float], None] | None = None,
) -> None:
    """AdamW over random batches, the learning rate up and then down in one cycle.

    Args:
        network: whose parameters are trained.
        data: features, and labels that are given to the loss as float32.
        batch_loss: of a batch's features and log squares; a scalar.
        epochs, batch, learning_rate, on_step: see `fit`.
    """
    rows, device = data.features.shape[0], data.features.device
    steps = max(1, math.ceil(epochs * rows / batch))
    optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=steps, pct_start=0.05
    )
    for step in range(steps):
        index = torch.randint(0, rows, (batch,), device=device)
        value = batch_loss(data.features[index], data.log_squares[index].float())
        optimizer.zero_grad(set_to_none=True)
        value.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if on_step is not None and (step % 200 == 0 or step == steps - 1):
            on_step(step + 1, steps, float(value.detach()))
