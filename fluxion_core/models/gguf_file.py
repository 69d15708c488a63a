"""GGUF files: config and weights, dequantised piece by piece by the `gguf` package.

llama.cpp stores q and k of Llama models with the rotary pairs interleaved; they are put back into
halves here. Qwen2 files are stored in halves already.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import cast

import gguf
import numpy as np
import torch
from torch import Tensor

from fluxion_core.errors import ModelFileError, UnsupportedModelError
from fluxion_core.models.config import (
    Architecture,
    FactorScaling,
    LinearScaling,
    ModelConfig,
    RopeConfig,
)
from fluxion_core.models.gguf_end_tokens import read_end_tokens
from fluxion_core.models.gguf_entries import check_entries, suggested_sampling
from fluxion_core.models.gguf_index import GgufFile, GgufTensor
from fluxion_core.observe.log import event

_log = logging.getLogger(__name__)
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


# Dequantised at a time; what a loading thread needs beside the model is a few times this.
_PIECE_BYTES = 8 << 20


def read_config(file: GgufFile) -> ModelConfig:
    """The model's sizes from the file's metadata.

    Raises:
        UnsupportedModelError: another architecture or rotary scaling.
        ModelFileError: an entry is missing or of the wrong type.
    """
    architecture = file.text("general.architecture")
    if architecture not in ("llama", "qwen2"):
        raise UnsupportedModelError(
            f"{file.path}: architecture {architecture!r}; supported: llama, qwen2"
        )
    check_entries(file.metadata, architecture, file.path)
    _log_suggested_sampling(file)
    hidden, heads, head_dim = _head_shape(file, architecture)
    context_tokens = _context_tokens(file, architecture)
    return ModelConfig(
        architecture=cast(Architecture, architecture),
        vocab_size=_vocab_size(file, architecture),
        hidden_size=hidden,
        num_layers=file.integer(f"{architecture}.block_count"),
        num_heads=heads,
        num_kv_heads=_size(file, f"{architecture}.attention.head_count_kv", heads),
        head_dim=head_dim,
        intermediate_size=file.integer(f"{architecture}.feed_forward_length"),
        rms_norm_eps=file.number(f"{architecture}.attention.layer_norm_rms_epsilon"),
        rope=_rope(file, architecture),
        context_tokens=context_tokens,
        tie_word_embeddings="output.weight" not in file.tensors,
        attention_bias="blk.0.attn_q.bias" in file.tensors,
        bos_token_id=file.optional_integer("tokenizer.ggml.bos_token_id"),
        eos_token_ids=tuple(sorted(read_end_tokens(file).end_ids)),
    )


class GgufWeights:
    """The weights of a GGUF file under their Hugging Face names.

    Raises:
        ModelFileError: a tensor that has no place in this architecture.
    """

    def __init__(self, file: GgufFile, config: ModelConfig) -> None:
        self._path = file.path
        self._config = config
        self._tensors: dict[str, GgufTensor] = {}
        for stored in file.tensors.values():
            if stored.name != _ROPE_FACTORS:
                self._tensors[_hugging_face_name(stored.name, file)] = stored
        self.shapes = {name: stored.shape for name, stored in self._tensors.items()}

    def pieces(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """One weight in float32: (first row, rows) of some MiB each, in order.

        Raises:
            UnsupportedModelError: a quantisation that is not implemented.
        """
        stored = self._tensors[name]
        if len(stored.shape) == 1:
            yield 0, self._unpermuted(name, self._dequantised(stored, 0, 1).view(-1))
            return
        # A head's rows stay together, because they may have to be put in order.
        together = self._config.head_dim
        rows_fitting = _PIECE_BYTES // (4 * stored.shape[1])
        count = max(rows_fitting // together, 1) * together
        for first in range(0, stored.shape[0], count):
            piece = self._dequantised(stored, first, first + count)
            yield first, self._unpermuted(name, piece)

    def _dequantised(self, stored: GgufTensor, first: int, end: int) -> Tensor:
        try:
            array = gguf.dequantize(stored.rows[first:end], stored.type)
        except NotImplementedError:
            raise UnsupportedModelError(
                f"{self._path}: tensor {stored.name} is of type {stored.type.name}, "
                f"which cannot be dequantised"
            ) from None
        return torch.from_numpy(np.require(array, np.float32, ["C", "A", "W"]))

    def _unpermuted(self, name: str, piece: Tensor) -> Tensor:
        """Undo llama.cpp's interleaving: a head's rows (pair, half) become (half, pair)."""
        if self._config.architecture != "llama" or not _is_query_or_key(name):
            return piece
        pairs = piece.view(-1, self._config.head_dim // 2, 2, *piece.shape[1:])
        return pairs.transpose(1, 2).reshape(piece.shape)


def _log_suggested_sampling(file: GgufFile) -> None:
    if suggested := suggested_sampling(file.metadata):
        words = ", ".join(f"{name} {value!r:.60}" for name, value in sorted(suggested.items()))
        _log.info(
            event("sampling is what requests say; the model suggests", file=file.path, values=words)
        )


def _head_shape(file: GgufFile, architecture: str) -> tuple[int, int, int]:
    """Hidden size, query heads, and channels of a head: of queries, keys and values alike."""
    hidden = file.integer(f"{architecture}.embedding_length")
    heads = file.integer(f"{architecture}.attention.head_count")
    if heads <= 0:
        raise ModelFileError(f"{file.path}: {heads} attention heads")
    head_dim = _size(file, f"{architecture}.attention.key_length", hidden // heads)
    value_dim = _size(file, f"{architecture}.attention.value_length", head_dim)
    rotary_dim = _size(file, f"{architecture}.rope.dimension_count", head_dim)
    if value_dim != head_dim:
        raise UnsupportedModelError(
            f"{file.path}: {architecture}.attention.value_length: values of {value_dim} channels "
            f"beside keys of {head_dim}"
        )
    if rotary_dim != head_dim:
        raise UnsupportedModelError(
            f"{file.path}: rotary embedding over {rotary_dim} of {head_dim} channels"
        )
    return hidden, heads, head_dim


def _context_tokens(file: GgufFile, architecture: str) -> int:
    context_tokens = file.integer(f"{architecture}.context_length")
    window = file.optional_integer(f"{architecture}.attention.sliding_window")
    if window and window < context_tokens:
        raise UnsupportedModelError(
            f"{file.path}: {architecture}.attention.sliding_window is {window}: attention over a "
            f"window is not supported"
        )
    return context_tokens


def _vocab_size(file: GgufFile, architecture: str) -> int:
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise ModelFileError(f"{file.path}: tensor token_embd.weight is missing")
    vocab_size = _size(file, f"{architecture}.vocab_size", embedding.shape[0])
    if vocab_size != embedding.shape[0]:
        raise ModelFileError(
            f"{file.path}: {architecture}.vocab_size is {vocab_size}; token_embd.weight has "
            f"{embedding.shape[0]} rows"
        )
    return vocab_size


def _rope(file: GgufFile, architecture: str) -> RopeConfig:
    base = file.optional_number(f"{architecture}.rope.freq_base")
    theta = 10_000.0 if base is None else base
    factor = _scaling_factor(file, architecture)
    stored = file.tensors.get(_ROPE_FACTORS)
    if stored is None:
        return RopeConfig(theta, None if factor == 1 else LinearScaling(factor))
    if architecture != "llama" or stored.type != gguf.GGMLQuantizationType.F32:
        raise UnsupportedModelError(
            f"{file.path}: {_ROPE_FACTORS} is {stored.type.name} in a model of kind "
            f"{architecture}; supported: F32 in llama"
        )
    factors = stored.rows.reshape(-1).view(np.float32)
    return RopeConfig(theta, FactorScaling(tuple(factor * float(each) for each in factors)))


def _scaling_factor(file: GgufFile, architecture: str) -> float:
    """What positions are divided by. As in llama.cpp a factor alone is linear scaling."""
    kind = file.optional_text(f"{architecture}.rope.scaling.type") or "linear"
    if kind not in ("none", "linear"):
        raise UnsupportedModelError(
            f"{file.path}: rotary scaling {kind!r}; supported: none, linear, and factors in the "
            f"file"
        )
    factor = file.optional_number(f"{architecture}.rope.scaling.factor")
    if factor is None:
        factor = file.optional_number(f"{architecture}.rope.scale_linear")
    return 1.0 if kind == "none" or not factor else factor


def _size(file: GgufFile, key: str, default: int) -> int:
    value = file.optional_integer(key)
    return default if value is None else value


def _hugging_face_name(name: str, file: GgufFile) -> str:
    if name in _TOP_PARTS:
        return _TOP_PARTS[name]
    prefix, _, rest = name.partition(".")
    index, _, part = rest.partition(".")
    if prefix == "blk" and index.isdecimal() and part in _LAYER_PARTS:
        return f"model.layers.{index}.{_LAYER_PARTS[part]}"
    raise ModelFileError(f"{file.path}: tensor {name} has no place in this architecture")


def _is_query_or_key(name: str) -> bool:
    return ".self_attn.q_proj." in name or ".self_attn.k_proj." in name
