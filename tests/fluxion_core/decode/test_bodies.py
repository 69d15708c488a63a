"""Both bodies of a step do what the interface says: prompts in chunks, then steps."""

from __future__ import annotations

import pytest
import torch

from fluxion_core.decode.bodies import step_for
from fluxion_core.decode.step import DecodeStep, StepRow
from fluxion_core.errors import ConfigError, FluxionError
from fluxion_core.kvstore.store import HostKvStore
from fluxion_core.planning.policy import ExactPolicy, FixedPolicy, ThresholdPolicy
from fluxion_core.pool.cpu_pool import CpuPool
from tests.fluxion_core.decode.small_step import CONFIG, WINDOW, random_decoder, store_for
from tests.fluxion_core.planning.random_planner import make_planner, random_network

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    ),
]
PROMPT = [(7 * n * n + n) % CONFIG.vocab_size for n in range(500)]


def body_on(device: str, store: HostKvStore) -> DecodeStep:
    planner = make_planner(
        CONFIG.num_layers,
        CONFIG.num_heads,
        CONFIG.num_kv_heads,
        CONFIG.head_dim,
        network=random_network(0),
    )
    return step_for(random_decoder(device), store, WINDOW, CpuPool(2), planner=planner, max_rows=3)


@pytest.mark.parametrize("device", DEVICES)
def test_a_prompt_in_chunks_its_profile_and_steps_after_it(device: str) -> None:
    store = store_for(16)
    step = body_on(device, store)
    try:
        sequence = store.reserve(PROMPT, 8)
        sequence.begin_prompt()
        ends = []
        for first, end_of_chunk in ((0, 200), (200, 480), (480, 500)):
            chunk = PROMPT[first:end_of_chunk]
            ends.append(step.compute_chunk(sequence, chunk, WINDOW))
        assert ends[:2] == [None, None]
        end = ends[2]
        assert end is not None
        assert end.logits.device.type == "cpu"
        assert end.logits.shape == (CONFIG.vocab_size,)
        # The interface's one promise on numbers: those of the model, computed at once.
        expected = at_once(PROMPT)
        torch.testing.assert_close(end.logits, expected, atol=0.02, rtol=0.02)
        profiles = None
        while profiles is None:
            assert end.profiling is not None
            profiles = step.advance_profile(end.profiling)
        assert len(profiles) == CONFIG.num_layers
        slot = step.join(sequence)
        token = int(end.logits.argmax())
        row = StepRow(sequence, slot, token, ExactPolicy())
        step.check(row)
        logits, reads = step.run([row])
        torch.testing.assert_close(logits[0], at_once([*PROMPT, token]), atol=0.02, rtol=0.02)
        assert reads[0].attended_bytes == reads[0].region_bytes > 0
        step.leave(slot)
    finally:
        step.close()


def at_once(token_ids: list[int]) -> torch.Tensor:
    """Logits after the last token, by a store and a body of its own in which all is one chunk."""
    store = store_for(16)
    step = body_on("cpu", store)
    sequence = store.reserve(token_ids, 0)
    sequence.begin_prompt()
    end = step.compute_chunk(sequence, token_ids, None)
    assert end is not None
    return end.logits


@pytest.mark.parametrize("device", DEVICES)
def test_a_row_that_cannot_take_part_is_refused_alone(device: str) -> None:
    store = store_for(16)
    step = body_on(device, store)
    try:
        sequence = store.reserve(PROMPT[:100], 8)
        sequence.begin_prompt()
        step.compute_chunk(sequence, PROMPT[:100], None)
        slot = step.join(sequence)
        with pytest.raises(FluxionError, match="planner state"):
            step.check(StepRow(sequence, slot, 1, ThresholdPolicy(0.1)))
        step.check(StepRow(sequence, slot, 1, FixedPolicy(16, 0.5)))
    finally:
        step.close()


def test_lanes_that_a_cpu_does_not_have_are_refused() -> None:
    with pytest.raises(ConfigError, match="lanes is gpu"):
        step_for(random_decoder("cpu"), store_for(16), WINDOW, CpuPool(1), lanes="gpu", max_rows=1)


def test_memory_that_a_cpu_does_not_have_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"device_kv_bytes is 4096.*on the CPU; use auto or 0"):
        small_body_on_cpu(4096)
    for setting in (None, 0):
        small_body_on_cpu(setting).close()


def small_body_on_cpu(device_kv_bytes: int | None) -> DecodeStep:
    return step_for(
        random_decoder("cpu"),
        store_for(16),
        WINDOW,
        CpuPool(1),
        max_rows=1,
        device_kv_bytes=device_kv_bytes,
    )
