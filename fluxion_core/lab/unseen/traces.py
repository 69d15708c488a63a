"""Traces of decode steps after a prompt: features, true curves, and what the steps' outputs did.

A trace is all that rules of reading are tried on without the model (outcomes.py). Its rows are the
prompt's last 16 queries, then 128 queries spread evenly over its last 1,024 tokens, then the steps
after it. Every row starts from exact KV, as in training (lab/training/replay.py).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import combinations
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fluxion_core.geometry import BLOCK_SIZES, WindowSpec
from fluxion_core.lab.training.collect import select
from fluxion_core.lab.training.lookups import Encode, questions_after
from fluxion_core.lab.training.replay import DocumentKv, ReplayPort
from fluxion_core.models.decoder import Decoder
from fluxion_core.planning.constants import BUDGETS, ERROR_FLOOR, TINY_MASS
from fluxion_core.planning.features import features
from fluxion_core.planning.layer_step import LayerStep, profile_prompts
from fluxion_core.planning.profiled_queries import PROFILED_QUERIES
from fluxion_core.planning.prompt_profile import PromptProfile

SPREAD_QUERIES = 128
SPREAD_TOKENS = 1024
"""Of the prompt's end, over which these lie."""

LAST = slice(0, PROFILED_QUERIES)
SPREAD = slice(PROFILED_QUERIES, PROFILED_QUERIES + SPREAD_QUERIES)
STEPS = slice(PROFILED_QUERIES + SPREAD_QUERIES, None)
"""Rows of a trace."""

PAIRS = tuple(sorted(combinations(range(len(BUDGETS)), 2), key=lambda pair: (pair[1], pair[0])))
"""Smaller and larger budget, as indices: between whose outputs distances are kept."""

_REMEMBERED_BUDGET = 1 / 16
"""Of every head, in 16-token blocks: what the step before has read."""

_FIXED_BUDGET = 0.05


@dataclass(frozen=True)
class Trace:
    """One prompt and the steps after it. "Share" is of the retrieval region."""

    layers: Tensor
    """[layers] int64: which of the model's; the others attended to everything unseen."""
    features: Tensor
    """[rows, layers, heads, NUM_FEATURES] float32; the priors are zeros."""
    logs: Tensor
    """[rows, layers, heads, levels, len(BUDGETS)] float16: log of the squared head output error."""
    moved: Tensor
    """[rows, layers, heads, levels, len(PAIRS)] float16: log of the squared distance between the
    outputs of two budgets, in units of the layer's largest output norm."""
    ranks: Tensor
    """[steps, layers, heads, blocks of all levels] uint8: of each block by its score, up to 255."""
    totals: Tensor
    """[steps, levels] float32: blocks that touch the region."""
    weights: Tensor
    """[steps, blocks of all levels] float32: 16-token blocks of the region within each."""
    fixed_square: Tensor
    """[steps, layers, heads] float32: squared error of fixed(16, 5 %)."""
    fixed_union: Tensor
    """[steps, layers, kv_heads] float32: share that its heads read together."""

    @property
    def kv_heads(self) -> int:
        """Number of KV heads of the model."""
        return self.fixed_union.shape[2]

    def save(self, path: Path) -> None:
        """Write the file; whole or not at all."""
        partial = path.with_suffix(".part")
        save_file({f.name: getattr(self, f.name).contiguous() for f in fields(self)}, partial)
        partial.replace(path)

    @staticmethod
    def load(path: Path) -> Trace:
        """Read a file that `save` wrote."""
        held = load_file(path)
        return Trace(**{f.name: held[f.name] for f in fields(Trace)})


def positions_of(prompt_tokens: int, steps: int) -> Tensor:
    """[rows] int64: positions of a trace's rows."""
    every = SPREAD_TOKENS // SPREAD_QUERIES
    last = range(prompt_tokens - PROFILED_QUERIES, prompt_tokens)
    spread = range(prompt_tokens - SPREAD_TOKENS + every - 1, prompt_tokens, every)
    return torch.tensor([*last, *spread, *range(prompt_tokens, prompt_tokens + steps)])


@torch.no_grad()
def trace_prompt(
    decoder: Decoder,
    kv: DocumentKv,
    prompt_tokens: int,
    steps: int,
    window: WindowSpec,
    *,
    every_layer: int = 1,
) -> Trace:
    """Trace of the steps after a prompt.

    Args:
        decoder: on the CPU, of any dtype.
        kv: of the text: the prompt and what follows.
        prompt_tokens: at least SPREAD_TOKENS beyond the window.
        steps: after the prompt; the text goes on so far.
        window: the default window.
        every_layer: 2 for every second layer, and so on; half the time and the file.
    """
    positions = positions_of(prompt_tokens, steps)
    rows = torch.arange(len(positions))
    # A step's memory is of the row before; the first one's is the prompt's last query.
    previous = torch.where(rows >= STEPS.start, rows - 1, -1)
    previous[STEPS.start] = LAST.stop - 1
    parts: list[tuple[Tensor, ...]] = []
    blocks: list[tuple[Tensor, Tensor]] = []

    def attend(layer: int, step: LayerStep) -> Tensor:
        keys, values = kv.keys[layer], kv.values[layer]
        of_prompt = step.rows_of(rows[LAST])
        profile = profile_prompts(of_prompt, 1, keys, values, [prompt_tokens])
        seen = _observe(step, layer, decoder.config.num_layers, profile, previous)
        logs, moved = curves_of(step)
        own = step.rows_of(rows[STEPS])
        levels = range(len(BLOCK_SIZES))
        ranks = torch.cat([own.ranks(level).clamp(max=255).byte() for level in levels], -1)
        parts.append((seen, logs.half(), moved.half(), ranks.flatten(1, 2), *_fixed(own)))
        if not blocks:
            totals = torch.stack([own.num_region_blocks(level) for level in levels], 1).float()
            inside = own.in_region.float()
            pooled = [torch.unflatten(inside, -1, (-1, 1 << level)).sum(-1) for level in levels]
            blocks.append((totals, torch.cat(pooled, -1)))
        return step.full_output.flatten(1, 2).to(decoder.embedding.dtype)

    port = _SomeLayers(kv, positions, window, attend, every_layer)
    decoder(kv.token_ids[positions], positions, port)
    seen, logs, moved, ranks, square, union = (
        torch.stack(part, 1) for part in zip(*parts, strict=True)
    )
    totals, weights = blocks[0]
    layers = torch.arange(0, decoder.config.num_layers, every_layer)
    return Trace(layers, seen, logs, moved, ranks, totals, weights, square, union)


class _SomeLayers(ReplayPort):
    """Steps of which every so many layers are looked at; in the others all is read."""

    def __init__(
        self,
        kv: DocumentKv,
        positions: Tensor,
        window: WindowSpec,
        attend: Callable[[int, LayerStep], Tensor],
        every_layer: int,
    ) -> None:
        super().__init__(kv, positions, window, attend)
        self._every_layer = every_layer

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend as ReplayPort does."""
        if layer % self._every_layer == 0:
            return super().attend(layer, query, key, value)
        keys, values = self._kv.keys[layer], self._kv.values[layer]
        own_key, own_value = (own.bfloat16().float()[:, :, None] for own in (key, value))
        rows, _, head_dim = query.shape
        grouped = query.float().view(rows, keys.shape[0], -1, head_dim) / math.sqrt(head_dim)
        logits = torch.einsum("nkgd,ktd->nkgt", grouped, keys)
        unseen = torch.arange(keys.shape[1]) >= self._positions[:, None]
        logits.masked_fill_(unseen[:, None, None], -math.inf)
        own = (grouped * own_key).sum(-1, keepdim=True)
        shares = torch.softmax(torch.cat((logits, own), -1), -1)
        output = torch.einsum("nkgt,ktd->nkgd", shares[..., :-1], values)
        return (output + shares[..., -1:] * own_value).flatten(1, 2).to(query.dtype)


def _observe(
    step: LayerStep, layer: int, num_layers: int, profile: PromptProfile, previous: Tensor
) -> Tensor:
    """Features of all rows."""
    shape = (step.rows, step.kv_heads)
    budgets = torch.full((*shape, step.group), _REMEMBERED_BUDGET)
    chosen = step.chosen_blocks(torch.zeros(shape, dtype=torch.int64), budgets)
    _, read_lse = step.attend(chosen)
    memory = select(step.remember(chosen, read_lse), previous.clamp(min=0))
    memory = replace(memory, is_known=previous >= 0)
    of_rows = select(profile, torch.zeros(step.rows, dtype=torch.int64))
    return features(step.observe(layer, num_layers, of_rows, memory, torch.zeros(0)))


def curves_of(step: LayerStep) -> tuple[Tensor, Tensor]:
    """Squared errors, and squared distances between outputs, as logs.

    Returns:
        `logs` and `moved` of Trace for one layer, float32: [rows, heads, levels, ...].
    """
    shares = torch.tensor(BUDGETS).expand(step.rows, -1)
    inside = step.in_region.float()[:, None, None]
    mass, weighted = step.mass * inside, step.weighted * inside[..., None]
    norm = step.norm[:, None, None, None]
    logs, moved = [], []
    for level in range(len(BLOCK_SIZES)):
        if level:
            mass = torch.unflatten(mass, -1, (-1, 2)).sum(-1)
            weighted = torch.unflatten(weighted, -2, (-1, 2)).sum(-2)
        counts = step.counts(shares, level)[:, None, None, :, None]
        chosen = (step.ranks(level)[:, :, :, None] < counts).float()
        total = step.window_mass[..., None] + (chosen @ mass[..., None])[..., 0]
        output = step.window_sum[..., None, :] + chosen @ weighted
        output = output / total.clamp(min=TINY_MASS)[..., None]
        error = torch.linalg.vector_norm(output - step.full_output[..., None, :], dim=-1)
        smaller, larger = (list(each) for each in zip(*PAIRS, strict=True))
        apart = torch.linalg.vector_norm(output[..., larger, :] - output[..., smaller, :], dim=-1)
        logs.append(2 * torch.log((error / norm).clamp(min=ERROR_FLOOR)))
        moved.append(2 * torch.log((apart / norm).clamp(min=ERROR_FLOOR)))
    return torch.stack(logs, 3).flatten(1, 2), torch.stack(moved, 3).flatten(1, 2)


def _fixed(step: LayerStep) -> tuple[Tensor, Tensor]:
    """Squared errors [rows, heads] and unions [rows, kv_heads] of fixed(16, 5 %)."""
    shape = (step.rows, step.kv_heads)
    by_quest = step.by_quest()
    budgets = torch.full((*shape, step.group), _FIXED_BUDGET)
    chosen = by_quest.chosen_blocks(torch.zeros(shape, dtype=torch.int64), budgets)
    output, _ = by_quest.attend(chosen)
    error = torch.linalg.vector_norm(output - step.full_output.flatten(1, 2), dim=-1)
    region = step.in_region.sum(-1)[:, None]
    return (error / step.norm[:, None]).square(), chosen.any(2).sum(-1) / region


def asking(token_ids: Sequence[int], prompt_tokens: int, encode: Encode, seed: int) -> list[int]:
    """A text as long, whose prompt holds facts, and whose steps ask for some of them.

    The prompt's end asks for nothing: its last queries need less than the steps will.

    Args:
        token_ids: of a text that goes on beyond the prompt.
        prompt_tokens: of the prompt.
        encode: text to tokens, without a beginning-of-text token.
        seed: of facts, places and questions.
    """
    ids = list(token_ids)
    facts, tail = questions_after(encode, random.Random(seed))
    places = random.Random(seed + 1).sample(range(96, prompt_tokens - 500, 48), len(facts))
    for place, fact in zip(places, facts, strict=True):
        ids[place : place + len(fact)] = fact
    ids[prompt_tokens : prompt_tokens + len(tail)] = tail
    return ids[: len(token_ids)]
