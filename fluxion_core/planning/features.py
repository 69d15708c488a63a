"""The 41 features of a query head at one decode step.

In the paper's seven groups (arXiv:2605.07719), whose members it does not publish; what each is, is
ours. All are cheap: they come from the query, from attention over the default window, which is
computed anyway, from one scan of the 128-token digests (0.8 % of the region's bytes, which are
counted), from what the previous step read, and from what prefill saw of the prompt's last queries.
None scans the KV.

Logarithms are natural; logits are scaled by 1 / sqrt(head_dim). "Bound" is the digest's upper bound
of a block's best logit, minus the window's lse: above 0, a block might outweigh the window.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from fluxion_core.planning.constants import (
    CLIP,
    FEATURE_GROUPS,
    FEATURE_NAMES,
    FIRST_PRIOR,
    NO_SHARE_LOG2,
    NUM_PRIORS,
    SMALL_BUDGET,
    TINY,
)
from fluxion_core.planning.prompt_profile import PromptProfile


@dataclass(frozen=True)
class Feature:
    """Name, group and meaning of one feature."""

    name: str
    group: str
    meaning: str


FEATURES = tuple(
    Feature(name, group, meaning)
    for group, members in FEATURE_GROUPS.items()
    for name, meaning in members.items()
)
GROUPS = tuple(FEATURE_GROUPS)
PRIORS = slice(FIRST_PRIOR, FIRST_PRIOR + NUM_PRIORS)
"""Where the priors lie, which are fitted with the weights and not observed."""


@dataclass(frozen=True)
class StepMemory:
    """Memory of one layer of the previous step. Rows without one have `is_known` false."""

    is_known: Tensor
    """[rows] bool."""
    query: Tensor
    """[rows, heads, head_dim]."""
    window_lse: Tensor
    """[rows, heads]."""
    bound_1st: Tensor
    """[rows, heads], before the window's lse is subtracted."""
    read_lse: Tensor
    """[rows, heads]: of what was read of the region; -inf for nothing."""
    read_share: Tensor
    """[rows, heads]: share of the region that was read."""


@dataclass(frozen=True)
class StepObservation:
    """One layer as it is known before its retrieval is planned. Rows are sequences. float32."""

    layer: int
    num_layers: int
    num_kv_heads: int
    region_tokens: Tensor
    """[rows]."""
    query: Tensor
    """[rows, heads, head_dim], unscaled."""
    window_output: Tensor
    """[rows, heads, head_dim], normalised."""
    window_lse: Tensor
    """[rows, heads]."""
    sink_lse: Tensor
    """[rows, heads]: lse of the first 16 tokens."""
    recent_lse: Tensor
    """[rows, heads]: lse of the sequence's last 16-token block, from its first token on."""
    window_peak: Tensor
    """[rows, heads]: highest logit in the window."""
    bounds: Tensor
    """[rows, heads, blocks]: of the 128-token blocks that touch the region; -inf elsewhere."""
    profiles: PromptProfile
    """With a leading dimension of rows in every tensor."""
    memory: StepMemory
    priors: Tensor = field(default_factory=lambda: torch.zeros(0))
    """[heads, 3] of this layer; empty for zeros."""

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.query.shape[1] // self.num_kv_heads


def features(seen: StepObservation) -> Tensor:
    """[rows, heads, NUM_FEATURES] float32, in the order of FEATURES; not standardised."""
    kv = seen.profiles.kv.repeat_interleave(seen.group, dim=1)
    bounds = _read_bounds(seen)
    columns = {
        **_structure(seen),
        **dict(zip(FEATURE_GROUPS["kv_distribution"], kv.unbind(-1), strict=True)),
        **_qk_interaction(seen, bounds),
        **_output_contribution(seen, value_scale=kv[..., 2]),
        **_query_dynamics(seen, bounds),
        **_prefill_estimate(seen.profiles, bounds),
        **_cross_head(seen, bounds),
    }
    return torch.stack([columns[name] for name in FEATURE_NAMES], dim=-1).clamp(-CLIP, CLIP)


class _Bounds(NamedTuple):
    """Bounds of a head's 128-token blocks, less the window's lse. Each [rows, heads]."""

    best: Tensor
    """[rows, heads, 4]: the highest ones."""
    lse: Tensor
    """Of all keys, if each had its block's bound."""
    mean: Tensor
    variance: Tensor


def _read_bounds(seen: StepObservation) -> _Bounds:
    bounds = seen.bounds - seen.window_lse[..., None]
    best = torch.topk(bounds, min(4, bounds.shape[-1]), dim=-1).values
    best = torch.nn.functional.pad(best, (0, 4 - best.shape[-1]), value=-math.inf).clamp(
        -CLIP, CLIP
    )
    is_block = torch.isfinite(seen.bounds)
    count = is_block.sum(-1).clamp(min=1)
    mean = torch.where(is_block, bounds, 0.0).sum(-1) / count
    variance = torch.where(is_block, (bounds - mean[..., None]) ** 2, 0.0).sum(-1) / count
    lse = (torch.logsumexp(bounds, dim=-1) + math.log(128)).clamp(-CLIP, CLIP)
    return _Bounds(best, lse, mean, variance)


def _structure(seen: StepObservation) -> dict[str, Tensor]:
    rows, heads, _ = seen.query.shape
    device = seen.query.device
    depth = seen.layer / max(1, seen.num_layers - 1)
    length = torch.log2(seen.region_tokens.float().clamp(min=1))
    priors = seen.priors if seen.priors.numel() else torch.zeros(heads, NUM_PRIORS, device=device)
    return {
        "layer_depth": torch.full((rows, heads), depth, device=device),
        "region_length": length[:, None].expand(rows, heads),
        "prior_nothing": priors[None, :, 0].expand(rows, heads),
        "prior_small": priors[None, :, 1].expand(rows, heads),
        "prior_growth": priors[None, :, 2].expand(rows, heads),
    }


def _qk_interaction(seen: StepObservation, bounds: _Bounds) -> dict[str, Tensor]:
    return {
        "query_scale": torch.log(_norm(seen.query) / math.sqrt(seen.query.shape[-1])),
        "window_lse": seen.window_lse,
        "bound_1st": bounds.best[..., 0],
        "bound_2nd": bounds.best[..., 1],
        "bound_4th": bounds.best[..., 3],
        "bound_lse": bounds.lse,
        "bound_mean": bounds.mean,
        "bound_deviation": bounds.variance.sqrt(),
    }


def _output_contribution(seen: StepObservation, *, value_scale: Tensor) -> dict[str, Tensor]:
    norm = _norm(seen.window_output)
    return {
        "window_output_share": torch.log(norm / norm.amax(dim=1, keepdim=True)),
        "window_output_scale": torch.log(norm) - value_scale,
        "sink_mass": seen.sink_lse - seen.window_lse,
        "recent_mass": seen.recent_lse - seen.window_lse,
        "window_peak": seen.window_peak - seen.window_lse,
    }


def _query_dynamics(seen: StepObservation, bounds: _Bounds) -> dict[str, Tensor]:
    memory = seen.memory
    known = memory.is_known[:, None]
    query_norm = _norm(seen.query)
    change = torch.linalg.vector_norm(seen.query - memory.query, dim=-1) / query_norm
    dot = (seen.query * memory.query).sum(-1)
    bound_1st = bounds.best[..., 0] + seen.window_lse
    return {
        "query_cosine": torch.where(known, dot / (query_norm * _norm(memory.query)), 0.0),
        "query_change": torch.where(known, change, 0.0),
        "window_lse_change": torch.where(known, seen.window_lse - memory.window_lse, 0.0),
        "bound_change": torch.where(known, bound_1st - memory.bound_1st, 0.0),
        "read_mass": torch.where(known, memory.read_lse - memory.window_lse, -CLIP),
        "read_share": torch.where(known, torch.log2(memory.read_share + 1 / 1024), NO_SHARE_LOG2),
    }


def _prefill_estimate(estimate: PromptProfile, bounds: _Bounds) -> dict[str, Tensor]:
    return {
        "estimate_nothing": estimate.log_squares[:, :, 0, 0],
        "estimate_nothing_worst": estimate.worst_log_squares[..., 0],
        "estimate_small": estimate.log_squares[:, :, 0, SMALL_BUDGET],
        "estimate_small_worst": estimate.worst_log_squares[..., 1],
        "estimate_mass": estimate.region_mass[..., 0],
        "estimate_mass_worst": estimate.region_mass[..., 1],
        "bound_excess": bounds.lse - estimate.bounds[..., 0],
        "bound_1st_excess": bounds.best[..., 0] - estimate.bounds[..., 1],
    }


def _cross_head(seen: StepObservation, bounds: _Bounds) -> dict[str, Tensor]:
    rows, heads, _ = seen.query.shape
    bound_1st, lse = bounds.best[..., 0], bounds.lse
    of_group = bound_1st.view(rows, -1, seen.group).amax(-1)
    return {
        "group_bound": of_group.repeat_interleave(seen.group, dim=1),
        "layer_bound": bound_1st.amax(dim=1, keepdim=True).expand(rows, heads),
        "layer_bound_lse": lse.mean(dim=1, keepdim=True).expand(rows, heads),
        "bound_rank": (lse[:, None, :] > lse[:, :, None]).float().mean(-1),
    }


def _norm(vectors: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(vectors, dim=-1)
    return norms.clamp(min=TINY)


def kv_distribution(key: Tensor, value: Tensor) -> Tensor:
    """The features of that group, of a prompt.

    Args:
        key: [kv_heads, tokens, head_dim], rotary applied.
        value: like key.

    Returns:
        [kv_heads, 5] float32.
    """
    key, value = key.float(), value.float()
    key_scale, value_scale = (
        (torch.linalg.vector_norm(x, dim=(1, 2)) / math.sqrt(x.shape[1])).clamp(min=TINY)
        for x in (key, value)
    )
    first = torch.linalg.vector_norm(value[:, 0], dim=-1).clamp(min=TINY)
    return torch.stack(
        (
            torch.log(key_scale),
            torch.linalg.vector_norm(key.mean(1), dim=-1) / key_scale,
            torch.log(value_scale),
            torch.linalg.vector_norm(value.mean(1), dim=-1) / value_scale,
            torch.log(first / value_scale),
        ),
        dim=-1,
    )
