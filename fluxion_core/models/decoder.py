"""The decoder of the Llama family in plain torch: Llama 3.x, SmolLM2, Qwen2.5.

Tokens of all sequences of a step lie in one dimension; what belongs together is the attention
port's business. Matrices that read the same input are stored as one, so that a decode step is a few
passes over the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from fluxion_core.models.attention_port import AttentionPort
from fluxion_core.models.config import ModelConfig
from fluxion_core.models.rope import RotaryEmbedding, rotate

_FEW_DEVICE_ROWS = 64
"""Up to here a step on a GPU is bound by its launches; above, by the work."""

_FEW_ROWS = 8
"""Up to here the transposed product is faster; see `linear`."""


class Layer(nn.Module):
    """Weights of one decoder layer. `qkv` and `gate_up` are stacked along their output."""

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        hidden, head_dim = config.hidden_size, config.head_dim
        qkv_size = (config.num_heads + 2 * config.num_kv_heads) * head_dim

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype), False)

        self.input_norm = empty(hidden)
        self.qkv = empty(qkv_size, hidden)
        self.qkv_bias = empty(qkv_size) if config.attention_bias else None
        self.output = empty(hidden, config.num_heads * head_dim)
        self.post_norm = empty(hidden)
        self.gate_up = empty(2 * config.intermediate_size, hidden)
        self.down = empty(hidden, config.intermediate_size)


class Decoder(nn.Module):
    """Token ids in, hidden states and logits out.

    Args:
        config: sizes.
        device: where weights are.
        dtype: of weights and activations; norms and rotary run in float32.
    """

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Parameter(
            torch.empty(config.vocab_size, config.hidden_size, device=device, dtype=dtype), False
        )
        self.layers = nn.ModuleList(Layer(config, device, dtype) for _ in range(config.num_layers))
        self.final_norm = nn.Parameter(
            torch.empty(config.hidden_size, device=device, dtype=dtype), False
        )
        self.head = (
            self.embedding
            if config.tie_word_embeddings
            else nn.Parameter(torch.empty_like(self.embedding), False)
        )
        self._rotary = RotaryEmbedding(config.rope, config.head_dim, device)

    def forward(self, token_ids: Tensor, positions: Tensor, attention: AttentionPort) -> Tensor:
        """Hidden states after the final norm.

        Args:
            token_ids: [tokens] int64.
            positions: [tokens] int64, of each token within its sequence.
            attention: called once per layer.

        Returns:
            [tokens, hidden_size].
        """
        *_, hidden = self.by_layers(token_ids, positions, attention)
        assert hidden is not None
        return hidden

    def by_layers(
        self, token_ids: Tensor, positions: Tensor, attention: AttentionPort
    ) -> Iterator[Tensor | None]:
        """`forward` with a stop after each layer, for who has something to do between two.

        Yields None after each layer but the last, and then what `forward` returns.
        """
        config = self.config
        heads, kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        cos, sin = self._rotary.at(positions)
        ops = operations_for(self.embedding, len(token_ids))
        x = F.embedding(token_ids, self.embedding)
        delta = None
        for index, layer in enumerate(cast(Iterable[Layer], self.layers)):
            x, normed = ops.add_norm(x, delta, layer.input_norm, config.rms_norm_eps)
            qkv = linear(normed, layer.qkv)
            if layer.qkv_bias is not None:
                qkv = qkv + layer.qkv_bias
            qkv = qkv.view(-1, heads + 2 * kv_heads, head_dim)
            # Queries and keys turn together: one pass over both.
            turned = ops.rotate(qkv, cos, sin, heads + kv_heads)
            attended = attention.attend(
                index, turned[:, :heads], turned[:, heads:], qkv[:, heads + kv_heads :]
            )
            delta = linear(attended.reshape(-1, heads * head_dim), layer.output)
            x, normed = ops.add_norm(x, delta, layer.post_norm, config.rms_norm_eps)
            delta = linear(ops.gate(linear(normed, layer.gate_up)), layer.down)
            if index + 1 < config.num_layers:
                yield None
        yield ops.add_norm(x, delta, self.final_norm, config.rms_norm_eps)[1]

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, vocab_size] float32 for [rows, hidden_size]."""
        return linear(hidden, self.head).float()

    def weight(self, name: str) -> Tensor:
        """The place of one weight, by its Hugging Face name: a view to be written to.

        Args:
            name: one of `tensor_shapes(config)`.
        """
        config = self.config
        top = {
            "model.embed_tokens.weight": self.embedding,
            "model.norm.weight": self.final_norm,
            "lm_head.weight": self.head,
        }
        if name in top:
            return top[name].data
        _, _, index, part = name.split(".", 3)
        layer = cast(Layer, self.layers[int(index)])
        q_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        rows = {
            "q_proj": slice(0, q_rows),
            "k_proj": slice(q_rows, q_rows + kv_rows),
            "v_proj": slice(q_rows + kv_rows, None),
        }
        match part.split("."):
            case ["input_layernorm", _]:
                place: Tensor = layer.input_norm
            case ["post_attention_layernorm", _]:
                place = layer.post_norm
            case ["self_attn", "o_proj", _]:
                place = layer.output
            case ["self_attn", projection, "weight"]:
                place = layer.qkv[rows[projection]]
            case ["self_attn", projection, _]:
                assert layer.qkv_bias is not None
                place = layer.qkv_bias[rows[projection]]
            case ["mlp", "gate_proj", _]:
                place = layer.gate_up[: config.intermediate_size]
            case ["mlp", "up_proj", _]:
                place = layer.gate_up[config.intermediate_size :]
            case _:
                place = layer.down
        return place.data


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of all weights that a model of this config has, by their Hugging Face names."""
    hidden, intermediate = config.hidden_size, config.intermediate_size
    q_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (q_rows, hidden),
        "self_attn.k_proj.weight": (kv_rows, hidden),
        "self_attn.v_proj.weight": (kv_rows, hidden),
        "self_attn.o_proj.weight": (hidden, q_rows),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (intermediate, hidden),
        "mlp.up_proj.weight": (intermediate, hidden),
        "mlp.down_proj.weight": (hidden, intermediate),
    }
    if config.attention_bias:
        layer["self_attn.q_proj.bias"] = (q_rows,)
        layer["self_attn.k_proj.bias"] = (kv_rows,)
        layer["self_attn.v_proj.bias"] = (kv_rows,)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for index in range(config.num_layers):
        shapes |= {f"model.layers.{index}.{part}": shape for part, shape in layer.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T for [rows, in] and [out, in]: [rows, out], contiguous.

    Several rows, but few, go the other way round on a CPU in float32: 2 to 4 then cost half,
    8 two thirds. A single row stays as it is: a matrix-vector product survives busy neighbours,
    whereas a matrix product's threads wait for each other by spinning.
    """
    rows = x.shape[0]
    if x.device.type == "cpu" and x.dtype == torch.float32 and 1 < rows <= _FEW_ROWS:
        return torch.mm(weight, x.t()).t().contiguous()
    return F.linear(x, weight)


class Operations(NamedTuple):
    """Operations between matrix products; kernels/dense_step/triton.py has their shapes."""

    add_norm: Callable[[Tensor, Tensor | None, Tensor, float], tuple[Tensor, Tensor]]
    rotate: Callable[[Tensor, Tensor, Tensor, int], Tensor]
    gate: Callable[[Tensor], Tensor]


def operations_for(weights: Tensor, rows: int) -> Operations:
    """Fused kernels for a decode step's few rows on CUDA; else torch's."""
    if weights.device.type == "cuda" and rows <= _FEW_DEVICE_ROWS:
        from fluxion_core.kernels.dense_step import triton as fused

        return Operations(fused.add_norm, fused.rotate, fused.gate)
    return Operations(_add_norm, _rotate, _gate)


def _add_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if delta is not None:
        x = x + delta
    return x, rms_norm(x, weight, eps)


def _rotate(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    return rotate(qkv[:, :heads], cos, sin)


def _gate(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last dimension, in float32; dtype is kept."""
    if x.dtype == torch.float32:
        return F.rms_norm(x, (x.shape[-1],), weight, eps)
    return (F.rms_norm(x.float(), (x.shape[-1],), None, eps)).to(x.dtype) * weight
