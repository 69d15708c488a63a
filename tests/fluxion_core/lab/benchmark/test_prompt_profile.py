"""The benchmark of profiles beside a stream runs, and its figures belong together."""

from __future__ import annotations

from dataclasses import replace

from fluxion_core.lab.benchmark.model_shapes import shape_named
from fluxion_core.lab.benchmark.prompt_profile import prefill_seconds, run_profile


def test_a_profile_is_made_between_a_streams_steps():
    shape = shape_named("qwen2.5-7b", 2)
    tiny = replace(
        shape,
        hidden_size=64,
        intermediate_size=128,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        vocab_size=64,
    )
    figures = run_profile(tiny, "tiny", tokens=1024, steps=2, threads=1)
    assert (figures.num_layers, figures.tokens, figures.threads) == (2, 1024, 1)
    assert figures.slices > 1
    assert figures.longest_slice_ms >= figures.slice_ms > 0
    assert figures.gap_beside_ms > figures.slice_ms
    assert figures.layer_cpu_seconds * 2 == figures.cpu_seconds > 0
    assert figures.estimator_layer_cpu_seconds > 0
    assert prefill_seconds(tiny, 64) > 0
