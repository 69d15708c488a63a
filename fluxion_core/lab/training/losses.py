"""Losses of predicted decisions against the oracle's: by layer, head and kind of step.

Two ways of about the same bytes are compared. A head's loss is its weighted squared output error
beyond the oracle's; a step's is its KL beyond the oracle's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fluxion_core.geometry import WindowSpec
from fluxion_core.lab.training.curve import Method, MethodResult, PlannedMethod, Runs, join

WORST_SHARE = 0.05


@dataclass(frozen=True)
class KindOfSteps:
    """Steps of one kind."""

    name: str
    share: float
    """Of all steps."""
    predicted_kl: float
    oracle_kl: float
    share_of_loss: float
    """Of all KL beyond the oracle's."""


@dataclass(frozen=True)
class LossReport:
    """Comparison of two ways, and where their difference is."""

    predicted: str
    oracle: str
    predicted_bytes: float
    """Share of the region's KV."""
    oracle_bytes: float
    by_head: list[list[float]]
    """[layers][heads]: shares of the weighted squared error beyond the oracle's, any sign."""
    kinds: list[KindOfSteps]
    worst_steps_share: float
    """Share of the KL made by the worst twentieth of the steps, predicted."""


def copied_steps(runs: Runs, window: WindowSpec) -> Tensor:
    """[rows] bool: the token and the next follow each other in the retrieval region too."""
    ids = runs.kv.token_ids.tolist()
    found = []
    for position in runs.positions.tolist():
        region = window.retrieval_region(position + 1)
        pair = (ids[position], ids[position + 1])
        found.append(any((ids[i], ids[i + 1]) == pair for i in region))
    return torch.tensor(found)


def loss_report(
    documents: Sequence[Mapping[Method, MethodResult]],
    predicted: PlannedMethod,
    weights: Tensor,
    kinds: Mapping[str, Tensor],
) -> LossReport:
    """Compare a predicted way with the oracle's way of the nearest bytes.

    Args:
        documents: results of each.
        predicted: a way whose decisions come from a network.
        weights: [layers, heads]: what a squared error counts.
        kinds: by name, [rows] bool over the steps of all documents.
    """
    ours = join([results[predicted] for results in documents])
    candidates = {
        way: join([results[way] for results in documents])
        for way in documents[0]
        if isinstance(way, PlannedMethod)
        and (way.policy, way.source) == (predicted.policy, "oracle")
    }
    target = float(ours.share.mean().log())
    oracle = min(
        candidates, key=lambda way: abs(float(candidates[way].share.mean().log()) - target)
    )
    theirs = candidates[oracle]
    excess = ((ours.squares - theirs.squares).mean(0) * weights).double()
    loss = ours.kl - theirs.kl
    total = float(loss.sum())
    worst = ours.kl.topk(max(1, int(WORST_SHARE * ours.kl.numel()))).values
    return LossReport(
        predicted=str(predicted),
        oracle=str(oracle),
        predicted_bytes=float(ours.share.mean()),
        oracle_bytes=float(theirs.share.mean()),
        by_head=(excess / excess.sum()).tolist(),
        kinds=[
            KindOfSteps(
                name,
                float(mask.float().mean()),
                float(ours.kl[mask].mean()),
                float(theirs.kl[mask].mean()),
                float(loss[mask].sum()) / total,
            )
            for name, mask in kinds.items()
            if mask.any()
        ],
        worst_steps_share=float(worst.sum() / ours.kl.sum()),
    )
