"""GGUF files: config and weights, dequantised tensor by tensor by the `gguf` package.

llama.cpp stores q and k of Llama models with the rotary pairs interleaved; they are put back into
halves here. Qwen2 files are stored in halves already.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import gguf
import numpy as np
import torch
from torch import Tensor

from fluxion_core.errors import ModelFileError, UnsupportedModelError
from fluxion_core.gguf_index import Metadata
from fluxion_core.models.config import (
    Architecture,
    FactorScaling,
    LinearScaling,
    ModelConfig,
    RopeConfig,
)

_LAYER_PARTS = {
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_q.bias": "self_attn.q_proj.bias",
    "attn_k.bias": "self_attn.k_proj.bias",
    "attn_v.bias": "self_attn.v_proj.bias",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
_TOP_PARTS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_ROPE_FACTORS = "rope_freqs.weight"


def read_config(reader: gguf.GGUFReader, path: Path) -> ModelConfig:
    """The model's sizes from the file's metadata.

    Raises:
        UnsupportedModelError: another architecture or rotary scaling.
        ModelFileError: an entry is missing or of the wrong type.
    """
    meta = Metadata(reader, path)
    architecture = meta.text("general.architecture")
    if architecture not in ("llama", "qwen2"):
        raise UnsupportedModelError(
            f"{path}: architecture {architecture!r}; supported: llama, qwen2"
        )
    if meta.optional_number(f"{architecture}.expert_count"):
        raise UnsupportedModelError(f"{path}: mixtures of experts are not supported")
    hidden = meta.integer(f"{architecture}.embedding_length")
    heads = meta.integer(f"{architecture}.attention.head_count")
    if heads <= 0:
        raise ModelFileError(f"{path}: {heads} attention heads")
    names = {tensor.name for tensor in reader.tensors}
    eos = {meta.optional_integer(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")}
    return ModelConfig(
        architecture=cast(Architecture, architecture),
        vocab_size=_vocab_size(reader, path),
        hidden_size=hidden,
        num_layers=meta.integer(f"{architecture}.block_count"),
        num_heads=heads,
        num_kv_heads=meta.optional_integer(f"{architecture}.attention.head_count_kv") or heads,
        head_dim=meta.optional_integer(f"{architecture}.attention.key_length") or hidden // heads,
        intermediate_size=meta.integer(f"{architecture}.feed_forward_length"),
        rms_norm_eps=meta.number(f"{architecture}.attention.layer_norm_rms_epsilon"),
        rope=_rope(meta, reader, architecture),
        context_tokens=meta.integer(f"{architecture}.context_length"),
        tie_word_embeddings="output.weight" not in names,
        attention_bias="blk.0.attn_q.bias" in names,
        bos_token_id=meta.optional_integer("tokenizer.ggml.bos_token_id"),
        eos_token_ids=tuple(sorted(token for token in eos if token is not None)),
    )


def read_tensors(reader: gguf.GGUFReader, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Every weight under its Hugging Face name, float32, one at a time.

    Raises:
        ModelFileError: a tensor that cannot be dequantised.
    """
    for stored in reader.tensors:
        name = _hugging_face_name(stored.name)
        if name is None:
            continue
        try:
            array = gguf.dequantize(stored.data, stored.tensor_type)
        except (ValueError, NotImplementedError) as error:
            raise ModelFileError(f"tensor {stored.name}: {error}") from None
        tensor = torch.from_numpy(np.require(array, np.float32, ["C", "W"]))
        if config.architecture == "llama" and ".self_attn.q_proj." in name:
            tensor = _halves(tensor, config.num_heads)
        elif config.architecture == "llama" and ".self_attn.k_proj." in name:
            tensor = _halves(tensor, config.num_kv_heads)
        yield name, tensor


def revision_hash(path: Path) -> str:
    """SHA-256 of the whole file, hex: the same file is the same model on any node."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _vocab_size(reader: gguf.GGUFReader, path: Path) -> int:
    for tensor in reader.tensors:
        if tensor.name == "token_embd.weight":
            # GGUF writes the fastest dimension first.
            return int(tensor.shape[1])
    raise ModelFileError(f"{path}: tensor token_embd.weight is missing")


def _rope(meta: Metadata, reader: gguf.GGUFReader, architecture: str) -> RopeConfig:
    theta = meta.optional_number(f"{architecture}.rope.freq_base") or 10_000.0
    for tensor in reader.tensors:
        if tensor.name == _ROPE_FACTORS:
            factors = gguf.dequantize(tensor.data, tensor.tensor_type)
            return RopeConfig(theta, FactorScaling(tuple(float(f) for f in factors)))
    kind = meta.optional(f"{architecture}.rope.scaling.type") or "none"
    if kind == "none":
        return RopeConfig(theta)
    if kind == "linear":
        return RopeConfig(theta, LinearScaling(meta.number(f"{architecture}.rope.scaling.factor")))
    raise UnsupportedModelError(f"rotary scaling {kind!r}; supported: none, linear, llama3")


def _hugging_face_name(name: str) -> str | None:
    """None for tensors that are no weights of a layer we know to be optional."""
    if name in _TOP_PARTS:
        return _TOP_PARTS[name]
    if name == _ROPE_FACTORS:
        return None
    prefix, _, rest = name.partition(".")
    index, _, part = rest.partition(".")
    if prefix == "blk" and index.isdigit() and part in _LAYER_PARTS:
        return f"model.layers.{index}.{_LAYER_PARTS[part]}"
    raise ModelFileError(f"tensor {name} has no place in this architecture")


def _halves(weight: Tensor, num_heads: int) -> Tensor:
    """Undo llama.cpp's interleaving of rotary pairs: rows (pair, half) become (half, pair)."""
    rows = weight.shape[0] // num_heads
    return (
        weight.view(num_heads, rows // 2, 2, -1).transpose(1, 2).reshape(weight.shape).contiguous()
    )
