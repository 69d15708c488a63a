"""Hugging Face model directories: config.json and generation_config.json.

What an entry left out means is what it means to transformers. Every other entry is read, known to
change nothing, or refused by name (config_entries.py). Weights are read by safetensors_files.py.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fluxion_core.errors import ModelFileError, UnsupportedModelError
from fluxion_core.models.config import Architecture, ModelConfig
from fluxion_core.models.config_entries import (
    GENERATION_CONFIG,
    MODEL_CONFIG,
    NO_SUGGESTION,
    SAMPLING_SUGGESTIONS,
)
from fluxion_core.models.config_fields import ConfigFields
from fluxion_core.models.json_files import read_json, read_json_if_there, token_ids
from fluxion_core.models.rope_entries import read_rope
from fluxion_core.observe.log import event

_log = logging.getLogger(__name__)
_SILU = ("silu", "swish")


@dataclass(frozen=True)
class _Family:
    """What transformers knows of an architecture, and takes where config.json says nothing."""

    name: Architecture
    class_name: str
    vocab_size: int
    intermediate_size: int
    num_kv_heads: int | None
    """None for as many as there are heads."""
    context_tokens: int
    bos_token_id: int | None
    eos_token_id: int | None


_FAMILIES = (
    _Family("llama", "LlamaForCausalLM", 32_000, 11_008, None, 2_048, 1, 2),
    _Family("qwen2", "Qwen2ForCausalLM", 151_936, 22_016, 32, 32_768, None, None),
)
_HIDDEN, _LAYERS, _HEADS, _EPS = 4_096, 32, 32, 1e-6


def read_config(directory: Path) -> ModelConfig:
    """The model's sizes from config.json and generation_config.json.

    Raises:
        UnsupportedModelError: another architecture, or an entry that asks for what is not
            implemented.
        ModelFileError: an entry is of the wrong type, or entries contradict each other.
    """
    path = directory / "config.json"
    raw = read_json(path)
    family = _family(raw, path)
    MODEL_CONFIG.check(raw, path)
    if raw.get("hidden_act", "silu") not in _SILU:
        raise UnsupportedModelError(f"{path}: hidden_act {raw['hidden_act']!r}; supported: silu")
    fields = ConfigFields(raw, path)
    # Qwen2 always has these biases, and its config does not say so.
    if fields.flag("mlp_bias") or (family.name == "llama" and fields.flag("attention_bias")):
        raise UnsupportedModelError(f"{path}: biases of Llama variants are not supported")
    num_layers = fields.integer("num_hidden_layers", _LAYERS)
    context_tokens = fields.integer("max_position_embeddings", family.context_tokens)
    _check_windows(raw, family, path, num_layers=num_layers, context_tokens=context_tokens)
    hidden = fields.integer("hidden_size", _HIDDEN)
    heads = fields.integer("num_attention_heads", _HEADS)
    # There, but null, is as many as there are heads.
    kv_heads = None if "num_key_value_heads" in raw else family.num_kv_heads
    vocab_size = fields.integer("vocab_size", family.vocab_size)
    bos, eos = _special_token_ids(directory, raw, family)
    for token_id in (*bos, *eos):
        if token_id >= vocab_size:
            raise ModelFileError(f"{path}: special token {token_id} of {vocab_size} tokens")
    return ModelConfig(
        architecture=family.name,
        vocab_size=vocab_size,
        hidden_size=hidden,
        num_layers=num_layers,
        num_heads=heads,
        num_kv_heads=fields.size("num_key_value_heads", kv_heads or heads),
        head_dim=fields.size("head_dim", hidden // max(heads, 1)),
        intermediate_size=fields.integer("intermediate_size", family.intermediate_size),
        rms_norm_eps=fields.number("rms_norm_eps", _EPS),
        rope=read_rope(raw, path),
        context_tokens=context_tokens,
        tie_word_embeddings=fields.flag("tie_word_embeddings"),
        attention_bias=family.name == "qwen2",
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=eos,
    )


def _family(raw: Mapping[str, object], path: Path) -> _Family:
    """By class and by type, which must agree: transformers goes by the type."""
    architectures, kind = raw.get("architectures"), raw.get("model_type")
    named = [str(name) for name in architectures] if isinstance(architectures, list) else []
    for family in _FAMILIES:
        # Either may be left out.
        if (named or kind) and set(named) <= {family.class_name} and kind in (None, family.name):
            return family
    raise UnsupportedModelError(
        f"{path}: architectures {architectures}, model_type {kind!r}; supported: "
        f"{', '.join(f'{each.class_name} ({each.name})' for each in _FAMILIES)}"
    )


def _check_windows(
    raw: Mapping[str, object],
    family: _Family,
    path: Path,
    *,
    num_layers: int,
    context_tokens: int,
) -> None:
    """Attention reads everything: a window anywhere is refused.

    Raises:
        UnsupportedModelError: some layer attends over a window, or is of another kind.
    """
    fields = ConfigFields(raw, path)
    kinds = raw.get("layer_types")
    if kinds is not None:
        if not isinstance(kinds, list) or len(kinds) != num_layers:
            raise ModelFileError(f"{path}: layer_types has not {num_layers} entries, one a layer")
        if others := {str(kind) for kind in kinds} - {"full_attention", "attention"}:
            raise UnsupportedModelError(f"{path}: layers of kind {', '.join(sorted(others))}")
        return
    window = raw.get("sliding_window", 4_096 if family.name == "qwen2" else None)
    is_on = window is not None and fields.flag("use_sliding_window", family.name != "qwen2")
    # Llama of transformers knows no windows, but whoever states one wants it.
    first = fields.integer("max_window_layers", 28) if family.name == "qwen2" else 0
    if is_on and first < num_layers and fields.integer("sliding_window", 4_096) < context_tokens:
        raise UnsupportedModelError(f"{path}: sliding-window attention is not supported")


def _special_token_ids(
    directory: Path, raw: Mapping[str, object], family: _Family
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Beginning and ends of text. Of the ends, those of both files count."""
    path, generation_path = directory / "config.json", directory / "generation_config.json"
    generation = read_json_if_there(generation_path)
    GENERATION_CONFIG.check(generation, generation_path)
    _say_what_is_suggested(generation, generation_path)
    bos = token_ids(raw.get("bos_token_id", family.bos_token_id), path)
    ends = {
        *token_ids(raw.get("eos_token_id"), path),
        *token_ids(generation.get("eos_token_id"), generation_path),
    }
    if not ends and "eos_token_id" not in raw and family.eos_token_id is not None:
        _log.warning(
            event(
                "config names no end of text; taken as in transformers",
                file=path,
                eos=family.eos_token_id,
            )
        )
        ends = {family.eos_token_id}
    return bos, tuple(sorted(ends))


def _say_what_is_suggested(generation: Mapping[str, object], path: Path) -> None:
    """How the model's makers would sample: a request says that itself."""
    suggested = {
        name: value
        for name, value in generation.items()
        if name in SAMPLING_SUGGESTIONS and value not in NO_SUGGESTION[name]
    }
    if suggested:
        words = ", ".join(f"{name} {value!r:.60}" for name, value in sorted(suggested.items()))
        _log.info(
            event("sampling is what requests say; the model suggests", file=path, values=words)
        )
