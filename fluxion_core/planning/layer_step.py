"""Decode steps with full attention at hand: what each head would see, read and lose.

In plain torch, rows of a batch at once, on a GPU or a CPU. It is where labels come from, what
prefill estimates a prompt's needs with, and the truth that predictions are held against. Blocks
are those of the engine: retrieval region, digests, bounds and budgets mean the same.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fluxion_core.geometry import BLOCK_SIZES, BLOCK_TOKENS, WindowSpec
from fluxion_core.planning.constants import (
    BUDGETS,
    CLIP,
    ERROR_FLOOR,
    QUEST_RADII,
    RADII,
    SMALL_BUDGET,
    TINY,
    TINY_MASS,
)
from fluxion_core.planning.features import StepMemory, StepObservation, kv_distribution
from fluxion_core.planning.prompt_profile import PromptProfile, QueryNeeds
from fluxion_core.planning.ranking import block_scores

_ROW_TENSORS = (
    "highest", "mass", "weighted", "region_end", "in_region", "window_mass", "window_sum",
    "region_mass", "full_output", "norm", "window_peak", "sink_mass", "recent_mass", "_query",
)  # fmt: skip


class LayerStep:
    """One layer of decode steps at some positions of a document.

    Args:
        key, value: [kv_heads, tokens, head_dim]: exact KV of the layer.
        query: [rows, heads, head_dim], unscaled.
        own_key, own_value: [rows, kv_heads, head_dim]: of the rows' own tokens.
        positions: [rows] int64.
        window: the default window.
    """

    def __init__(
        self,
        key: Tensor,
        value: Tensor,
        query: Tensor,
        own_key: Tensor,
        own_value: Tensor,
        positions: Tensor,
        window: WindowSpec,
    ) -> None:
        kv_heads, tokens, head_dim = key.shape
        rows, heads, _ = query.shape
        device = key.device
        self.rows, self.kv_heads, self.group = rows, kv_heads, heads // kv_heads
        self.num_blocks = tokens // BLOCK_TOKENS
        q = query.view(rows, kv_heads, self.group, head_dim)
        scale = 1 / math.sqrt(head_dim)
        logits = torch.einsum("nkgd,ktd->nkgt", q, key) * scale
        before = torch.arange(tokens, device=device)[None] < positions[:, None]
        logits.masked_fill_(~before[:, None, None], -math.inf)
        own = torch.einsum("nkgd,nkd->nkg", q, own_key) * scale
        self.highest = torch.maximum(logits.amax(-1), own)
        weights = (logits - self.highest[..., None]).exp_()
        blocks = weights.view(rows, kv_heads, self.group, self.num_blocks, BLOCK_TOKENS)
        self.mass = blocks.sum(-1)
        """[rows, kv_heads, group, blocks]: exp(logits) of each block, relative to `highest`."""
        self.weighted = torch.einsum(
            "nkgbt,kbtd->nkgbd", blocks, value.view(kv_heads, self.num_blocks, BLOCK_TOKENS, -1)
        )
        """[rows, kv_heads, group, blocks, head_dim]: values by these weights."""
        own_weight = (own - self.highest).exp()
        self._find_region(positions, window)
        self._sum_parts(own_weight, own_value)
        window_logits = logits.masked_fill(
            self.in_region.repeat_interleave(BLOCK_TOKENS, 1)[:, None, None], -math.inf
        )
        self.window_peak = torch.maximum(window_logits.amax(-1), own)
        self.sink_mass = self.mass[..., 0]
        last = positions // BLOCK_TOKENS
        where = last.clamp(max=self.num_blocks - 1)[:, None, None, None].expand(
            rows, kv_heads, self.group, 1
        )
        self.recent_mass = self.mass.gather(-1, where)[..., 0] + own_weight
        self._key, self._query, self._scale = key, q, scale
        self._radii: tuple[float, ...] = RADII
        self._bounds: list[Tensor] | None = None

    def _find_region(self, positions: Tensor, window: WindowSpec) -> None:
        device = positions.device
        regions = [window.retrieval_region(length) for length in (positions + 1).tolist()]
        ends = torch.tensor([region.stop for region in regions], device=device) // BLOCK_TOKENS
        self.region_begin, self.region_end = window.sink_tokens // BLOCK_TOKENS, ends
        number = torch.arange(self.num_blocks, device=device)[None]
        self.in_region = (number >= self.region_begin) & (number < ends[:, None])
        """[rows, blocks] bool."""

    def _sum_parts(self, own_weight: Tensor, own_value: Tensor) -> None:
        """Sum over the window, which has the rows' own tokens, and over the region."""
        outside = (~self.in_region)[:, None, None].float()
        self.window_mass = (self.mass * outside).sum(-1) + own_weight
        self.window_sum = (
            torch.einsum("nkgbd,nb->nkgd", self.weighted, outside[:, 0, 0])
            + own_weight[..., None] * own_value[:, :, None]
        )
        inside = self.in_region.float()
        self.region_mass = torch.einsum("nkgb,nb->nkg", self.mass, inside)
        region_sum = torch.einsum("nkgbd,nb->nkgd", self.weighted, inside)
        self.full_output = (self.window_sum + region_sum) / (self.window_mass + self.region_mass)[
            ..., None
        ]
        self.norm = torch.linalg.vector_norm(self.full_output, dim=-1).amax((1, 2)).clamp(min=TINY)
        """[rows]: the largest output norm of the layer's heads."""

    @property
    def query(self) -> Tensor:
        """[rows, kv_heads, group, head_dim], unscaled."""
        return self._query

    @property
    def bounds(self) -> list[Tensor]:
        """Scores of blocks by their digests, see ranking.py.

        Per level [rows, kv_heads, group, blocks of that size]; -inf outside the region.
        """
        if self._bounds is None:
            self._bounds = []
            for level, (low, high) in enumerate(key_digests(self._key)):
                bound = block_scores(self._query, low, high, self._radii[level])
                touches = self._pooled(self.in_region.float(), level) > 0
                self._bounds.append(
                    (bound * self._scale).masked_fill(~touches[:, None, None], -math.inf)
                )
        return self._bounds

    def by_quest(self) -> LayerStep:
        """A copy whose blocks are scored by Quest's bound, as `fixed` policies do."""
        other = copy.copy(self)
        other._radii, other._bounds = QUEST_RADII, None
        return other

    def _pooled(self, blocks: Tensor, level: int) -> Tensor:
        pooled: Tensor = torch.unflatten(blocks, -1, (-1, 1 << level)).sum(-1)
        return pooled

    def num_region_blocks(self, level: int) -> Tensor:
        """[rows]: blocks of a level that touch the region."""
        return (self._pooled(self.in_region.float(), level) > 0).sum(-1)

    def counts(self, budgets: Tensor, level: int) -> Tensor:
        """Blocks for shares of the region; broadcasts over [rows, ...]."""
        total = self.num_region_blocks(level)
        total = total.view(-1, *[1] * (budgets.dim() - 1))
        return torch.ceil(budgets * total * (1 - 1e-6))

    def ranks(self, level: int) -> Tensor:
        """Rank of each block of a level by its bound, 0 for the best. float32."""
        order = self.bounds[level].argsort(dim=-1, descending=True, stable=True)
        ranks = torch.empty_like(order)
        numbers = torch.arange(order.shape[-1], device=order.device).expand_as(order)
        return ranks.scatter_(-1, order, numbers).float()

    def log_squared_errors(self) -> Tensor:
        """Log of the squared head output error: [rows, kv_heads, group, levels, len(BUDGETS)]."""
        shares = torch.tensor(BUDGETS, device=self.mass.device)
        inside = self.in_region.float()
        mass = self.mass * inside[:, None, None]
        weighted = self.weighted * inside[:, None, None, :, None]
        levels = []
        for level in range(len(BLOCK_SIZES)):
            if level:
                mass = torch.unflatten(mass, -1, (-1, 2)).sum(-1)
                weighted = torch.unflatten(weighted, -2, (-1, 2)).sum(-2)
            counts = self.counts(shares[None].expand(self.rows, -1), level)
            chosen = (self.ranks(level)[:, :, :, None] < counts[:, None, None, :, None]).float()
            read = chosen @ weighted
            read_mass = (chosen @ mass[..., None])[..., 0]
            levels.append(self._log_square(read, read_mass))
        return torch.stack(levels, dim=-2)

    def _log_square(self, read: Tensor, read_mass: Tensor) -> Tensor:
        """[..., budgets] from [..., budgets, head_dim] and [..., budgets]."""
        total = (self.window_mass[..., None] + read_mass).clamp(min=TINY_MASS)
        output = (self.window_sum[..., None, :] + read) / total[..., None]
        error = torch.linalg.vector_norm(output - self.full_output[..., None, :], dim=-1)
        return 2 * torch.log((error / self.norm[:, None, None, None]).clamp(min=ERROR_FLOOR))

    def chosen_blocks(self, levels: Tensor, budgets: Tensor) -> Tensor:
        """16-token blocks that each head reads: bool [rows, kv_heads, group, blocks].

        Args:
            levels: [rows, kv_heads]: index into BLOCK_SIZES; others read nothing.
            budgets: [rows, kv_heads, group]: shares of the region.
        """
        chosen = torch.zeros_like(self.mass, dtype=torch.bool)
        for level in range(len(BLOCK_SIZES)):
            here = levels == level
            if not here.any():
                continue
            counts = self.counts(budgets, level)
            blocks = self.ranks(level) < counts[..., None]
            blocks &= here[:, :, None, None]
            chosen |= blocks.repeat_interleave(1 << level, dim=-1)
        return chosen & self.in_region[:, None, None]

    def attend(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Output [rows, heads, head_dim] and lse of what was read [rows, kv_heads, group]."""
        read = torch.einsum("nkgb,nkgbd->nkgd", chosen.float(), self.weighted)
        read_mass = (self.mass * chosen).sum(-1)
        output = (self.window_sum + read) / (self.window_mass + read_mass)[..., None]
        return output.flatten(1, 2), read_mass.log() + self.highest

    def rows_of(self, index: Tensor) -> LayerStep:
        """A copy of some of its rows."""
        part = copy.copy(self)
        part.rows = int(index.shape[0])
        for name in _ROW_TENSORS:
            setattr(part, name, getattr(self, name)[index])
        part._bounds = None if self._bounds is None else [b[index] for b in self._bounds]
        return part

    def observe(
        self,
        layer: int,
        num_layers: int,
        profiles: PromptProfile,
        memory: StepMemory,
        priors: Tensor,
    ) -> StepObservation:
        """Observe these steps as the engine would, before it plans them."""

        def lse(mass: Tensor) -> Tensor:
            return (mass.log() + self.highest).flatten(1)

        return StepObservation(
            layer=layer,
            num_layers=num_layers,
            num_kv_heads=self.kv_heads,
            region_tokens=self.in_region.sum(-1) * BLOCK_TOKENS,
            query=self._query.flatten(1, 2),
            window_output=(self.window_sum / self.window_mass[..., None]).flatten(1, 2),
            window_lse=lse(self.window_mass),
            sink_lse=lse(self.sink_mass),
            recent_lse=lse(self.recent_mass),
            window_peak=self.window_peak.flatten(1),
            bounds=self.bounds[-1].flatten(1, 2),
            profiles=profiles,
            memory=memory,
            priors=priors,
        )

    def remember(self, chosen: Tensor, read_lse: Tensor) -> StepMemory:
        """Memory of these steps, for the next ones.

        Args:
            chosen: bool [rows, kv_heads, group, blocks]: what was read.
            read_lse: [rows, kv_heads, group].
        """
        region = self.in_region.sum(-1).clamp(min=1)[:, None, None]
        return StepMemory(
            is_known=torch.ones(self.rows, dtype=torch.bool, device=chosen.device),
            query=self._query.flatten(1, 2),
            window_lse=(self.window_mass.log() + self.highest).flatten(1),
            bound_1st=self.bounds[-1].flatten(1, 2).amax(-1),
            read_lse=read_lse.flatten(1),
            read_share=(chosen.sum(-1) / region).flatten(1),
        )


def no_memory(rows: int, heads: int, head_dim: int, device: torch.device) -> StepMemory:
    """Memory of a first step: none."""
    zeros = torch.zeros(rows, heads, device=device)
    return StepMemory(
        is_known=torch.zeros(rows, dtype=torch.bool, device=device),
        query=torch.zeros(rows, heads, head_dim, device=device),
        window_lse=zeros,
        bound_1st=zeros,
        read_lse=zeros,
        read_share=zeros,
    )


def key_digests(key: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Lowest and highest key per channel, [kv_heads, blocks, head_dim] each, per block size.

    Args:
        key: [kv_heads, tokens, head_dim]; tokens is a multiple of 128.
    """
    spans = torch.unflatten(key, 1, (-1, BLOCK_TOKENS))
    low, high = spans.amin(2), spans.amax(2)
    digests = [(low, high)]
    for _ in BLOCK_SIZES[1:]:
        low = torch.unflatten(low, 1, (-1, 2)).amin(2)
        high = torch.unflatten(high, 1, (-1, 2)).amax(2)
        digests.append((low, high))
    return digests


def query_needs(step: LayerStep) -> QueryNeeds:
    """Needs of each row of a step. Finite, whatever the region holds."""
    # A window that a far higher logit of the region has rounded away still has some mass.
    window_log = step.window_mass.clamp(min=TINY_MASS).log()
    logs = step.log_squared_errors().flatten(1, 2)
    bounds = step.bounds[-1].flatten(1, 2) - (window_log + step.highest).flatten(1)[..., None]
    bound_lse = torch.logsumexp(bounds, -1) + math.log(BLOCK_SIZES[-1])
    return QueryNeeds(
        log_squares=logs,
        worst_log_squares=torch.stack((logs[..., 0, 0], logs[..., 0, SMALL_BUDGET]), -1),
        region_mass=(step.region_mass.log() - window_log).flatten(1).clamp(-CLIP, CLIP),
        bound_lse=bound_lse.clamp(-CLIP, CLIP),
        bound_1st=bounds.amax(-1).clamp(-CLIP, CLIP),
    )


def profile_prompts(
    step: LayerStep, prompts: int, key: Tensor, value: Tensor, ends: Sequence[int]
) -> PromptProfile:
    """One layer's profiles of prompts that end at several places of one text.

    Args:
        step: rows are the last queries of the first prompt, then of the second, and so on, as many
            of each.
        prompts: how many.
        key, value: [kv_heads, tokens, head_dim]: of the text.
        ends: tokens of each prompt.

    Returns:
        A profile whose tensors have a leading dimension of prompts.
    """
    kv = [kv_distribution(key[:, :end], value[:, :end]) for end in ends]
    return query_needs(step).summarize(prompts, torch.stack(kv))
