"""Hugging Face model directories: config.json and safetensors files, one or several."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import isfinite
from pathlib import Path
from typing import cast

from safetensors import SafetensorError, safe_open
from torch import Tensor

from fluxion_core.errors import ModelFileError, UnsupportedModelError
from fluxion_core.json_files import read_json, token_ids
from fluxion_core.models.config import (
    Architecture,
    LinearScaling,
    Llama3Scaling,
    ModelConfig,
    RopeConfig,
)

_ARCHITECTURES = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2"}
INDEX_NAME = "model.safetensors.index.json"
_DTYPES = ("F32", "F16", "BF16")
_NUMBER_LIMIT = 1 << 63


def read_config(directory: Path) -> ModelConfig:
    """The model's sizes from config.json and generation_config.json.

    Raises:
        UnsupportedModelError: another architecture, activation or rotary scaling.
        ModelFileError: an entry is missing or of the wrong type.
    """
    path = directory / "config.json"
    raw = read_json(path)
    fields = _Fields(raw, path)
    architectures = raw.get("architectures")
    named = architectures if isinstance(architectures, list) else []
    known = [kind for name, kind in _ARCHITECTURES.items() if name in named]
    if not known:
        raise UnsupportedModelError(
            f"{path}: architectures {architectures}; supported: {', '.join(_ARCHITECTURES)}"
        )
    if raw.get("hidden_act", "silu") != "silu":
        raise UnsupportedModelError(f"{path}: hidden_act {raw['hidden_act']!r}; supported: silu")
    if raw.get("quantization_config"):
        raise UnsupportedModelError(f"{path}: quantised safetensors are not supported; use GGUF")
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
        bos_token_id=_first(token_ids(raw.get("bos_token_id"), path)),
        eos_token_ids=_eostoken_ids(directory, raw),
    )


class SafetensorsWeights:
    """The weights of a directory's safetensors files.

    Raises:
        ModelFileError: a file is missing, truncated or malformed, or a tensor comes twice.
        UnsupportedModelError: a tensor is not of a floating-point dtype.
    """

    def __init__(self, directory: Path, config: ModelConfig) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._files: dict[str, safe_open] = {}
        for path in weight_files(directory):
            try:
                self._add(path, config)
            except (SafetensorError, OSError) as error:
                raise ModelFileError(
                    f"{path}: damaged or truncated safetensors file ({error}); fetch it again"
                ) from None

    def pieces(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """One weight in the file's dtype, as (0, all rows): a view of the mapped file."""
        yield 0, cast(Tensor, self._files[name].get_tensor(name))  # type: ignore[no-untyped-call]

    def _add(self, path: Path, config: ModelConfig) -> None:
        file = safe_open(path, framework="pt")
        for name in cast(list[str], file.keys()):  # type: ignore[no-untyped-call]
            # Copies of what is tied or computed, which some exporters write.
            if name.endswith("rotary_emb.inv_freq") or (
                name == "lm_head.weight" and config.tie_word_embeddings
            ):
                continue
            if name in self._files:
                raise ModelFileError(f"{path}: tensor {name} comes twice")
            entry = file.get_slice(name)  # type: ignore[no-untyped-call]
            if entry.get_dtype() not in _DTYPES:
                raise UnsupportedModelError(
                    f"{path}: tensor {name} is {entry.get_dtype()}; supported: {', '.join(_DTYPES)}"
                )
            self._files[name] = file
            self.shapes[name] = tuple(entry.get_shape())


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
        names = list(weight_map.values())
        if not all(isinstance(name, str) for name in names):
            raise ModelFileError(f"{index}: weight_map names files that are no text")
        files = [directory / Path(name).name for name in sorted(set(names))]
    else:
        files = sorted(directory.glob("*.safetensors"))
    try:
        missing = [file.name for file in files if not file.is_file()]
    except OSError as error:
        # Of a name that no file can have.
        raise ModelFileError(f"{index}: {error.strerror}") from None
    if missing or not files:
        what = f"lacks {', '.join(missing)}" if missing else "holds no safetensors file"
        raise ModelFileError(f"{directory} {what}; fetch the model again")
    return files


class _Fields:
    """Typed look-ups in a config."""

    def __init__(self, raw: Mapping[str, object], path: Path) -> None:
        self._raw = raw
        self._path = path

    def number(self, name: str, default: float | None = None) -> float:
        value = self._raw.get(name)
        if value is None and default is not None:
            return default
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            # Integers of JSON may be too large for a float.
            or not (abs(value) < _NUMBER_LIMIT if isinstance(value, int) else isfinite(value))
        ):
            raise ModelFileError(f"{self._path}: {name} is {value!r:.60}; must be a number")
        return value

    def integer(self, name: str, default: int | None = None) -> int:
        value = self.number(name, default)
        if value != int(value):
            raise ModelFileError(f"{self._path}: {name} is {value!r}; must be an integer")
        return int(value)


def _rope(raw: Mapping[str, object], path: Path) -> RopeConfig:
    # Older configs have rope_theta and rope_scaling, newer ones rope_parameters.
    parameters = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(parameters, dict):
        raise ModelFileError(f"{path}: rotary settings are {parameters!r}; must be an object")
    fields = _Fields(parameters, path)
    share = _Fields(raw, path).number("partial_rotary_factor", 1.0)
    if fields.number("partial_rotary_factor", share) != 1:
        raise UnsupportedModelError(f"{path}: rotary embedding over a part of the channels")
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


def _eostoken_ids(directory: Path, raw: Mapping[str, object]) -> tuple[int, ...]:
    generation = directory / "generation_config.json"
    ids = set(token_ids(raw.get("eos_token_id"), directory / "config.json"))
    if generation.is_file():
        ids |= set(token_ids(read_json(generation).get("eos_token_id"), generation))
    return tuple(sorted(ids))


def _first(ids: tuple[int, ...]) -> int | None:
    return ids[0] if ids else None
