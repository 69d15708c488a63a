"""Hugging Face model directories: config.json and safetensors files, one or several."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import cast

from safetensors import SafetensorError, safe_open
from torch import Tensor

from fluxion_core.errors import ModelFileError, UnsupportedModelError
from fluxion_core.models.config import (
    Architecture,
    LinearScaling,
    Llama3Scaling,
    ModelConfig,
    RopeConfig,
)

_ARCHITECTURES = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2"}
INDEX_NAME = "model.safetensors.index.json"


def read_json(path: Path) -> dict[str, object]:
    """A JSON object from a file.

    Raises:
        ModelFileError: missing, no JSON, or no object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelFileError(f"{path}: {error}") from None
    if not isinstance(value, dict):
        raise ModelFileError(f"{path}: holds no JSON object")
    return value


def read_config(directory: Path) -> ModelConfig:
    """The model's sizes from config.json and generation_config.json.

    Raises:
        UnsupportedModelError: another architecture, activation or rotary scaling.
        ModelFileError: an entry is missing or of the wrong type.
    """
    path = directory / "config.json"
    raw = read_json(path)
    fields = _Fields(raw, path)
    architectures = raw.get("architectures") or []
    known = [_ARCHITECTURES[a] for a in cast(list[str], architectures) if a in _ARCHITECTURES]
    if not known:
        raise UnsupportedModelError(
            f"{path}: architectures {architectures}; supported: {', '.join(_ARCHITECTURES)}"
        )
    if raw.get("hidden_act", "silu") != "silu":
        raise UnsupportedModelError(f"{path}: hidden_act {raw['hidden_act']!r}; supported: silu")
    if raw.get("use_sliding_window"):
        raise UnsupportedModelError(f"{path}: sliding-window attention is not supported")
    architecture = cast(Architecture, known[0])
    # Qwen2 always has these biases, and its config does not say so.
    if raw.get("mlp_bias") or (architecture == "llama" and raw.get("attention_bias")):
        raise UnsupportedModelError(f"{path}: biases of Llama variants are not supported")
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    return ModelConfig(
        architecture=architecture,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        num_layers=fields.integer("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=fields.integer("num_key_value_heads", heads),
        head_dim=fields.integer("head_dim", hidden // max(heads, 1)),
        intermediate_size=fields.integer("intermediate_size"),
        rms_norm_eps=fields.number("rms_norm_eps"),
        rope=_rope(raw, path),
        context_tokens=fields.integer("max_position_embeddings"),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        attention_bias=architecture == "qwen2",
        bos_token_id=_first(_token_ids(raw.get("bos_token_id"), path)),
        eos_token_ids=_eos_token_ids(directory, raw),
    )


def read_tensors(directory: Path, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Every weight, one at a time, in the file's dtype.

    Raises:
        ModelFileError: a file is missing, truncated or malformed.
    """
    for path in weight_files(directory):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - no mapping
                    # Copies of what is tied or computed, which some exporters write.
                    if name.endswith("rotary_emb.inv_freq") or (
                        name == "lm_head.weight" and config.tie_word_embeddings
                    ):
                        continue
                    yield name, file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ModelFileError(
                f"{path}: damaged or truncated safetensors file ({error}); fetch it again"
            ) from None


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model directory, in a fixed order.

    Raises:
        ModelFileError: there are none, or the index names one that is missing.
    """
    index = directory / INDEX_NAME
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ModelFileError(f"{index}: has no weight_map")
        files = [directory / Path(str(name)).name for name in sorted(set(weight_map.values()))]
    else:
        files = sorted(directory.glob("*.safetensors"))
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        what = f"lacks {', '.join(missing)}" if missing else "holds no safetensors file"
        raise ModelFileError(f"{directory} {what}; fetch the model again")
    return files


def revision_hash(directory: Path) -> str:
    """SHA-256 over config.json and all weight files, hex."""
    total = hashlib.sha256()
    for path in [directory / "config.json", *weight_files(directory)]:
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


class _Fields:
    """Typed look-ups in a config."""

    def __init__(self, raw: Mapping[str, object], path: Path) -> None:
        self._raw = raw
        self._path = path

    def number(self, name: str, default: float | None = None) -> float:
        value = self._raw.get(name)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ModelFileError(f"{self._path}: {name} is {value!r}; must be a number")
        return value

    def integer(self, name: str, default: int | None = None) -> int:
        return int(self.number(name, default))


def _rope(raw: Mapping[str, object], path: Path) -> RopeConfig:
    # Older configs have rope_theta and rope_scaling, newer ones rope_parameters.
    parameters = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(parameters, dict):
        raise ModelFileError(f"{path}: rotary settings are {parameters!r}; must be an object")
    fields = _Fields(parameters, path)
    theta = fields.number("rope_theta", _Fields(raw, path).number("rope_theta", 10_000.0))
    match parameters.get("rope_type", parameters.get("type", "default")):
        case "default":
            return RopeConfig(theta)
        case "linear":
            return RopeConfig(theta, LinearScaling(fields.number("factor")))
        case "llama3":
            return RopeConfig(
                theta,
                Llama3Scaling(
                    factor=fields.number("factor"),
                    low_freq_factor=fields.number("low_freq_factor"),
                    high_freq_factor=fields.number("high_freq_factor"),
                    original_context_tokens=fields.integer("original_max_position_embeddings"),
                ),
            )
        case other:
            raise UnsupportedModelError(
                f"{path}: rotary scaling {other!r}; supported: default, linear, llama3"
            )


def _eos_token_ids(directory: Path, raw: Mapping[str, object]) -> tuple[int, ...]:
    generation = directory / "generation_config.json"
    ids = set(_token_ids(raw.get("eos_token_id"), directory / "config.json"))
    if generation.is_file():
        ids |= set(_token_ids(read_json(generation).get("eos_token_id"), generation))
    return tuple(sorted(ids))


def _token_ids(value: object, path: Path) -> tuple[int, ...]:
    if value is None:
        return ()
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(item, int) for item in values):
        raise ModelFileError(f"{path}: token ids are {value!r}; must be integers")
    return tuple(cast(list[int], values))


def _first(ids: tuple[int, ...]) -> int | None:
    return ids[0] if ids else None
