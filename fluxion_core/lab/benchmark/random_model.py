"""A model directory of a shape with random weights, a few kB: for nodes that are only to be timed.

    python -m fluxion_core.lab.benchmark.random_model --shape llama-3.1-8b --directory DIRECTORY
    fluxion up --model DIRECTORY --device cuda

Its tokens are bytes; ids above 255 are of the shape's vocabulary and have no text. Prompts of token
ids use all of it. What the nodes do with it: fluxion_core/models/random_weights.py.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from fluxion_core.config.commands import Command, run_module, within
from fluxion_core.errors import ConfigError
from fluxion_core.lab.benchmark.model_shapes import shape_named
from fluxion_core.models.config import ModelConfig
from fluxion_core.models.random_weights import RANDOM_WEIGHTS_FILE

_CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}


def write_random_model(directory: Path, shape: ModelConfig, *, seed: int = 2026) -> None:
    """Write config.json, tokenizer.json and random_weights.json; the directory is made.

    Raises:
        ConfigError: the shape is one that config.json is not written for here.
        OSError: a file cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    files = {"config.json": _entries_of(shape), RANDOM_WEIGHTS_FILE: {"seed": seed}}
    for name, entries in files.items():
        (directory / name).write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
    _byte_tokenizer().save(str(directory / "tokenizer.json"))


def _entries_of(shape: ModelConfig) -> dict[str, object]:
    if shape.rope.scaling is not None:
        raise ConfigError("a shape with scaled rotary frequencies; use one without")
    return {
        "architectures": [_CLASSES[shape.architecture]],
        "model_type": shape.architecture,
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.intermediate_size,
        "rms_norm_eps": shape.rms_norm_eps,
        "rope_theta": shape.rope.theta,
        "max_position_embeddings": shape.context_tokens,
        "tie_word_embeddings": shape.tie_word_embeddings,
        "bos_token_id": shape.bos_token_id,
        "eos_token_id": list(shape.eos_token_ids) or None,
    }


def _byte_tokenizer() -> Tokenizer:
    """A token for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: number for number, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@dataclass(frozen=True, kw_only=True)
class RandomModel(Command):
    """Write a model directory of a shape with random weights, for nodes that are to be timed."""

    shape: str = "llama-3.1-8b"
    """Model shape: llama-3.1-8b, qwen2.5-7b, qwen2.5-1.5b, smollm2-135m or tiny."""
    directory: Path
    """Made, and written to; `fluxion up --model` takes it."""
    layers: Annotated[int | None, within(1)] = None
    """Of the model; the shape's own if not given."""
    seed: Annotated[int, within(0)] = 2026
    """Makes the weights."""

    def __call__(self) -> None:
        """Write the files."""
        write_random_model(self.directory, shape_named(self.shape, self.layers), seed=self.seed)


if __name__ == "__main__":
    sys.exit(run_module(RandomModel))
