"""A prompt's own time, by hand."""

from __future__ import annotations

import pytest

from fluxion_core.models.config import ModelConfig, RopeConfig
from services.prefill.own_time import OwnTime

# By hand: a layer's matrices have 16 * 8 * 2 * (2 + 1) + 3 * 16 * 32 = 2,304 weights, both 4,608;
# a token takes 9,216 operations, and 4 * 2 * 8 * 2 = 128 more for each one before it.
CONFIG = ModelConfig(
    architecture="llama",
    vocab_size=64,
    hidden_size=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    intermediate_size=32,
    rms_norm_eps=1e-5,
    rope=RopeConfig(theta=10000.0),
    context_tokens=1024,
    tie_word_embeddings=True,
    attention_bias=False,
    bos_token_id=None,
    eos_token_ids=(),
)


def test_a_prompts_own_time_grows_with_the_square_of_its_length():
    own_time = OwnTime(CONFIG)
    assert own_time.seconds(144) == 0
    # 144 tokens: 144 * (9,216 + 72 * 128) = 144 * 18,432 operations.
    own_time.learn(0, 144, seconds=2.0)
    assert own_time.seconds(144) == pytest.approx(2.0)
    # 288 tokens: twice as many, and 9,216 + 144 * 128 = 27,648 operations each.
    assert own_time.seconds(288) == pytest.approx(2.0 * 2 * 27_648 / 18_432)


def test_a_chunk_behind_others_counts_what_it_attends_to():
    own_time = OwnTime(CONFIG)
    # Behind 144 tokens: 9,216 + (144 + 72) * 128 = 36,864 operations each.
    own_time.learn(144, 144, seconds=4.0)
    assert own_time.seconds(144) == pytest.approx(2.0)


def test_later_chunks_count_more_and_small_ones_little():
    own_time = OwnTime(CONFIG)
    own_time.learn(0, 144, seconds=2.0)
    own_time.learn(0, 144, seconds=4.0)
    # (0.9 * 2 + 4) seconds for 1.9 times the operations.
    assert own_time.seconds(144) == pytest.approx(5.8 / 1.9)
    own_time = OwnTime(CONFIG)
    own_time.learn(0, 144, seconds=2.0)
    # One token: 9,280 of 144 * 18,432 operations, ten times as slow.
    share = 9_280 / (144 * 18_432)
    own_time.learn(0, 1, seconds=2.0 * share * 10)
    assert own_time.seconds(144) == pytest.approx(2.0 * (0.9 + 10 * share) / (0.9 + share))
