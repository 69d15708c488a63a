"""The rival on a GPU machine: transformers with its offloaded cache, exact, random weights.

python -m fluxion_core.lab.benchmark.offloaded_cache --context 131072 --steps 4
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from statistics import median
from typing import Annotated

import torch

from fluxion_core.config.commands import Command, run_module, within
from fluxion_core.lab.benchmark.model_shapes import shape_named


def offloaded_step_seconds(shape: str, context: int, steps: int) -> float:
    """Median seconds of a step at batch 1. Needs transformers, and a GPU for the dense part.

    Args:
        shape: of `model_shapes`; of the Llama family.
        context: tokens in the cache; their KV is random.
        steps: that count, after one that does not.
    """
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    config = shape_named(shape)
    model_config = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        max_position_embeddings=2 * context,
        dtype="bfloat16",
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(model_config)
    cache = DynamicCache(config=model_config, offloading=True)
    size = (1, config.num_kv_heads, context, config.head_dim)
    for layer in range(config.num_layers):
        cache.update(torch.randn(size, device="cuda"), torch.randn(size, device="cuda"), layer)
    seconds = []
    for step in range(steps + 1):
        start = time.perf_counter()
        with torch.inference_mode():
            output = model(
                torch.tensor([[step]], device="cuda"),
                past_key_values=cache,
                use_cache=True,
                cache_position=torch.tensor([context + step], device="cuda"),
            )
            output.logits[0, -1].argmax().item()
        seconds.append(time.perf_counter() - start)
    return median(seconds[1:])


@dataclass(frozen=True, kw_only=True)
class OffloadedCacheBench(Command):
    """Time a step of transformers with its offloaded cache; prints JSON."""

    shape: str = "llama-3.1-8b"
    """Model shape of the Llama family, with random weights."""
    context: Annotated[int, within(1)] = 131_072
    """Tokens in the cache."""
    steps: Annotated[int, within(1)] = 4
    """That count, after one that does not."""

    def __call__(self) -> None:
        """Print the figures."""
        seconds = offloaded_step_seconds(self.shape, self.context, self.steps)
        figures = {"shape": self.shape, "context": self.context, "milliseconds": seconds * 1e3}
        print(json.dumps(figures))


if __name__ == "__main__":
    sys.exit(run_module(OffloadedCacheBench))
