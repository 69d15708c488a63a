"""A prompt that is on its way is in the tier when it joins, and its first step hits all of it."""

from __future__ import annotations

import pytest
import torch

from fluxion_core.decode.step import StepRow
from fluxion_core.geometry import BLOCK_TOKENS, ceil_div
from fluxion_core.kvstore.sequence import SequenceKv
from fluxion_core.planning.policy import parse_policy
from fluxion_core.pool.cpu_pool import CpuPool
from tests.fluxion_core.decode.small_step import (
    CONFIG,
    WINDOW,
    random_decoder,
    random_sequence,
    store_for,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

LENGTH = 3000


def write(sequence: SequenceKv, first: int, end: int, generator: torch.Generator) -> None:
    """Write the prompt's tokens from `first` to `end`, in all layers."""
    for layer in range(CONFIG.num_layers):
        shape = (CONFIG.num_kv_heads, ceil_div(end - first, BLOCK_TOKENS), 2, BLOCK_TOKENS)
        payload = torch.randn(*shape, CONFIG.head_dim, generator=generator).bfloat16()
        if end % BLOCK_TOKENS:
            payload[:, -1, :, end % BLOCK_TOKENS :] = 0
        written = payload.view(torch.uint8).numpy().tobytes()
        sequence.write_blocks(layer, first, end - first, written)


@pytest.mark.parametrize("beside_streams", [False, True])
@pytest.mark.parametrize("restarts", [False, True])
def test_the_first_step_of_a_prompt_that_came_in_pieces_misses_nothing(
    beside_streams: bool, restarts: bool
) -> None:
    from fluxion_core.decode.device.step import DeviceStep

    generator = torch.Generator().manual_seed(5)
    store = store_for(16)
    step = DeviceStep(
        random_decoder("cuda"),
        store,
        WINDOW,
        CpuPool(2),
        max_rows=2,
        max_context_tokens=8192,
        device_kv_bytes=32 << 20,
    )
    policy = parse_policy("exact")
    try:
        assert step.fills_ahead
        stream = None
        if beside_streams:
            other = random_sequence(store, 400, 100, generator, first=2)
            stream = StepRow(other, step.join(other), 3, policy)

        def go_on(*prompts: SequenceKv) -> None:
            for _ in range(6):
                step.fill_ahead(prompts, has_streams=stream is not None)
                if stream is not None:
                    step.run([stream])
                torch.cuda.synchronize()

        sequence = store.reserve([1] * LENGTH, 10)
        for first in range(0, LENGTH // 2, 512):
            write(sequence, first, first + 512, generator)
            go_on(sequence)
        if restarts:
            sequence.restart()
            for first in range(0, LENGTH // 2, 512):
                write(sequence, first, first + 512, generator)
            go_on(sequence)
        write(sequence, 1536, LENGTH, generator)
        go_on(sequence)
        sequence.commit()
        go_on()
        _, [*_, reads] = step.run(
            [*([stream] if stream else []), StepRow(sequence, step.join(sequence), 5, policy)]
        )
        assert reads.resident_bytes == reads.attended_bytes == reads.region_bytes > 0
        tier, unit = step.selection.tier, store.geometry.block_bytes
        torch.cuda.synchronize()
        table = tier.table.cpu().view(store.num_slabs, -1)
        slots = tier.kv.cpu().view(-1, unit)
        for slab in sequence.slabs:
            arena = store.slab_kv(slab).view(torch.uint8).view(-1, unit)
            for place in (table[slab] >= 0).nonzero().flatten().tolist():
                assert torch.equal(slots[int(table[slab, place])], arena[place])
    finally:
        step.close()
