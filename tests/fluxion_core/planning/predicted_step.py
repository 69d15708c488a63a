"""Sequences with random KV and profiles, and their steps and plans in torch: what plans are held
against, whoever makes them."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from fluxion_core.geometry import BLOCK_SIZES, BLOCK_TOKENS, KvGeometry, WindowSpec, ceil_div
from fluxion_core.kernels.block_score import cpu as block_score
from fluxion_core.kvstore.digest_index import gather_kv
from fluxion_core.kvstore.sequence import SequenceKv
from fluxion_core.kvstore.store import HostKvStore
from fluxion_core.planning.choice_reference import GroupPlans, by_price, by_threshold
from fluxion_core.planning.constants import RADII
from fluxion_core.planning.features import StepMemory, features
from fluxion_core.planning.head_profile import log_squared_errors
from fluxion_core.planning.layer_step import LayerStep, no_memory
from fluxion_core.planning.planner import Planner, PlannerState
from fluxion_core.planning.policy import MarginalPolicy, Policy, ThresholdPolicy
from fluxion_core.planning.prompt_profile import PromptProfile
from tests.fluxion_core.planning.random_planner import random_profile

LAYERS, HEADS, KV_HEADS, DIM = 2, 6, 2, 32
GROUP = HEADS // KV_HEADS
WINDOW = WindowSpec(sink_tokens=64, recent_tokens=256)


LENGTHS = (40, 335, 337, 352, 500, 1000, 1301, 2047)
"""Without a region, with one from the second step on, with one of few blocks, across slabs."""


@dataclass
class Decoded:
    """A sequence with its planner state, and what the oracle remembers of it."""

    kv: SequenceKv
    state: PlannerState
    profiles: list[PromptProfile]
    memory: list[StepMemory]


def make_store(digest_bits: int) -> HostKvStore:
    geometry = KvGeometry(LAYERS, KV_HEADS, DIM, 256, digest_bits=digest_bits)
    return HostKvStore(geometry, 80 * (geometry.slab_bytes + 4096), model_key=b"toy")


def fill(store: HostKvStore, planner: Planner, num_tokens: int, seed: int) -> Decoded:
    """Random KV with some keys that stand out, so that heads differ in what they need."""
    generator = torch.Generator().manual_seed(seed)
    kv = store.reserve([seed] * num_tokens, 24)
    blocks = ceil_div(num_tokens, BLOCK_TOKENS)
    for layer in range(LAYERS):
        payload = torch.randn(KV_HEADS, blocks, 2, BLOCK_TOKENS, DIM, generator=generator)
        payload[:, ::7, 0, 3] *= 3
        raw = payload.bfloat16().view(torch.uint8).numpy().tobytes()
        kv.write_blocks(layer, 0, num_tokens, raw)
    kv.commit()
    profiles = [random_profile(HEADS, KV_HEADS, generator) for _ in range(LAYERS)]
    memory = no_memory(1, HEADS, DIM, torch.device("cpu"))
    return Decoded(kv, planner.new_state(profiles), profiles, [memory] * LAYERS)


def token(generator: torch.Generator) -> Tensor:
    """[layers, heads + 2 kv_heads, head_dim]."""
    return torch.randn(LAYERS, HEADS + 2 * KV_HEADS, DIM, generator=generator) * 1.5


def oracle_step(sequence: Decoded, rows: Tensor, layer: int, digest_bits: int) -> LayerStep:
    """The step in torch, from the store's KV; with 8-bit digests by the store's own scores."""
    position = sequence.kv.num_tokens
    query, own_key, own_value = rows[layer].split((HEADS, KV_HEADS, KV_HEADS))
    pairs = [gather_kv(sequence.kv, layer, head) for head in range(KV_HEADS)]
    padding = (0, 0, 0, ceil_div(position + 1, 128) * 128 - position)
    key, value = (
        torch.nn.functional.pad(torch.stack(part).float(), padding)
        for part in zip(*pairs, strict=True)
    )
    own = [own_key.bfloat16().float()[None], own_value.bfloat16().float()[None]]
    step = LayerStep(key, value, query[None], *own, torch.tensor([position]), WINDOW)
    if digest_bits == 8:
        region = WINDOW.retrieval_region(position + 1)
        for level, size in enumerate(BLOCK_SIZES if region else ()):
            first, end = region.start // size, ceil_div(region.stop, size)
            for kv_head in range(KV_HEADS):
                of_group = query[kv_head * GROUP : (kv_head + 1) * GROUP]
                scores = block_score.score_blocks(
                    sequence.kv.store.geometry,
                    sequence.kv.slab_table,
                    layer,
                    kv_head,
                    level,
                    range(first, end),
                    of_group,
                    RADII[level],
                )
                step.bounds[level][0, kv_head, :, first:end] = scores / DIM**0.5
    return step


def oracle_profile(planner: Planner, sequence: Decoded, step: LayerStep, layer: int) -> Tensor:
    """[1, heads, NUM_OUTPUTS] of the network."""
    weights = planner.weights
    assert weights.network is not None
    profile = sequence.profiles[layer]
    profile = PromptProfile(*(getattr(profile, f.name)[None] for f in fields(PromptProfile)))
    memory, priors = sequence.memory[layer], weights.priors[layer]
    seen = step.observe(layer, LAYERS, profile, memory, priors)
    with torch.no_grad():
        predicted: Tensor = weights.network(features(seen))
    return predicted


def oracle_plan(
    planner: Planner, sequence: Decoded, step: LayerStep, layer: int, policy: Policy
) -> GroupPlans:
    weights = planner.weights
    if weights.network is None:
        logs = sequence.profiles[layer].spread_log_squares[None]
    else:
        logs = log_squared_errors(oracle_profile(planner, sequence, step, layer))
    logs = torch.unflatten(logs, 1, (KV_HEADS, GROUP))
    if isinstance(policy, ThresholdPolicy):
        return by_threshold(logs, torch.tensor([policy.error]), weights.cost)
    assert isinstance(policy, MarginalPolicy)
    of_layer = weights.head_weights[layer].view(KV_HEADS, GROUP)
    return by_price(logs, torch.tensor([policy.price]), weights.cost, of_layer)
