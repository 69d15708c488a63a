"""A small model with random weights, and sequences with random KV, for tests of a GPU's steps."""

from __future__ import annotations

import torch

from fluxion_core.geometry import BLOCK_TOKENS, KvGeometry, WindowSpec, ceil_div
from fluxion_core.kvstore.sequence import SequenceKv
from fluxion_core.kvstore.store import HostKvStore
from fluxion_core.models.config import ModelConfig, RopeConfig
from fluxion_core.models.decoder import Decoder

WINDOW = WindowSpec()
CONFIG = ModelConfig(
    architecture="llama",
    hidden_size=256,
    intermediate_size=512,
    num_layers=3,
    num_heads=8,
    num_kv_heads=2,
    head_dim=64,
    vocab_size=512,
    rms_norm_eps=1e-5,
    rope=RopeConfig(theta=10_000.0),
    context_tokens=8192,
    tie_word_embeddings=True,
    attention_bias=False,
    bos_token_id=None,
    eos_token_ids=(),
)


def random_decoder(device: str) -> Decoder:
    """In float32; the same weights on every device."""
    decoder = Decoder(CONFIG, torch.device(device), torch.float32)
    generator = torch.Generator().manual_seed(1)
    for weight in decoder.parameters():
        scale = 1.0 if weight.dim() == 1 else weight.shape[-1] ** -0.5
        weight.data.copy_(torch.randn(weight.shape, generator=generator) * scale)
    return decoder


def store_for(digest_bits: int, size_bytes: int = 64 << 20) -> HostKvStore:
    """For KV of the model."""
    geometry = KvGeometry(
        CONFIG.num_layers, CONFIG.num_kv_heads, CONFIG.head_dim, digest_bits=digest_bits
    )
    return HostKvStore(geometry, size_bytes, model_key=b"")


def random_sequence(
    store: HostKvStore, length: int, new_tokens: int, generator: torch.Generator, *, first: int = 0
) -> SequenceKv:
    """Committed. Its prompt is 1, 2, 3… behind `first`: another one, another prompt; one that has
    been, and what is stored of it is shared."""
    geometry = store.geometry
    sequence = store.reserve([first, *range(1, length)], new_tokens)
    begin = sequence.kv_from_token
    blocks = ceil_div(length - begin, BLOCK_TOKENS)
    for layer in range(geometry.num_layers):
        shape = (geometry.num_kv_heads, blocks, 2, BLOCK_TOKENS, geometry.head_dim)
        payload = torch.randn(shape, generator=generator).bfloat16()
        if length % BLOCK_TOKENS:
            payload[:, -1, :, length % BLOCK_TOKENS :] = 0
        written = payload.view(torch.uint8).numpy().tobytes()
        sequence.write_blocks(layer, begin, length - begin, written)
    sequence.commit()
    return sequence
