"""`fluxion bench decode-step`: the model, the prompt and transformers for the benchmark.

What is measured, and how: fluxion_core/lab/benchmark/decode_step.py.
"""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console

from fluxion_core import DISTRIBUTION
from fluxion_core.errors import ConfigError, InvalidRequestError
from fluxion_core.generation.tokenizer import Tokenizer
from fluxion_core.lab.benchmark.decode_step import run_decode_step_bench
from fluxion_core.models.weights import load_model
from fluxion_core.planning.planner_weights import load_planner_weights, shipped_planner_weights
from services.cli.commands.bench_decode_step import BenchDecodeStep
from services.cli.demo import load_document


def bench_decode_step(console: Console, options: BenchDecodeStep) -> dict[str, object]:
    """Load the model, take the demo's document as the prompt, measure.

    Raises:
        ModelError: the model is not there or cannot be used.
        InvalidRequestError: more tokens than the model's context has.
        ConfigError: transformers is asked for and not installed, an unknown policy, or predictor
            weights that cannot be read or are of another model.
    """
    path = options.locate()
    loaded = load_model(path, device=torch.device("cpu"), dtype=torch.float32)
    context = loaded.config.context_tokens
    tokens, steps, weights = options.tokens, options.steps, options.weights
    digest_bits = options.digest_bits
    if tokens + steps + 2 > context:
        raise InvalidRequestError(f"{tokens} tokens and {steps} steps; the context has {context}")
    document = Tokenizer.load(path).encode(load_document())
    token_ids = (document * (tokens // len(document) + 1))[:tokens]
    return run_decode_step_bench(
        console,
        loaded.decoder,
        token_ids,
        model=loaded.name,
        revision=loaded.revision_hash,
        steps=steps,
        policies=options.policy,
        transformers_model=_load_transformers(path) if options.transformers else None,
        digest_bits=digest_bits,
        weights=(
            load_planner_weights(weights, digest_bits=digest_bits)
            if weights is not None
            else shipped_planner_weights(loaded.revision_hash, digest_bits=digest_bits)
        ),
    )


def _load_transformers(path: Path) -> torch.nn.Module:
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        raise ConfigError(
            f"transformers is not installed; "
            f"pip install '{DISTRIBUTION}[test]' or --no-transformers"
        ) from None
    if path.is_dir():
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    else:
        model = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32
        )
    evaluated: torch.nn.Module = model.train(mode=False)
    return evaluated
