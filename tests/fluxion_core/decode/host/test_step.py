"""A step without a GPU: what a sequence gets does not depend on what else is in the batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fluxion_core.decode.host.attention import HostAttention
from fluxion_core.decode.host.decoder import HostDecoder
from fluxion_core.decode.host.step import HostStep
from fluxion_core.decode.step import StepRow
from fluxion_core.errors import FluxionError
from fluxion_core.planning.policy import ExactPolicy, FixedPolicy, ThresholdPolicy
from fluxion_core.pool.cpu_pool import CpuPool
from tests.fluxion_core.decode.small_step import (
    CONFIG,
    WINDOW,
    random_decoder,
    random_sequence,
    store_for,
)

SEQUENCES = 17


def logits_in_batches_of(size: int, threads: int) -> Tensor:
    """[steps, sequences, vocab_size] of two steps of the same sequences."""
    pool = CpuPool(threads)
    store = store_for(16)
    attention = HostAttention(store, WINDOW, num_heads=CONFIG.num_heads, pool=pool)
    step = HostStep(HostDecoder(random_decoder("cpu"), pool), attention)
    generator = torch.Generator().manual_seed(4)
    sequences = [
        random_sequence(store, 20 + 45 * number, 2, generator, first=1000 + number)
        for number in range(SEQUENCES)
    ]
    policies = [ExactPolicy(), FixedPolicy(16, 0.2)]
    steps = []
    for token in (7, 300):
        rows = [
            StepRow(sequence, 0, token + number, policies[number % 2])
            for number, sequence in enumerate(sequences)
        ]
        batches = [rows[first : first + size] for first in range(0, SEQUENCES, size)]
        steps.append(torch.cat([step.run(batch)[0] for batch in batches]))
    return torch.stack(steps)


def test_logits_are_the_same_bits_alone_and_in_any_batch():
    alone = logits_in_batches_of(1, threads=1)
    assert len({tuple(row[:8].tolist()) for row in alone.flatten(0, 1)}) == 2 * SEQUENCES
    for size in (2, 3, 8, 9, 17):
        assert torch.equal(logits_in_batches_of(size, threads=2), alone)


def test_a_row_that_cannot_take_part_is_told_before_the_step():
    pool, store = CpuPool(1), store_for(16)
    attention = HostAttention(store, WINDOW, num_heads=CONFIG.num_heads, pool=pool)
    step = HostStep(HostDecoder(random_decoder("cpu"), pool), attention)
    size = store.geometry.slab_tokens
    generator = torch.Generator().manual_seed(5)
    full = random_sequence(store, size, 0, generator, first=1)
    roomy = random_sequence(store, size - 1, 1, generator, first=2)
    step.check(StepRow(roomy, 0, 1, ExactPolicy()))
    with pytest.raises(FluxionError, match="reservation"):
        step.check(StepRow(full, 0, 1, ExactPolicy()))
    with pytest.raises(FluxionError, match="needs a planner"):
        step.check(StepRow(roomy, 0, 1, ThresholdPolicy(0.1)))


def test_a_token_whose_kv_is_not_finite_is_its_sequences_alone():
    logits = []
    for is_damaged in (False, True):
        pool, store = CpuPool(2), store_for(16)
        decoder = random_decoder("cpu")
        if is_damaged:
            with torch.no_grad():
                decoder.embedding[500] = torch.inf
        attention = HostAttention(store, WINDOW, num_heads=CONFIG.num_heads, pool=pool)
        step = HostStep(HostDecoder(decoder, pool), attention)
        generator = torch.Generator().manual_seed(4)
        sequences = [random_sequence(store, 400, 2, generator, first=n) for n in range(3)]
        rows = [
            StepRow(sequence, 0, token, FixedPolicy(16, 0.2))
            for sequence, token in zip(sequences, (7, 500, 8), strict=True)
        ]
        found, _ = step.run(rows)
        # The embedding is the head too: that token's own logit says so.
        logits.append(found[[0, 2], :500].clone())
    assert torch.equal(*logits)
    assert [sequence.num_tokens for sequence in sequences] == [401, 400, 401]
    assert sequences[1].damage is not None
    assert (sequences[1].damage.layer, sequences[1].damage.token) == (0, 400)
