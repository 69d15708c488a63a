"""The benchmark of follow-ups runs, and its figures belong together."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fluxion_core.lab.benchmark.follow_up import run_follow_ups
from fluxion_core.lab.benchmark.model_shapes import random_decoder, shape_named
from fluxion_core.models.decoder import Decoder


@pytest.fixture
def decoder() -> Decoder:
    tiny = replace(
        shape_named("qwen2.5-7b", 2),
        hidden_size=64,
        intermediate_size=128,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        vocab_size=64,
    )
    decoder = random_decoder(tiny, torch.device("cpu"))
    return decoder.float()


def test_each_turn_goes_on_from_the_one_before(decoder: Decoder):
    figures = run_follow_ups(decoder, stored=1024, new=40, turns=3, threads=1)
    # By hand: 40 tokens on a CPU are a chunk of 32 and one of 8.
    assert (figures.stored, figures.new, figures.turns, figures.calls) == (1024, 40, 2, 2)
    assert figures.longest_first_token_ms >= figures.first_token_ms > 0
    assert figures.second_token_ms > 0
    assert figures.gathered_bytes == figures.stream_gap_ms == figures.longest_stream_gap_ms == 0


def test_streams_go_on_beside_it(decoder: Decoder):
    figures = run_follow_ups(decoder, stored=512, new=40, turns=2, streams=2, threads=1)
    assert (figures.streams, figures.turns, figures.calls) == (2, 1, 2)
    assert figures.stream_gap_ms > 0
    # The last token waits for the last chunk and for the step after it.
    assert figures.longest_stream_gap_ms > figures.second_token_ms
