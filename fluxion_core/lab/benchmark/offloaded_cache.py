"""The rival on a GPU machine: transformers with its offloaded cache, exact, random weights.

python -m fluxion_core.lab.benchmark.offloaded_cache context=131072 steps=4
"""

from __future__ import annotations

import json
import sys
import time
from statistics import median

import torch

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


def main() -> None:
    """The command."""
    words = dict(argument.split("=", 1) for argument in sys.argv[1:])
    shape = words.get("shape", "llama-3.1-8b")
    context = int(words.get("context", "131072"))
    seconds = offloaded_step_seconds(shape, context, int(words.get("steps", "4")))
    print(json.dumps({"shape": shape, "context": context, "milliseconds": seconds * 1e3}))


if __name__ == "__main__":
    main()
