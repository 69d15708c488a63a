"""A network against samples it was not trained on: loss, labels, what each group is worth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace

import torch
from torch import Tensor

from fluxion_core.lab.training import assess
from fluxion_core.lab.training.collect import EVERY_TOKENS, RUN_OFFSETS, RUN_STEPS, Samples
from fluxion_core.lab.training.fit import TrainingSet, deviance, fit, weighted_deviance
from fluxion_core.planning.features import GROUPS, PRIORS
from fluxion_core.planning.head_profile import log_squared_errors
from fluxion_core.planning.network import HeadProfileMlp

LABEL_THRESHOLDS = (0.05, 0.1, 0.2, 0.3)

LONGEST_TRAINED = 4096
"""Prompts of training pieces are no longer."""


def network_loss(
    network: HeadProfileMlp, shards: Sequence[Samples], priors: Tensor
) -> dict[str, float]:
    """Mean losses by name.

    Args:
        network: on any device.
        shards: samples of documents.
        priors: [layers, heads, 3].
    """
    predicted, observed = _predictions(network, shards, priors)
    return {
        "weighted_deviance": float(weighted_deviance(predicted, observed).mean()),
        "deviance": float(deviance(predicted, observed).mean()),
    }


def assess_network(
    network: HeadProfileMlp, shards: Sequence[Samples], priors: Tensor
) -> dict[str, object]:
    """Labels and calibration, apart for prompts as long as those in training and longer ones."""
    split_at = LONGEST_TRAINED // EVERY_TOKENS * len(RUN_OFFSETS) * RUN_STEPS
    found: dict[str, object] = {}
    parts = {"trained lengths": slice(0, split_at), "longer": slice(split_at, None)}
    for name, part in parts.items():
        cut = [
            replace(shard, features=shard.features[part], log_squares=shard.log_squares[part])
            for shard in shards
            if len(shard.features[part])
        ]
        if not cut:
            continue
        predicted, observed = _predictions(network, cut, priors)
        flat, true = predicted.flatten(0, 2), observed.flatten(0, 2)
        found[name] = {
            "head_steps": flat.shape[0],
            "labels": [asdict(assess.label_agreement(flat, true, t)) for t in LABEL_THRESHOLDS],
            "calibration": {
                str(index): assess.calibration(flat[:, 0, index], true[:, 0, index])
                for index in (0, 3, 5)
            },
            "histogram": assess.error_histogram(flat[:, 0, 0], true[:, 0, 0]),
            "streaming_by_layer": {
                str(t): assess.streaming_by_layer(predicted, observed, t) for t in (0.1, 0.2)
            },
        }
    return found


def ablate(
    data: TrainingSet,
    validation: Sequence[Samples],
    tests: Sequence[Samples],
    priors: Tensor,
    *,
    epochs: float,
    on_done: Callable[[int, int], None],
) -> dict[str, object]:
    """Losses of networks that do without one group of features each; `none` has all."""
    found: dict[str, object] = {}
    for done, group in enumerate((None, *GROUPS)):
        network = fit(data, epochs=epochs, without=() if group is None else (group,))
        found[group or "none"] = {
            "validation": network_loss(network, validation, priors),
            "test": network_loss(network, tests, priors),
        }
        on_done(done + 1, len(GROUPS) + 1)
    return found


@torch.no_grad()
def _predictions(
    network: HeadProfileMlp, shards: Sequence[Samples], priors: Tensor
) -> tuple[Tensor, Tensor]:
    """Predicted and true logs, [samples, layers, heads, levels, len(BUDGETS)]."""
    device = network.output_mean.device
    features = torch.cat([shard.features for shard in shards]).to(device)
    features[..., PRIORS] = priors.to(device)
    observed = torch.cat([shard.log_squares for shard in shards]).to(device).float()
    return log_squared_errors(network(features)), observed
