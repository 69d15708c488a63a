"""Sizes that contradict each other are refused where they are made."""

from __future__ import annotations

import pytest

from fluxion_core.errors import ModelFileError
from fluxion_core.models.config import FactorScaling, ModelConfig, RopeConfig

SOUND = {
    "architecture": "llama",
    "vocab_size": 50,
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "rms_norm_eps": 1e-5,
    "rope": RopeConfig(1e4, FactorScaling((1.0,) * 4)),
    "context_tokens": 64,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "bos_token_id": None,
    "eos_token_ids": (),
}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_layers": 0}, "num_layers is 0; must be positive"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"num_kv_heads": 3}, "4 heads are no multiple of 3 KV heads"),
        ({"head_dim": 7}, "head_dim 7 is odd"),
        ({"head_dim": 16}, "4 rotary factors; head_dim 16 needs 8"),
    ],
)
def test_a_contradiction_is_refused(changes, sentence):
    ModelConfig(**SOUND)
    with pytest.raises(ModelFileError, match=sentence):
        ModelConfig(**{**SOUND, **changes})
