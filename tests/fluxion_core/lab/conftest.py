"""A small random model whose heads look far back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fluxion_core.geometry import WindowSpec
from fluxion_core.lab.training.workers import Workers
from fluxion_core.models.config import ModelConfig, RopeConfig
from fluxion_core.models.decoder import Decoder

CONFIG = ModelConfig(
    architecture="llama",
    vocab_size=64,
    hidden_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=96,
    rms_norm_eps=1e-5,
    rope=RopeConfig(1e5),
    context_tokens=2048,
    tie_word_embeddings=False,
    attention_bias=False,
    bos_token_id=None,
    eos_token_ids=(),
)


@pytest.fixture(scope="session")
def decoder() -> Decoder:
    decoder = Decoder(CONFIG, torch.device("cpu"), torch.float32)
    generator = torch.Generator().manual_seed(5)
    for parameter in decoder.parameters():
        parameter.requires_grad_(requires_grad=False)
        parameter.normal_(std=0.25, generator=generator)
    return decoder


@pytest.fixture(scope="session")
def token_ids() -> list[int]:
    generator = torch.Generator().manual_seed(6)
    ids: list[int] = torch.randint(0, 64, (1700,), generator=generator).tolist()
    return ids


@pytest.fixture(scope="session")
def window() -> WindowSpec:
    return WindowSpec()


@pytest.fixture
def workers(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> Workers:
    """This process alone, with the toy for its model."""
    monkeypatch.setattr(Workers, "decoder", lambda self: decoder)
    return Workers(1, Path("toy"), "cpu")
