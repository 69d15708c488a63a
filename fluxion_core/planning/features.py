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

from fluxion_core.planning.head_profile import BUDGETS
from fluxion_core.planning.prompt_profile import PromptProfile

CLIP = 60.0
"""Features are clipped to [-CLIP, CLIP]: empty sets have an lse of minus infinity."""

SMALL_BUDGET = BUDGETS.index(1 / 32)


@dataclass(frozen=True)
class Feature:
    """Name, group and meaning of one feature."""

    name: str
    group: str
    meaning: str


_GROUPS: dict[str, dict[str, str]] = {
    "structure": {
        "layer_depth": "layer / (layers - 1)",
        "region_length": "log2 of the tokens of the retrieval region",
        "prior_nothing": "log mean squared error of this head at budget 0 in training",
        "prior_small": "the same at budget 1/32, block size 16",
        "prior_growth": "growth of the latter's log from block size 16 to 128, a third of it",
    },
    "kv_distribution": {
        "key_scale": "log of the root mean square norm of the prompt's keys",
        "key_mean_share": "norm of the mean key / root mean square norm",
        "value_scale": "log of the root mean square norm of the prompt's values",
        "value_mean_share": "norm of the mean value / root mean square norm",
        "sink_value_scale": "log of the first token's value norm / root mean square norm",
    },
    "qk_interaction": {
        "query_scale": "log of the query's norm / sqrt(head_dim)",
        "window_lse": "lse of the default window",
        "bound_1st": "highest bound of a 128-token block",
        "bound_2nd": "second highest",
        "bound_4th": "fourth highest",
        "bound_lse": "log of the sum over blocks of 128 exp(bound)",
        "bound_mean": "mean bound",
        "bound_deviation": "standard deviation of the bounds",
    },
    "output_contribution": {
        "window_output_share": "log of the window output's norm / the largest of the layer's heads",
        "window_output_scale": "log of the window output's norm / root mean square value norm",
        "sink_mass": "log share of the first 16 tokens in the window's attention",
        "recent_mass": "log share of the last, possibly incomplete, 16-token block",
        "window_peak": "log of the largest share of one token in the window's attention",
    },
    "query_dynamics": {
        "query_cosine": "cosine to the previous step's query of this head",
        "query_change": "norm of the query's change / its norm",
        "window_lse_change": "change of the window's lse since the previous step",
        "bound_change": "change of the highest bound since the previous step",
        "read_mass": "log of region mass that the previous step read / window mass",
        "read_share": "log2 of the share of the region it read, plus 1/1024",
    },
    "prefill_estimate": {
        "estimate_nothing": "log mean squared error at budget 0 over the prompt's last queries",
        "estimate_nothing_worst": "log largest squared error at budget 0 over them",
        "estimate_small": "log mean squared error at budget 1/32, block size 16, over them",
        "estimate_small_worst": "log largest over them",
        "estimate_mass": "mean log of region mass / window mass over them",
        "estimate_mass_worst": "largest over them",
        "bound_excess": "bound_lse minus its mean over them",
        "bound_1st_excess": "bound_1st minus its largest over them",
    },
    "cross_head": {
        "group_bound": "highest bound_1st of the heads that share the KV head",
        "layer_bound": "highest bound_1st of the layer's heads",
        "layer_bound_lse": "mean bound_lse of the layer's heads",
        "bound_rank": "share of the layer's heads with a higher bound_lse",
    },
}

FEATURES = tuple(
    Feature(name, group, meaning)
    for group, members in _GROUPS.items()
    for name, meaning in members.items()
)
GROUPS = tuple(_GROUPS)
PRIORS = slice(2, 5)
"""Where the priors lie, which are fitted with the weights and not observed."""

NUM_FEATURES = len(FEATURES)
assert NUM_FEATURES == 41


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

    norm = torch.linalg.vector_norm(seen.window_output, dim=-1).clamp(min=1e-20)
    query_norm = torch.linalg.vector_norm(seen.query, dim=-1).clamp(min=1e-20)
    memory = seen.memory
    known = memory.is_known[:, None]
    change = torch.linalg.vector_norm(seen.query - memory.query, dim=-1) / query_norm
    dot = (seen.query * memory.query).sum(-1)
    memory_norm = torch.linalg.vector_norm(memory.query, dim=-1).clamp(min=1e-20)
    bound_1st = best[..., 0] + seen.window_lse

    grouped_1st = best[..., 0].view(rows, -1, group)
    priors = seen.priors if seen.priors.numel() else torch.zeros(heads, 3, device=device)
    estimate = seen.profiles
    columns = [
        everywhere(seen.layer / max(1, seen.num_layers - 1)),
        torch.log2(seen.region_tokens.float().clamp(min=1))[:, None].expand(rows, heads),
        *priors[None].expand(rows, heads, 3).unbind(-1),
        *kv.unbind(-1),
        torch.log(query_norm / math.sqrt(head_dim)),
        seen.window_lse,
        best[..., 0],
        best[..., 1],
        best[..., 3],
        bound_lse,
        mean,
        variance.sqrt(),
        torch.log(norm / norm.amax(dim=1, keepdim=True)),
        torch.log(norm) - kv[..., 2],
        seen.sink_lse - seen.window_lse,
        seen.recent_lse - seen.window_lse,
        seen.window_peak - seen.window_lse,
        torch.where(known, dot / (query_norm * memory_norm), 0.0),
        torch.where(known, change, 0.0),
        torch.where(known, seen.window_lse - memory.window_lse, 0.0),
        torch.where(known, bound_1st - memory.bound_1st, 0.0),
        torch.where(known, memory.read_lse - memory.window_lse, -CLIP),
        torch.where(known, torch.log2(memory.read_share + 1 / 1024), -10.0),
        estimate.log_squares[:, :, 0, 0],
        estimate.worst_log_squares[..., 0],
        estimate.log_squares[:, :, 0, SMALL_BUDGET],
        estimate.worst_log_squares[..., 1],
        *estimate.region_mass.unbind(-1),
        bound_lse - estimate.bounds[..., 0],
        best[..., 0] - estimate.bounds[..., 1],
        per_kv_head(grouped_1st.amax(-1)),
        best[..., 0].amax(dim=1, keepdim=True).expand(rows, heads),
        bound_lse.mean(dim=1, keepdim=True).expand(rows, heads),
        (bound_lse[:, None, :] > bound_lse[:, :, None]).float().mean(-1),
    ]
    return torch.stack(columns, dim=-1).clamp(-CLIP, CLIP)


def kv_distribution(key: Tensor, value: Tensor) -> Tensor:
    """The features of that group, of a prompt.

    Args:
        key: [kv_heads, tokens, head_dim], rotary applied.
        value: like key.

    Returns:
        [kv_heads, 5] float32.
    """
    key, value = key.float(), value.float()
    tiny = 1e-20
    key_scale, value_scale = (
        (torch.linalg.vector_norm(x, dim=(1, 2)) / math.sqrt(x.shape[1])).clamp(min=tiny)
        for x in (key, value)
    )
    first = torch.linalg.vector_norm(value[:, 0], dim=-1).clamp(min=tiny)
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
