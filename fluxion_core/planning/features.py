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
    """What one layer remembers of the previous step. Rows without one have `is_known` false."""

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
    """What is known of one layer before its retrieval is planned. Rows are sequences. float32."""

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


def features(seen: StepObservation) -> Tensor:
    """[rows, heads, NUM_FEATURES] float32, in the order of FEATURES; not standardised."""
    rows, heads, head_dim = seen.query.shape
    group = heads // seen.num_kv_heads
    device = seen.query.device

    def per_kv_head(values: Tensor) -> Tensor:
        return values.repeat_interleave(group, dim=1)

    def everywhere(value: float) -> Tensor:
        return torch.full((rows, heads), value, device=device)

    kv = per_kv_head(seen.profiles.kv)
    bounds = seen.bounds - seen.window_lse[..., None]
    best = torch.topk(bounds, min(4, bounds.shape[-1]), dim=-1).values
    best = torch.nn.functional.pad(best, (0, 4 - best.shape[-1]), value=-math.inf).clamp(
        -CLIP, CLIP
    )
    is_block = torch.isfinite(seen.bounds)
    count = is_block.sum(-1).clamp(min=1)
    mean = torch.where(is_block, bounds, 0.0).sum(-1) / count
    variance = torch.where(is_block, (bounds - mean[..., None]) ** 2, 0.0).sum(-1) / count
    bound_lse = (torch.logsumexp(bounds, dim=-1) + math.log(128)).clamp(-CLIP, CLIP)

    norm = torch.linalg.vector_norm(seen.window_output, dim=-1).clamp(min=TINY)
    query_norm = torch.linalg.vector_norm(seen.query, dim=-1).clamp(min=TINY)
    memory = seen.memory
    known = memory.is_known[:, None]
    change = torch.linalg.vector_norm(seen.query - memory.query, dim=-1) / query_norm
    dot = (seen.query * memory.query).sum(-1)
    memory_norm = torch.linalg.vector_norm(memory.query, dim=-1).clamp(min=TINY)
    bound_1st = best[..., 0] + seen.window_lse

    grouped_1st = best[..., 0].view(rows, -1, group)
    priors = seen.priors if seen.priors.numel() else torch.zeros(heads, NUM_PRIORS, device=device)
    estimate = seen.profiles
    columns = {
        "layer_depth": everywhere(seen.layer / max(1, seen.num_layers - 1)),
        "region_length": torch.log2(seen.region_tokens.float().clamp(min=1))[:, None].expand(
            rows, heads
        ),
        "prior_nothing": priors[None, :, 0].expand(rows, heads),
        "prior_small": priors[None, :, 1].expand(rows, heads),
        "prior_growth": priors[None, :, 2].expand(rows, heads),
        **dict(zip(FEATURE_GROUPS["kv_distribution"], kv.unbind(-1), strict=True)),
        "query_scale": torch.log(query_norm / math.sqrt(head_dim)),
        "window_lse": seen.window_lse,
        "bound_1st": best[..., 0],
        "bound_2nd": best[..., 1],
        "bound_4th": best[..., 3],
        "bound_lse": bound_lse,
        "bound_mean": mean,
        "bound_deviation": variance.sqrt(),
        "window_output_share": torch.log(norm / norm.amax(dim=1, keepdim=True)),
        "window_output_scale": torch.log(norm) - kv[..., 2],
        "sink_mass": seen.sink_lse - seen.window_lse,
        "recent_mass": seen.recent_lse - seen.window_lse,
        "window_peak": seen.window_peak - seen.window_lse,
        "query_cosine": torch.where(known, dot / (query_norm * memory_norm), 0.0),
        "query_change": torch.where(known, change, 0.0),
        "window_lse_change": torch.where(known, seen.window_lse - memory.window_lse, 0.0),
        "bound_change": torch.where(known, bound_1st - memory.bound_1st, 0.0),
        "read_mass": torch.where(known, memory.read_lse - memory.window_lse, -CLIP),
        "read_share": torch.where(known, torch.log2(memory.read_share + 1 / 1024), NO_SHARE_LOG2),
        "estimate_nothing": estimate.log_squares[:, :, 0, 0],
        "estimate_nothing_worst": estimate.worst_log_squares[..., 0],
        "estimate_small": estimate.log_squares[:, :, 0, SMALL_BUDGET],
        "estimate_small_worst": estimate.worst_log_squares[..., 1],
        "estimate_mass": estimate.region_mass[..., 0],
        "estimate_mass_worst": estimate.region_mass[..., 1],
        "bound_excess": bound_lse - estimate.bounds[..., 0],
        "bound_1st_excess": best[..., 0] - estimate.bounds[..., 1],
        "group_bound": per_kv_head(grouped_1st.amax(-1)),
        "layer_bound": best[..., 0].amax(dim=1, keepdim=True).expand(rows, heads),
        "layer_bound_lse": bound_lse.mean(dim=1, keepdim=True).expand(rows, heads),
        "bound_rank": (bound_lse[:, None, :] > bound_lse[:, :, None]).float().mean(-1),
    }
    return torch.stack([columns[name] for name in FEATURE_NAMES], dim=-1).clamp(-CLIP, CLIP)


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
