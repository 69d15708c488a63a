"""Whole prompts: what comes of them does not depend on chunks, and their KV leaves in frames."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fluxion_core.geometry import BLOCK_TOKENS, KvGeometry, WindowSpec
from fluxion_core.kvstream.handoff import Frame
from fluxion_core.models.config import ModelConfig, RopeConfig
from fluxion_core.models.decoder import Decoder
from fluxion_core.prompt.compute import compute_prompt

CONFIG = ModelConfig(
    architecture="llama",
    vocab_size=97,
    hidden_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=96,
    rms_norm_eps=1e-5,
    rope=RopeConfig(1e4),
    context_tokens=2048,
    tie_word_embeddings=False,
    attention_bias=False,
    bos_token_id=None,
    eos_token_ids=(0,),
)
GEOMETRY = KvGeometry(num_layers=2, num_kv_heads=2, head_dim=16)
TOKENS = 133


def random_decoder(dtype: torch.dtype) -> Decoder:
    decoder = Decoder(CONFIG, torch.device("cpu"), dtype)
    generator = torch.Generator().manual_seed(5)
    for parameter in decoder.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return decoder


@pytest.fixture(scope="module")
def token_ids() -> list[int]:
    ids: list[int] = torch.randint(
        0, 97, (TOKENS,), generator=torch.Generator().manual_seed(6)
    ).tolist()
    return ids


def kv_of(frames: list[Frame]) -> Tensor:
    """[layers, 2, kv_heads, tokens, head_dim] of the bytes that left."""
    kv = torch.zeros(2, 2, 2, TOKENS, 16, dtype=torch.bfloat16)
    for frame in frames:
        payload = torch.from_numpy(np.frombuffer(frame.payload, np.uint8).copy())
        blocked = payload.view(torch.bfloat16).view(2, -1, 2, BLOCK_TOKENS, 16)
        of_frame = blocked.permute(2, 0, 1, 3, 4).flatten(2, 3)[:, :, : frame.num_tokens]
        place = slice(frame.first_token, frame.first_token + frame.num_tokens)
        kv[frame.layer, :, :, place] = of_frame
    return kv


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_tokens", [16, 48, 1024])
def test_what_comes_of_a_prompt_is_what_one_pass_gives(
    token_ids: list[int], dtype: torch.dtype, chunk_tokens: int
):
    decoder = random_decoder(dtype)
    frames: list[Frame] = []
    found = compute_prompt(
        decoder,
        GEOMETRY,
        token_ids,
        emit=frames.append,
        profile_window=WindowSpec(),
        chunk_tokens=chunk_tokens,
    )
    whole = compute_prompt(decoder, GEOMETRY, token_ids)
    assert found.logits.dtype == torch.float32
    error = 1e-4 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(found.logits, whole.logits, atol=error, rtol=error)
    torch.testing.assert_close(found.kv, whole.kv, atol=2e-2, rtol=2e-2)
    assert torch.equal(kv_of(frames), found.kv)
    assert (len(found.profiles), whole.profiles) == (2, [])


def test_a_prompt_computed_outside_of_inference_mode_can_be_differentiated(token_ids: list[int]):
    # Training weighs heads by gradients over the KV of a text.
    kv = compute_prompt(random_decoder(torch.float32), GEOMETRY, token_ids).kv.float()
    weight = torch.ones(16, requires_grad=True)
    (kv * weight).sum().backward()
    assert weight.grad is not None
