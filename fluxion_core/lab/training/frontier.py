"""The curve of KL over bytes, as figures: one row a way, and what a policy needs at equal KL."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from fluxion_core.lab.training.curve import FixedMethod, Method, MethodResult, PlannedMethod, join

REFERENCE = FixedMethod(0, 0.05)
"""fixed(16, 5 %): the baseline of the paper, and the unit of bytes here."""

THRESHOLDS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.8)
PRICES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
NETWORK = "network"
"""Name of the network's decisions."""


def standard_ways(direct_thresholds: Sequence[float]) -> list[Method]:
    """Fixed budgets; threshold and marginal from the oracle, the network and prefill alone."""
    ways: list[Method] = [REFERENCE]
    ways += [FixedMethod(0, 0.02), FixedMethod(0, 0.1), FixedMethod(1, 0.05), FixedMethod(2, 0.1)]
    for source in ("oracle", NETWORK, "prefill"):
        if source != "prefill":
            ways += [PlannedMethod("threshold", number, source) for number in THRESHOLDS]
        ways += [PlannedMethod("marginal", number, source) for number in PRICES]
    ways += [PlannedMethod("direct", number, f"direct {number:g}") for number in direct_thresholds]
    return ways


@dataclass(frozen=True)
class MethodFigure:
    """One way over all steps."""

    way: str
    family: str
    """The policy and where its decisions come from."""
    relative_bytes: float
    """Bytes read / those of the reference."""
    mean_kl: float
    """nats."""
    kl_standard_error: float
    same_token: float
    """Share of steps with exact attention's most likely token."""
    scanned: float
    """Bytes of digests, as a share of the region's KV."""
    attended: float
    """Bytes of K and V, likewise."""
    streaming: float
    """Share of heads that read nothing."""


def family(way: Method) -> str:
    """Name of a way's line in the plot."""
    if isinstance(way, FixedMethod):
        return "fixed"
    return "direct" if way.policy == "direct" else f"{way.policy}, {way.source}"


def figures(documents: Sequence[Mapping[Method, MethodResult]]) -> list[MethodFigure]:
    """Every way, over the steps of all documents."""
    joined = {way: join([results[way] for results in documents]) for way in documents[0]}
    unit = float(joined[REFERENCE].share.mean())
    return [
        MethodFigure(
            way=str(way),
            family=family(way),
            relative_bytes=float(result.share.mean()) / unit,
            mean_kl=float(result.kl.mean()),
            kl_standard_error=float(result.kl.std() / math.sqrt(result.kl.numel())),
            same_token=float(result.agrees.float().mean()),
            scanned=float(result.scanned.mean()),
            attended=float(result.attended.mean()),
            streaming=float(result.streaming.mean()),
        )
        for way, result in joined.items()
    ]


def bytes_at_kl(points: Sequence[tuple[float, float]], kl: float) -> float:
    """Bytes at which a line reaches a KL, between its points on logarithmic axes; NaN outside.

    Args:
        points: (bytes, KL) of one family.
        kl: nats.
    """
    ordered = sorted(points, key=lambda point: point[1])
    for (bytes_low, kl_low), (bytes_high, kl_high) in pairwise(ordered):
        if kl_low <= kl <= kl_high:
            place = (math.log(kl) - math.log(kl_low)) / (math.log(kl_high) - math.log(kl_low))
            return math.exp((1 - place) * math.log(bytes_low) + place * math.log(bytes_high))
    return math.nan


def relative_bytes_at_reference(
    documents: Sequence[Mapping[Method, MethodResult]], *, resamples: int = 400, seed: int = 0
) -> dict[str, tuple[float, float, float]]:
    """Per family, bytes at the reference's KL, with a 95 % interval over documents.

    Args:
        documents: results of each.
        resamples: of the bootstrap; documents are drawn with replacement.
        seed: of the draws.
    """
    ways = list(documents[0])
    kl = torch.stack([torch.stack([d[way].kl.double().mean() for way in ways]) for d in documents])
    share = torch.stack(
        [torch.stack([d[way].share.double().mean() for way in ways]) for d in documents]
    )
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(0, len(documents), (resamples, len(documents)), generator=generator)
    families = sorted({family(way) for way in ways} - {"fixed"})
    found = {}
    for name in families:
        members = [index for index, way in enumerate(ways) if family(way) == name]
        reference = ways.index(REFERENCE)

        def at(
            kl_of: Tensor, bytes_of: Tensor, m: list[int] = members, r: int = reference
        ) -> float:
            points = [(float(bytes_of[i] / bytes_of[r]), float(kl_of[i])) for i in m]
            return bytes_at_kl(points, float(kl_of[r]))

        values = [at(kl[draw].mean(0), share[draw].mean(0)) for draw in draws]
        inside = torch.tensor([value for value in values if not math.isnan(value)])
        low, high = (
            (float(inside.quantile(0.025)), float(inside.quantile(0.975)))
            if len(inside)
            else (math.nan, math.nan)
        )
        found[name] = (at(kl.mean(0), share.mean(0)), low, high)
    return found
