"""Samples for the predictor: features and labels of query heads at decode steps of documents.

A document becomes prompts that end every few hundred tokens; after each prompt, short runs of
consecutive steps at several distances, as a generation would make them. What the previous step had
read is drawn at random, so that the network learns to live with any policy, its own too.

One shard per document; a directory of shards is resumed where it ended.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fluxion_core.geometry import BLOCK_SIZES, WindowSpec
from fluxion_core.lab.training.replay import COARSEST, prefill, replay
from fluxion_core.lab.training.workers import Workers
from fluxion_core.models.decoder import Decoder
from fluxion_core.planning.constants import BUDGETS
from fluxion_core.planning.features import (
    StepMemory,
    features,
)
from fluxion_core.planning.layer_step import LayerStep, profile_prompts
from fluxion_core.planning.profiled_queries import PROFILED_QUERIES
from fluxion_core.planning.prompt_profile import PromptProfile

RUN_OFFSETS = (0, 120, 400)
"""Distances from the prompt's end at which runs begin."""

RUN_STEPS = 8
"""As in the paper: decode steps of each sample point."""

EVERY_TOKENS = 1024
"""Distance between the ends of a document's prompts."""

_T = TypeVar("_T", PromptProfile, StepMemory)


@dataclass(frozen=True)
class Samples:
    """Query heads at decode steps."""

    features: Tensor
    """[samples, layers, heads, NUM_FEATURES]; the priors are zeros."""
    log_squares: Tensor
    """[samples, layers, heads, levels, len(BUDGETS)]: log of the squared head output error."""
    plan_levels: Tensor
    """[plans]: block sizes of random plans, as an index."""
    plan_shares: Tensor
    """[plans, group]: what each head of the group read, of the region."""
    plan_unions: Tensor
    """[plans]: what the group read."""

    def save(self, path: Path) -> None:
        """Write a shard; whole or not at all."""
        partial = path.with_suffix(".part")
        save_file({f.name: getattr(self, f.name).contiguous() for f in fields(self)}, partial)
        partial.replace(path)

    @staticmethod
    def load(path: Path) -> Samples:
        """Read a shard."""
        return Samples(**load_file(path))


@dataclass(frozen=True)
class _Rows:
    """Which positions are replayed, and what each is for."""

    positions: Tensor
    """[rows]."""
    estimates: Tensor
    """[prompts * PROFILED_QUERIES]: rows that the prompts' profiles come from."""
    prompt: Tensor
    """[rows]: of each row."""
    previous: Tensor
    """[rows]: the row of the step before, -1 for a first step."""
    samples: Tensor
    """[samples]: rows that are samples."""


def prompt_ends(num_tokens: int, every_tokens: int = EVERY_TOKENS) -> list[int]:
    """Ends of the prompts of a document of so many tokens."""
    usable = num_tokens // COARSEST * COARSEST
    return list(range(every_tokens, usable - max(RUN_OFFSETS) - RUN_STEPS, every_tokens))


def plan_rows(ends: Sequence[int], device: torch.device) -> _Rows:
    """Rows for prompts that end before these positions."""
    positions: list[int] = []
    prompt: list[int] = []
    previous: list[int] = []
    samples: list[int] = []
    estimates: list[int] = []
    for index, end in enumerate(ends):
        estimates += range(len(positions), len(positions) + PROFILED_QUERIES)
        positions += range(end - PROFILED_QUERIES, end)
        previous += [-1] * PROFILED_QUERIES
        for offset in RUN_OFFSETS:
            # A run that does not begin at the prompt's end needs a step before its first.
            first = end + offset - (1 if offset else 0)
            for position in range(first, end + offset + RUN_STEPS):
                previous.append(len(positions) - 1 if position > first else -1)
                if position >= end + offset:
                    samples.append(len(positions))
                positions.append(position)
        prompt += [index] * (len(positions) - len(prompt))
    return _Rows(
        torch.tensor(positions, device=device),
        torch.tensor(estimates, device=device),
        torch.tensor(prompt, device=device),
        torch.tensor(previous, device=device),
        torch.tensor(samples, device=device),
    )


def select(stacked: _T, index: Tensor) -> _T:
    """Samples of some of its rows."""
    return replace(stacked, **{f.name: getattr(stacked, f.name)[index] for f in fields(stacked)})


@torch.no_grad()
def collect_document(
    decoder: Decoder,
    token_ids: Sequence[int],
    window: WindowSpec,
    *,
    every_tokens: int = EVERY_TOKENS,
    seed: int = 0,
) -> Samples:
    """Samples of one document.

    Args:
        decoder: float32, on a GPU or the CPU.
        token_ids: of the document.
        window: the default window.
        every_tokens: distance between the prompts' ends.
        seed: of what the previous steps had read.
    """
    kv = prefill(decoder, token_ids)
    config, device = decoder.config, kv.keys.device
    ends = prompt_ends(len(token_ids), every_tokens)
    rows = plan_rows(ends, device)
    generator = torch.Generator(device).manual_seed(seed)
    seen: list[Tensor] = []
    labels: list[Tensor] = []
    plans: list[tuple[Tensor, Tensor, Tensor]] = []
    empty = torch.zeros(0)

    def attend(layer: int, step: LayerStep) -> Tensor:
        last = step.rows_of(rows.estimates)
        keys, values = kv.keys[layer], kv.values[layer]
        profiles = profile_prompts(last, len(ends), keys, values, ends)
        levels, budgets = _random_plans(step, generator)
        chosen = step.chosen_blocks(levels, budgets)
        plans.append(_union_of(step, levels, chosen))
        _, read_lse = step.attend(chosen)
        memory = select(step.remember(chosen, read_lse), rows.previous.clamp(min=0))
        memory = replace(memory, is_known=rows.previous >= 0)
        observation = step.observe(
            layer, config.num_layers, select(profiles, rows.prompt), memory, empty
        )
        seen.append(features(observation)[rows.samples])
        labels.append(step.rows_of(rows.samples).log_squared_errors().flatten(1, 2))
        return step.full_output.flatten(1, 2)

    replay(decoder, kv, rows.positions, window, attend)
    return Samples(
        torch.stack(seen, 1).cpu(),
        torch.stack(labels, 1).half().cpu(),
        *(torch.cat(parts).cpu() for parts in zip(*plans, strict=True)),
    )


def _random_plans(step: LayerStep, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Levels [rows, kv_heads] and budgets [rows, kv_heads, group], all of them likely to occur."""
    device = step.mass.device
    shape = (step.rows, step.kv_heads, step.group)
    levels = torch.randint(0, len(BLOCK_SIZES), shape[:2], generator=generator, device=device)
    index = torch.randint(0, len(BUDGETS), shape, generator=generator, device=device)
    # Half of the heads read nothing, as streaming heads do.
    index = index * (torch.rand(shape, generator=generator, device=device) < 0.5)
    return levels, torch.tensor(BUDGETS, device=device)[index]


def _union_of(step: LayerStep, levels: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Levels [plans], shares [plans, group] and unions [plans] of the groups' plans."""
    region = step.in_region.sum(-1).clamp(min=1)[:, None, None]
    shares = chosen.sum(-1) / region
    union = chosen.any(2).sum(-1) / region[..., 0]
    return levels.flatten(), shares.flatten(0, 1), union.flatten()


@dataclass(frozen=True)
class _Errand:
    """One document to collect, for a worker."""

    path: Path
    token_ids: Sequence[int]
    window: WindowSpec
    seed: int
    latest_start: float
    """Of time.time()."""


def _run_errand(decoder: Decoder, errand: _Errand) -> Path | None:
    if not errand.path.is_file():
        if time.time() > errand.latest_start:
            return None
        samples = collect_document(decoder, errand.token_ids, errand.window, seed=errand.seed)
        samples.save(errand.path)
    return errand.path


def collect(
    workers: Workers,
    documents: Sequence[tuple[str, Sequence[int]]],
    window: WindowSpec,
    directory: Path,
    on_done: Callable[[int, int], None],
    *,
    seconds: float = math.inf,
) -> list[Path]:
    """Write one shard per document; those that are there already are left alone.

    Args:
        workers: that do it.
        documents: name and token ids of each.
        window: the default window.
        directory: of the shards, made if it is not there.
        on_done: called after each document with how many are done, and of how many.
        seconds: no document is begun after this time.

    Returns:
        The shards that are there now.
    """
    directory.mkdir(parents=True, exist_ok=True)
    latest = time.time() + seconds
    errands = [
        _Errand(directory / f"{name}.safetensors", token_ids, window, number, latest)
        for number, (name, token_ids) in enumerate(documents)
    ]
    shards = []
    for number, path in enumerate(workers.map(_run_errand, errands)):
        on_done(number + 1, len(errands))
        if path is not None:
            shards.append(path)
    return shards
