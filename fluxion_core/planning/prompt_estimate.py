"""One layer's profile of a prompt, from its last queries and all of its KV; prefill calls it.

What it measures is what `layer_step.LayerStep` does, which is its oracle. It is made to cost a few
percent of a prompt's computing: a KV head at a time, all block sizes in one product, and for long
prompts a few queries at a time, so that it needs little memory beside the KV.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from fluxion_core.errors import ShapeError
from fluxion_core.geometry import BLOCK_SIZES, BLOCK_TOKENS, WindowSpec, ceil_div
from fluxion_core.planning.constants import (
    BUDGETS,
    CLIP,
    ERROR_FLOOR,
    RADII,
    SMALL_BUDGET,
    TINY,
    TINY_MASS,
)
from fluxion_core.planning.features import kv_distribution
from fluxion_core.planning.layer_step import key_digests
from fluxion_core.planning.prompt_profile import PROFILED_QUERIES, PromptProfile, QueryNeeds
from fluxion_core.planning.ranking import score_weights

PART_BYTES = 256 << 20
"""Values weighted block by block that are held at a time: the largest part of the memory needed."""


def padded_tokens(num_tokens: int) -> int:
    """Tokens of the KV that `estimate_prompt` takes: whole blocks of every size."""
    return ceil_div(num_tokens, BLOCK_SIZES[-1]) * BLOCK_SIZES[-1]


def profiled_positions(num_tokens: int) -> range:
    """Positions of the queries that a prompt's profile is made from: its last ones, up to 16."""
    return range(max(0, num_tokens - PROFILED_QUERIES), num_tokens)


class PromptEstimator:
    """Makes profiles of one prompt, layer by layer; keeps its buffers from one to the next.

    Args:
        num_tokens: of the prompt.
        window: the default window of the node that decodes.
        part_bytes: bound on weighted values held at a time; one query is always looked at.
    """

    def __init__(
        self, num_tokens: int, window: WindowSpec, *, part_bytes: int = PART_BYTES
    ) -> None:
        self._num_tokens = num_tokens
        self._window = window
        self._part_bytes = part_bytes
        self._buffers = _Buffers()

    def estimate(self, query: Tensor, key: Tensor, value: Tensor) -> PromptProfile:
        """Estimate what the prompt's last queries would have needed of each head's KV in a layer.

        Every value is finite: without a retrieval region nothing is needed, which is the floor of
        errors, masses and bounds.

        Args:
            query: [rows, heads, head_dim] float32, unscaled; of `profiled_positions(num_tokens)`,
                or of the last of these.
            key: [kv_heads, padded_tokens(num_tokens), head_dim] float32, zeros after the prompt.
            value: like key.

        Raises:
            ShapeError: query or key has another number of rows or tokens.

        Cost: reads the KV about four times; 8 * rows * heads * tokens * head_dim operations.
        """
        rows, heads, head_dim = query.shape
        kv_heads, tokens, _ = key.shape
        positions = profiled_positions(self._num_tokens)
        if not 0 < rows <= len(positions) or tokens != padded_tokens(self._num_tokens):
            raise ShapeError(
                f"query {tuple(query.shape)} and key {tuple(key.shape)} for a prompt of "
                f"{self._num_tokens}; need up to {len(positions)} queries and "
                f"{padded_tokens(self._num_tokens)} keys"
            )
        positions = positions[-rows:]
        group = heads // kv_heads
        grouped = torch.unflatten(query, 1, (kv_heads, group))
        row_bytes = group * (tokens // BLOCK_TOKENS) * head_dim * query.element_size()
        rows_at_once = max(1, self._part_bytes // row_bytes)
        parts = []
        for first in range(0, rows, rows_at_once):
            part = slice(first, first + rows_at_once)
            regions = _Regions.of(positions[part], tokens, self._window, key.device)
            looks = [
                _look(grouped[part, head], key[head], value[head], regions, self._buffers)
                for head in range(kv_heads)
            ]
            parts.append([torch.cat(column, 1) for column in zip(*looks, strict=True)])
        needs = _needs(*(torch.cat(column) for column in zip(*parts, strict=True)))
        kv = kv_distribution(key[:, : self._num_tokens], value[:, : self._num_tokens])
        profile = needs.summarize(1, kv[None])
        return PromptProfile(*(getattr(profile, field.name)[0] for field in fields(PromptProfile)))


class _Buffers:
    """Memory that is used again: new pages would cost a third of the time."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def take(self, name: str, like: Tensor, *shape: int) -> Tensor:
        """A tensor of this shape, with anything in it; the last one of this name is gone."""
        size = math.prod(shape)
        held = self._held.get(name)
        if held is None or held.numel() < size:
            self._held[name] = held = torch.empty(size, dtype=like.dtype, device=like.device)
        return held[:size].view(shape)


def blocks_of_budgets(totals: Tensor) -> Tensor:
    """Blocks that each budget above 0 is: [..., budgets] int64, of so many blocks [...]."""
    shares = torch.tensor(BUDGETS[1:], device=totals.device)
    return torch.ceil(shares * totals[..., None] * (1 - 1e-6)).long()


def _needs(
    errors: Tensor, norms: Tensor, region_mass: Tensor, bound_lse: Tensor, bound_1st: Tensor
) -> QueryNeeds:
    """From what `_look` gives, of all rows and heads."""
    largest = norms.amax(1).clamp(min=TINY)[:, None, None, None]
    logs = 2 * torch.log((errors / largest).clamp(min=ERROR_FLOOR))
    return QueryNeeds(
        log_squares=logs,
        worst_log_squares=torch.stack((logs[..., 0, 0], logs[..., 0, SMALL_BUDGET]), -1),
        region_mass=region_mass,
        bound_lse=bound_lse,
        bound_1st=bound_1st,
    )


@dataclass(frozen=True)
class _Regions:
    """Retrieval regions of some queries, in blocks."""

    hidden: Tensor
    """[rows, last tokens] bool: those that a query does not see; it sees all before them."""
    inside: Tensor
    """[rows, blocks] bool: 16-token blocks of the region."""
    touching: Tensor
    """[rows, blocks of all levels, side by side] bool: blocks that touch the region."""
    counts: Tensor
    """[rows, levels, budgets above 0] int64: blocks that a budget is."""
    spread: Tensor
    """[levels * blocks] int64: for each level and 16-token block, its block among those of all
    levels."""
    surely_inside: tuple[int, int]
    """First 16-token block that is in every row's region, and the one after the last."""

    @staticmethod
    def of(positions: range, tokens: int, window: WindowSpec, device: torch.device) -> _Regions:
        regions = [window.retrieval_region(position + 1) for position in positions]
        blocks = torch.arange(tokens // BLOCK_TOKENS, device=device) * BLOCK_TOKENS
        begin, end = (
            torch.tensor([getattr(region, edge) for region in regions], device=device)[:, None]
            for edge in ("start", "stop")
        )
        inside = (blocks >= begin) & (blocks < end)
        levels = [
            torch.unflatten(inside, 1, (-1, 1 << level)).any(-1)
            for level in range(len(BLOCK_SIZES))
        ]
        begins = [sum(level.shape[1] for level in levels[:number]) for number in range(len(levels))]
        totals = torch.stack([level.sum(-1) for level in levels], 1)
        numbers = torch.arange(positions.start, tokens, device=device)
        last = torch.tensor(list(positions), device=device)[:, None]
        return _Regions(
            hidden=numbers > last,
            inside=inside,
            touching=torch.cat(levels, 1),
            spread=torch.cat(
                [
                    begin + (torch.arange(inside.shape[1], device=device) >> level)
                    for level, begin in enumerate(begins)
                ]
            ),
            surely_inside=(
                max(region.start for region in regions) // BLOCK_TOKENS,
                min(region.stop for region in regions) // BLOCK_TOKENS,
            ),
            counts=blocks_of_budgets(totals),
        )


def _look(
    query: Tensor, key: Tensor, value: Tensor, regions: _Regions, buffers: _Buffers
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What one KV head's group would have lost and seen.

    Args:
        query: [rows, group, head_dim].
        key, value: [tokens, head_dim].
        regions: of the rows.
        buffers: for what is large.

    Returns:
        |o_sparse - o_full| [rows, group, levels, budgets] and |o_full| [rows, group]; region_mass,
        bound_lse and bound_1st of QueryNeeds, [rows, group].
    """
    rows, group, head_dim = query.shape
    tokens = key.shape[0]
    blocks, both = tokens // BLOCK_TOKENS, rows * group
    flat = query.reshape(both, head_dim) / math.sqrt(head_dim)
    logits = torch.mm(flat, key.T, out=buffers.take("logits", key, both, tokens))
    logits = logits.view(rows, group, tokens)
    hidden = regions.hidden[:, None]
    logits[..., -hidden.shape[-1] :].masked_fill_(hidden, -math.inf)
    highest = logits.amax(-1, keepdim=True)
    weights = logits.sub_(highest).exp_().view(both, blocks, BLOCK_TOKENS)
    # Laid out as the product wants them: three times faster than from a view.
    by_block = buffers.take("by_block", key, blocks, both, BLOCK_TOKENS)
    by_block.copy_(weights.transpose(0, 1))
    weighted = torch.bmm(
        by_block,
        value.view(blocks, BLOCK_TOKENS, head_dim),
        out=buffers.take("weighted", key, blocks, both, head_dim),
    )
    bounds = _bounds(flat, key).view(rows, group, -1)
    bounds.masked_fill_(~regions.touching[:, None], -math.inf)
    read = _read(bounds, regions, buffers)
    sums = torch.bmm(read, weighted.transpose(0, 1)).view(rows, group, -1, head_dim)
    # Four times faster than as a product with one column.
    of_blocks = weights.sum(-1)[:, None]
    masses = torch.mul(read, of_blocks, out=read).sum(-1).view(rows, group, -1, 1)

    window_mass, region_mass = masses[:, :, 0, 0], masses[:, :, 1, 0]
    full = (sums[:, :, 0] + sums[:, :, 1]) / (window_mass + region_mass)[..., None]
    # Budget 0 is the window alone; it is the same at every level.
    sums[:, :, 2:] += sums[:, :, :1]
    masses[:, :, 2:] += masses[:, :, :1]
    outputs = sums / masses.clamp(min=TINY_MASS)
    errors = torch.linalg.vector_norm(outputs - full[:, :, None], dim=-1)
    nothing = errors[:, :, None, :1].expand(-1, -1, len(BLOCK_SIZES), 1)
    some = torch.unflatten(errors[:, :, 2:], 2, (len(BLOCK_SIZES), -1))
    window_log = window_mass.clamp(min=TINY_MASS).log()
    coarse = bounds[..., -(tokens // BLOCK_SIZES[-1]) :] - window_log[..., None] - highest
    return (
        torch.cat((nothing, some), -1),
        torch.linalg.vector_norm(full, dim=-1),
        (region_mass.log() - window_log).clamp(-CLIP, CLIP),
        (torch.logsumexp(coarse, -1) + math.log(BLOCK_SIZES[-1])).clamp(-CLIP, CLIP),
        coarse.amax(-1).clamp(-CLIP, CLIP),
    )


def _bounds(query: Tensor, key: Tensor) -> Tensor:
    """[rows, blocks of all levels, side by side] from [rows, head_dim] and [tokens, head_dim]."""
    scores = []
    for (low, high), radius in zip(key_digests(key[None]), RADII, strict=True):
        for_low, for_high = score_weights(query, radius)
        scores.append(torch.addmm(for_low @ low[0].T, for_high, high[0].T))
    return torch.cat(scores, -1)


def _read(bounds: Tensor, regions: _Regions, buffers: _Buffers) -> Tensor:
    """16-token blocks that are read, as ones: [rows * group, 2 + levels * budgets, blocks].

    First those of the window, then all of the region, then by level what each budget above 0 reads.

    Args:
        bounds: [rows, group, blocks of all levels].
        regions: of the rows.
        buffers: for the result.
    """
    rows, group, _ = bounds.shape
    blocks, budgets = regions.inside.shape[1], regions.counts.shape[2]
    shape = (rows, group, 2 + len(BLOCK_SIZES) * budgets, blocks)
    read = buffers.take("read", bounds, *shape)
    inside = regions.inside[:, None]
    read[:, :, 0] = ~inside
    read[:, :, 1] = inside
    lowest = []
    sizes = [blocks >> level for level in range(len(BLOCK_SIZES))]
    for level, bound in enumerate(torch.split(bounds, sizes, -1)):
        counts = regions.counts[:, level, None].expand(-1, group, -1)
        # The lowest bound that is still read; without a region all are -inf, and so is this.
        place = (sizes[level] - counts).clamp(max=sizes[level] - 1)
        lowest.append(_ascending(bound).gather(-1, place))
    # By 16-token block, the bound of the block of each size that it lies in.
    spread = bounds.index_select(-1, regions.spread).view(rows, group, len(BLOCK_SIZES), 1, blocks)
    taken = read[:, :, 2:].view(rows, group, len(BLOCK_SIZES), budgets, blocks)
    torch.ge(spread, torch.stack(lowest, 2)[..., None], out=taken)
    # Blocks of 32 tokens and more may reach beyond the region.
    begin, end = regions.surely_inside
    for edge in (slice(0, begin), slice(end, blocks)):
        read[:, :, 2:, edge] *= inside[:, :, None, edge]
    return read.flatten(0, 1)


def _ascending(values: Tensor) -> Tensor:
    """The values of each last dimension in order."""
    if values.device.type == "cpu":
        # Ten times faster than torch's own for rows of a few hundred.
        return torch.from_numpy(np.sort(values.numpy(), axis=-1))
    return values.sort(-1).values
