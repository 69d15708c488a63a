"""One layer's profile of a prompt, from some of its queries and all of its KV; prefill calls it.

What it measures is what `layer_step.LayerStep` does, which is its oracle. It is made to cost a few
percent of a prompt's computing: all block sizes in one product, on a CPU a KV head at a time, and
for long prompts a few queries at a time, so that it needs little memory beside the KV.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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
from fluxion_core.planning.profiled_queries import ProfiledPositions
from fluxion_core.planning.prompt_profile import PromptProfile, QueryNeeds, join_needs
from fluxion_core.planning.ranking import score_weights

PART_BYTES = 256 << 20
"""Values weighted block by block that are held at a time: the largest part of the memory needed."""


def padded_tokens(num_tokens: int) -> int:
    """Tokens of the KV that `estimate_prompt` takes: whole blocks of every size."""
    return ceil_div(num_tokens, BLOCK_SIZES[-1]) * BLOCK_SIZES[-1]


class PromptEstimator:
    """Makes profiles of one prompt, layer by layer; keeps its buffers from one to the next.

    Args:
        num_tokens: of the prompt.
        window: the default window of the node that decodes.
        first_token: there are queries from this one on.
        part_bytes: bound on weighted values held at a time; one query is always looked at.
        heads_at_once: KV heads that are looked at together; None for one on a CPU, whose caches
            hold no more, and all elsewhere, where launches count.
    """

    def __init__(
        self,
        num_tokens: int,
        window: WindowSpec,
        *,
        first_token: int = 0,
        part_bytes: int = PART_BYTES,
        heads_at_once: int | None = None,
    ) -> None:
        self._num_tokens = num_tokens
        self._window = window
        self._positions = ProfiledPositions.of(num_tokens, first_token)
        self._part_bytes = part_bytes
        self._heads_at_once = heads_at_once
        self._buffers = _Buffers()
        self._parts: tuple[list[_Part], list[_Part]] | None = None

    def estimate(self, query: Tensor, key: Tensor, value: Tensor) -> PromptProfile:
        """Estimate what the prompt's profiled queries would have needed of each head's KV.

        Every value is finite: without a retrieval region nothing is needed, which is the floor of
        errors, masses and bounds.

        Args:
            query: [rows, heads, head_dim] float32, unscaled; of `ProfiledPositions`.
            key: [kv_heads, padded_tokens(num_tokens), head_dim] float32, zeros after the prompt.
            value: like key.

        Raises:
            ShapeError: query or key has another number of rows or tokens.

        Cost: reads the KV about four times; 8 * rows * heads * tokens * head_dim operations.
        """
        rows, heads, _ = query.shape
        kv_heads, tokens, _ = key.shape
        if rows != len(self._positions) or tokens != padded_tokens(self._num_tokens):
            raise ShapeError(
                f"query {tuple(query.shape)} and key {tuple(key.shape)} for a prompt of "
                f"{self._num_tokens}; need {len(self._positions)} queries and "
                f"{padded_tokens(self._num_tokens)} keys"
            )
        digests = key_digests(key)
        at_once = self._heads_at_once or (1 if key.device.type == "cpu" else kv_heads)
        spread_parts, last_parts = self._parts_of(heads // kv_heads * at_once, key)
        some_heads = [slice(first, first + at_once) for first in range(0, kv_heads, at_once)]

        def look_at(part: _Part) -> _Look:
            grouped = torch.unflatten(query[part.rows], 1, (kv_heads, -1))
            looks = [
                _look(
                    grouped[:, some],
                    key[some],
                    value[some],
                    [(low[some], high[some]) for low, high in digests],
                    part.regions,
                    self._buffers,
                )
                for some in some_heads
            ]
            return _Look.join(looks)

        spread = [look_at(part).log_squares() for part in spread_parts]
        needs = join_needs([look_at(part).needs() for part in last_parts])
        kv = kv_distribution(key[:, : self._num_tokens], value[:, : self._num_tokens])
        profile = needs.summarize(1, kv[None], torch.cat(spread)[None] if spread else None)
        return PromptProfile(*(getattr(profile, field.name)[0] for field in fields(PromptProfile)))

    def _parts_of(self, heads: int, key: Tensor) -> tuple[list[_Part], list[_Part]]:
        """Spread and last queries, as many in a part as are looked at together for so many heads;
        the same for each layer."""
        if self._parts is None:
            tokens, head_dim = key.shape[1:]
            row_bytes = heads * (tokens // BLOCK_TOKENS) * head_dim * key.element_size()
            at_once = max(1, self._part_bytes // row_bytes)

            def parts_of(positions: range, first_row: int) -> list[_Part]:
                parts = []
                for first in range(0, len(positions), at_once):
                    some = positions[first : first + at_once]
                    begin = first_row + first
                    regions = _Regions.of(some, tokens, self._window, key.device)
                    parts.append(_Part(slice(begin, begin + len(some)), regions))
                return parts

            spread, last = self._positions.spread, self._positions.last
            self._parts = (parts_of(spread, 0), parts_of(last, len(spread)))
        return self._parts


@dataclass(frozen=True)
class _Part:
    """Queries that are looked at together."""

    rows: slice
    regions: _Regions


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


@dataclass(frozen=True)
class _Look:
    """What some heads would have lost and seen. float32, [rows, heads, ...]."""

    errors: Tensor
    """[rows, heads, levels, budgets]: |o_sparse - o_full|."""
    norms: Tensor
    """|o_full|."""
    region_mass: Tensor
    bound_lse: Tensor
    bound_1st: Tensor

    @staticmethod
    def join(looks: Sequence[_Look]) -> _Look:
        """Of all their heads."""
        return _Look(
            *(torch.cat([getattr(one, f.name) for one in looks], 1) for f in fields(_Look))
        )

    def log_squares(self) -> Tensor:
        """[rows, heads, levels, budgets]: log of the squared head output error."""
        largest = self.norms.amax(1).clamp(min=TINY)[:, None, None, None]
        return 2 * torch.log((self.errors / largest).clamp(min=ERROR_FLOOR))

    def needs(self) -> QueryNeeds:
        """Needs of the rows."""
        logs = self.log_squares()
        return QueryNeeds(
            log_squares=logs,
            worst_log_squares=torch.stack((logs[..., 0, 0], logs[..., 0, SMALL_BUDGET]), -1),
            region_mass=self.region_mass,
            bound_lse=self.bound_lse,
            bound_1st=self.bound_1st,
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
    query: Tensor,
    key: Tensor,
    value: Tensor,
    digests: list[tuple[Tensor, Tensor]],
    regions: _Regions,
    buffers: _Buffers,
) -> _Look:
    """What the groups of some KV heads would have lost and seen.

    Args:
        query: [rows, kv_heads, group, head_dim].
        key, value: [kv_heads, tokens, head_dim].
        digests: lowest and highest key, [kv_heads, blocks, head_dim] each, per block size.
        regions: of the rows.
        buffers: for what is large.
    """
    rows, kv_heads, group, head_dim = query.shape
    shape = (kv_heads, rows, group)
    flat = query.transpose(0, 1).reshape(kv_heads, rows * group, head_dim) / math.sqrt(head_dim)
    weights, highest = _weigh(flat, key, regions, buffers)
    bounds = _bounds(flat, digests).view(*shape, -1)
    bounds.masked_fill_(~regions.touching[:, None], -math.inf)
    read = _read(bounds, regions, buffers)
    sums = torch.bmm(read, _weighted(weights, value, buffers)).view(*shape, -1, head_dim)
    # Four times faster than as a product with one column.
    of_blocks = weights.sum(-1).flatten(0, 1)[:, None]
    masses = torch.mul(read, of_blocks, out=read).sum(-1).view(*shape, -1, 1)

    window_mass, region_mass = masses[..., 0, 0], masses[..., 1, 0]
    full = (sums[..., 0, :] + sums[..., 1, :]) / (window_mass + region_mass)[..., None]
    # Budget 0 is the window alone; it is the same at every level.
    sums[..., 2:, :] += sums[..., :1, :]
    masses[..., 2:, :] += masses[..., :1, :]
    outputs = sums / masses.clamp(min=TINY_MASS)
    errors = torch.linalg.vector_norm(outputs - full[..., None, :], dim=-1)
    nothing = errors[..., None, :1].expand(*shape, len(BLOCK_SIZES), 1)
    some = torch.unflatten(errors[..., 2:], -1, (len(BLOCK_SIZES), -1))
    window_log = window_mass.clamp(min=TINY_MASS).log()
    largest = BLOCK_SIZES[-1]
    coarse = bounds[..., -(key.shape[1] // largest) :] - window_log[..., None] - highest
    found = (
        torch.cat((nothing, some), -1),
        torch.linalg.vector_norm(full, dim=-1),
        (region_mass.log() - window_log).clamp(-CLIP, CLIP),
        (torch.logsumexp(coarse, -1) + math.log(largest)).clamp(-CLIP, CLIP),
        coarse.amax(-1).clamp(-CLIP, CLIP),
    )
    return _Look(*(part.transpose(0, 1).flatten(1, 2) for part in found))


def _weigh(
    query: Tensor, key: Tensor, regions: _Regions, buffers: _Buffers
) -> tuple[Tensor, Tensor]:
    """Weights of tokens, and the scores that weigh 1.

    Args:
        query: [kv_heads, rows * group, head_dim], scaled.
        key: [kv_heads, tokens, head_dim].
        regions: of the rows.
        buffers: for the weights.

    Returns:
        [kv_heads, rows * group, blocks, tokens of a block], [kv_heads, rows, group, 1].
    """
    (kv_heads, both, _), tokens = query.shape, key.shape[1]
    rows = len(regions.inside)
    out = buffers.take("logits", key, kv_heads, both, tokens)
    logits = torch.bmm(query, key.mT, out=out).view(kv_heads, rows, -1, tokens)
    hidden = regions.hidden[:, None]
    logits[..., -hidden.shape[-1] :].masked_fill_(hidden, -math.inf)
    highest = logits.amax(-1, keepdim=True)
    weights = logits.sub_(highest).exp_()
    return weights.view(kv_heads, both, -1, BLOCK_TOKENS), highest


def _weighted(weights: Tensor, value: Tensor, buffers: _Buffers) -> Tensor:
    """Weighted values of 16-token blocks: [kv_heads * rows * group, blocks, head_dim].

    Args:
        weights: [kv_heads, rows * group, blocks, tokens of a block].
        value: [kv_heads, tokens, head_dim].
        buffers: for the result.
    """
    kv_heads, both, blocks, _ = weights.shape
    head_dim = value.shape[-1]
    # Laid out as the product wants them: three times faster than from a view.
    by_block = buffers.take("by_block", value, blocks, kv_heads, both, BLOCK_TOKENS)
    by_block.copy_(weights.permute(2, 0, 1, 3))
    values = torch.unflatten(value, 1, (blocks, BLOCK_TOKENS)).transpose(0, 1)
    out = buffers.take("weighted", value, blocks * kv_heads, both, head_dim)
    torch.bmm(by_block.flatten(0, 1), values.flatten(0, 1), out=out)
    return out.view(blocks, kv_heads * both, head_dim).transpose(0, 1)


def _bounds(query: Tensor, digests: list[tuple[Tensor, Tensor]]) -> Tensor:
    """[kv_heads, rows, blocks of all levels, side by side] from [kv_heads, rows, head_dim] and
    digests of keys."""
    scores = []
    for (low, high), radius in zip(digests, RADII, strict=True):
        for_low, for_high = score_weights(query, radius)
        scores.append(torch.baddbmm(for_low @ low.mT, for_high, high.mT))
    return torch.cat(scores, -1)


def _read(bounds: Tensor, regions: _Regions, buffers: _Buffers) -> Tensor:
    """16-token blocks that are read, as ones: [heads and rows, 2 + levels * budgets, blocks].

    First those of the window, then all of the region, then by level what each budget above 0 reads.

    Args:
        bounds: [kv_heads, rows, group, blocks of all levels].
        regions: of the rows.
        buffers: for the result.
    """
    shape = bounds.shape[:-1]
    blocks, (num_levels, budgets) = regions.inside.shape[1], regions.counts.shape[1:]
    read = buffers.take("read", bounds, *shape, 2 + num_levels * budgets, blocks)
    inside = regions.inside[:, None]
    read[..., 0, :] = ~inside
    read[..., 1, :] = inside
    lowest = []
    sizes = [blocks >> level for level in range(num_levels)]
    for level, bound in enumerate(torch.split(bounds, sizes, -1)):
        counts = regions.counts[:, level, None].expand(*shape, -1)
        # The lowest bound that is still read; without a region all are -inf, and so is this.
        place = (sizes[level] - counts).clamp(max=sizes[level] - 1)
        lowest.append(_ascending(bound).gather(-1, place))
    # By 16-token block, the bound of the block of each size that it lies in.
    spread = bounds.index_select(-1, regions.spread).view(*shape, num_levels, 1, blocks)
    taken = read[..., 2:, :].view(*shape, num_levels, budgets, blocks)
    torch.ge(spread, torch.stack(lowest, -2)[..., None], out=taken)
    # Blocks of 32 tokens and more may reach beyond the region.
    begin, end = regions.surely_inside
    for edge in (slice(0, begin), slice(end, blocks)):
        read[..., 2:, edge] *= inside[:, :, None, edge]
    return read.flatten(0, 2)


def _ascending(values: Tensor) -> Tensor:
    """The values of each last dimension in order."""
    if values.device.type == "cpu":
        # Ten times faster than torch's own for rows of a few hundred.
        return torch.from_numpy(np.sort(values.numpy(), axis=-1))
    return values.sort(-1).values
