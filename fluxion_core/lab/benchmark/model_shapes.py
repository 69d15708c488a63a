"""Shapes of models that are timed with random weights and synthetic KV."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch

from fluxion_core.errors import ConfigError
from fluxion_core.geometry import BLOCK_TOKENS
from fluxion_core.kvstore.sequence import SequenceKv
from fluxion_core.kvstore.store import HostKvStore
from fluxion_core.models.config import ModelConfig, RopeConfig
from fluxion_core.models.decoder import Decoder
from fluxion_core.models.random_weights import draw_weights

LLAMA_8B = ModelConfig(
    architecture="llama",
    vocab_size=128_256,
    hidden_size=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    intermediate_size=14_336,
    rms_norm_eps=1e-5,
    rope=RopeConfig(theta=500_000.0),
    context_tokens=131_072,
    tie_word_embeddings=False,
    attention_bias=False,
    bos_token_id=None,
    eos_token_ids=(),
)
"""Llama-3.1-8B."""

QWEN_7B = replace(
    LLAMA_8B,
    architecture="qwen2",
    vocab_size=152_064,
    hidden_size=3584,
    num_layers=28,
    num_heads=28,
    num_kv_heads=4,
    intermediate_size=18_944,
    rms_norm_eps=1e-6,
    rope=RopeConfig(theta=1_000_000.0),
    attention_bias=True,
)
"""Qwen2.5-7B."""

QWEN_1_5B = replace(
    QWEN_7B,
    vocab_size=151_936,
    hidden_size=1536,
    num_heads=12,
    num_kv_heads=2,
    intermediate_size=8960,
)
"""Qwen2.5-1.5B."""

SMOLLM2 = replace(
    LLAMA_8B,
    vocab_size=49_152,
    hidden_size=576,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    intermediate_size=1536,
)
"""SmolLM2-135M."""

TINY = replace(
    LLAMA_8B,
    vocab_size=512,
    hidden_size=64,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    intermediate_size=128,
)
"""No model's: a bench's own test on a CPU."""

SHAPES = {
    "llama-3.1-8b": LLAMA_8B,
    "qwen2.5-7b": QWEN_7B,
    "qwen2.5-1.5b": QWEN_1_5B,
    "smollm2-135m": SMOLLM2,
    "tiny": TINY,
}

_CHUNK_SLABS = 4


def shape_named(name: str, num_layers: int | None = None) -> ModelConfig:
    """A shape; with fewer layers if asked for.

    Raises:
        ConfigError: there is none of this name.
    """
    if name not in SHAPES:
        raise ConfigError(f"model shape {name!r}; one of: {', '.join(SHAPES)}")
    shape = SHAPES[name]
    return shape if num_layers is None else replace(shape, num_layers=num_layers)


def random_decoder(config: ModelConfig, device: torch.device) -> Decoder:
    """A decoder with random bfloat16 weights, scaled so that activations stay finite."""
    decoder = Decoder(config, device, torch.bfloat16)
    draw_weights(decoder, seed=0)
    return decoder


def fill_sequences(
    store: HostKvStore,
    lengths: Sequence[int],
    new_tokens: int,
    *,
    threads: int,
    seed: int = 0,
    first_id: int = 0,
) -> list[SequenceKv]:
    """Sequences of these lengths whose KV is random, digests and all; no two share memory.

    Every piece of every layer is written as a hand-off writes it, from one random payload: the
    bytes repeat, the memory does not. Sequences of one store must not begin with the same token:
    they do with `first_id` and those that follow it.
    """
    geometry = store.geometry
    chunk = _CHUNK_SLABS * geometry.slab_tokens
    generator = torch.Generator().manual_seed(seed)
    shape = (geometry.num_kv_heads, chunk // BLOCK_TOKENS, 2, BLOCK_TOKENS, geometry.head_dim)
    payload = torch.randn(shape, generator=generator).bfloat16()
    whole = payload.view(torch.uint8).numpy().tobytes()
    sequences = []
    jobs: list[Callable[[], None]] = []
    for index, length in enumerate(lengths):
        if length % BLOCK_TOKENS:
            raise ConfigError(f"a synthetic sequence of {length} tokens; use multiples of 16")
        sequence = store.reserve([first_id + index, *range(1, length)], new_tokens)
        sequence.grow_for_prompt()
        sequences.append(sequence)

        def write(sequence: SequenceKv = sequence, length: int = length, layer: int = 0) -> None:
            for first in range(0, length, chunk):
                tokens = min(chunk, length - first)
                part = whole
                if tokens < chunk:
                    blocks = tokens // BLOCK_TOKENS
                    part = payload[:, :blocks].contiguous().view(torch.uint8).numpy().tobytes()
                sequence.write_blocks(layer, first, tokens, part)

        jobs += [
            lambda write=write, layer=layer: write(layer=layer)  # type: ignore[misc]
            for layer in range(geometry.num_layers)
        ]
    with ThreadPoolExecutor(threads) as executor:
        for done in [executor.submit(job) for job in jobs]:
            done.result()
    for sequence in sequences:
        sequence.commit()
    return sequences
