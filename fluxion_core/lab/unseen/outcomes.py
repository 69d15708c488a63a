"""Outcomes of curves: bytes that their plans read in a trace, and the squared errors that are left.

Plans are chosen by torch's own selector, errors are those that the trace holds, and a group's bytes
are the true union of its heads' blocks and the digests that were scanned. Heads weigh the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from fluxion_core.geometry import BLOCK_SIZES
from fluxion_core.lab.unseen.traces import STEPS, Trace
from fluxion_core.planning.choice_reference import GroupPlans, by_price, by_threshold
from fluxion_core.planning.constants import BUDGETS
from fluxion_core.planning.cost_model import COARSE_LEVEL, CostModel, digest_share

PRICES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
THRESHOLDS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.8)

_GRID = (*BUDGETS, 1.0)

_TINY = 1e-9
"""For 0, on logarithmic axes."""


@dataclass(frozen=True)
class Point:
    """Mean over a trace's steps, layers and heads."""

    square: float
    """Squared head output error."""
    share: float
    """Bytes of digests, K and V / bytes of the region's KV."""


@dataclass(frozen=True)
class Outcome:
    """One rule on one text."""

    fixed: Point
    """fixed(16, 5 %) on the same steps."""
    points: tuple[Point, ...]
    """Of each number of the rule."""


def outcome(
    trace: Trace,
    curves: Tensor | Callable[[float], Tensor],
    policy: str = "price",
    *,
    scans_coarse: bool = True,
) -> Outcome:
    """Outcome of curves at all numbers of a policy.

    Args:
        trace: of the steps.
        curves: [steps, layers, heads, levels, len(BUDGETS)]: log squared errors to choose by; or
            what gives them for a number.
        policy: price or threshold.
        scans_coarse: whether every group's 128-token digests count, as they do when serving.
    """
    points = []
    for number in PRICES if policy == "price" else THRESHOLDS:
        known = curves if isinstance(curves, Tensor) else curves(number)
        plans = choose(trace, known, policy, number)
        points.append(read(trace, plans, scans_coarse=scans_coarse))
    return Outcome(fixed_point(trace), tuple(points))


def choose(trace: Trace, curves: Tensor, policy: str, number: float) -> GroupPlans:
    """Plans by curves, [steps * layers] rows of them."""
    rows = torch.unflatten(curves.flatten(0, 1), 1, (trace.kv_heads, -1))
    by = by_price if policy == "price" else by_threshold
    return by(rows, torch.full((rows.shape[0],), number), CostModel())


def fixed_point(trace: Trace) -> Point:
    """The mean over the steps of fixed(16, 5 %)."""
    share = trace.fixed_union.mean() + digest_share(0)
    return Point(float(trace.fixed_square.mean()), float(share))


def read(trace: Trace, plans: GroupPlans, *, scans_coarse: bool = True) -> Point:
    """Read what plans of [steps * layers] rows say."""
    steps, layers, heads = trace.fixed_square.shape
    levels = plans.levels.view(steps, layers, trace.kv_heads)
    budgets = plans.budgets.view(steps, layers, heads)
    of_head = levels.clamp(min=0).repeat_interleave(heads // trace.kv_heads, 2)
    squares = trace.logs[STEPS].float().exp()
    squares = torch.cat((squares, torch.zeros_like(squares[..., :1])), -1)
    where = of_head[..., None, None].expand(-1, -1, -1, 1, len(_GRID))
    index = torch.searchsorted(torch.tensor(_GRID), budgets.contiguous())[..., None]
    # Who reads nothing has budget 0, which is the same at every level.
    left = squares.gather(3, where).squeeze(3).gather(-1, index)
    share = float(_bytes(trace, levels, budgets).mean())
    return Point(float(left.mean()), share + scans_coarse * digest_share(COARSE_LEVEL))


def _bytes(trace: Trace, levels: Tensor, budgets: Tensor) -> Tensor:
    """[steps, layers, kv_heads]: union of the heads' blocks, and digests beside the coarsest."""
    first = 0
    shares = torch.zeros(levels.shape)
    finest = trace.ranks.shape[-1] * BLOCK_SIZES[-1] // sum(BLOCK_SIZES)
    blocks = [finest >> level for level in range(len(BLOCK_SIZES))]
    region = trace.weights[:, : blocks[0]].sum(-1)[:, None, None]
    for level, count in enumerate(blocks):
        part = slice(first, first + count)
        first += count
        counts = torch.ceil(budgets * trace.totals[:, level, None, None] * (1 - 1e-6))
        chosen = trace.ranks[..., part] < counts[..., None]
        union = torch.unflatten(chosen, 2, (trace.kv_heads, -1)).any(3).float()
        tokens = torch.einsum("slkb,sb->slk", union, trace.weights[:, part])
        total = tokens / region + CostModel().scan(level)
        shares = torch.where(levels == level, total, shares)
    return shares


@dataclass(frozen=True)
class Gain:
    """A rule over several texts; each figure with its 95 % interval over texts."""

    bytes_at_fixed_error: tuple[float, float, float]
    """Relative to those of fixed(16, 5 %)."""
    error_at_half_bytes: tuple[float, float, float]
    """Squared error at half of fixed's bytes / fixed's."""
    line: list[tuple[float, float]]
    """Bytes and squared error over all texts, each over fixed's."""
    of_texts: dict[str, tuple[float, float]]
    """The first two of each text alone."""

    def as_json(self) -> dict[str, object]:
        """All fields; null where a figure lies beyond the prices that were tried."""

        def known(numbers: Sequence[float]) -> list[float | None]:
            return [None if math.isnan(number) else number for number in numbers]

        return {
            "bytes_at_fixed_error": known(self.bytes_at_fixed_error),
            "error_at_half_bytes": known(self.error_at_half_bytes),
            "line": self.line,
            "of_texts": {text: known(figures) for text, figures in self.of_texts.items()},
        }


def gain(outcomes: Mapping[str, Outcome], *, resamples: int = 400, seed: int = 0) -> Gain:
    """Gain of a rule.

    Args:
        outcomes: by text.
        resamples: of the bootstrap; texts are drawn with replacement.
        seed: of the draws.
    """
    each = list(outcomes.values())
    fixed = torch.tensor([[o.fixed.share, o.fixed.square] for o in each])
    points = torch.tensor([[[p.share, p.square] for p in o.points] for o in each])

    def line(draw: Tensor) -> list[tuple[float, float]]:
        relative = points[draw].mean(0) / fixed[draw].mean(0)
        return [(float(share), float(square)) for share, square in relative]

    def of(draw: Tensor) -> tuple[float, float]:
        drawn = line(draw)
        return between([(square, share) for share, square in drawn], 1.0), between(drawn, 0.5)

    generator = torch.Generator().manual_seed(seed)
    count = len(each)
    draws = torch.randint(0, count, (resamples, count), generator=generator)
    drawn = torch.tensor([of(draw) for draw in draws])
    edges = torch.nanquantile(drawn, torch.tensor([0.025, 0.975]), dim=0).T.tolist()
    whole = torch.arange(count)
    first, second = (
        (middle, low, high) for middle, (low, high) in zip(of(whole), edges, strict=True)
    )
    of_texts = {name: of(torch.tensor([number])) for number, name in enumerate(outcomes)}
    return Gain(first, second, line(whole), of_texts)


def between(points: Sequence[Sequence[float]], place: float) -> float:
    """Second coordinate where the first is `place`, on logarithmic axes; NaN outside of them."""
    ordered = sorted((math.log(max(x, _TINY)), math.log(max(y, _TINY))) for x, y in points)
    at = math.log(place)
    for (x_low, y_low), (x_high, y_high) in pairwise(ordered):
        if x_low <= at <= x_high and x_high > x_low:
            return math.exp(y_low + (y_high - y_low) * (at - x_low) / (x_high - x_low))
    return math.nan
