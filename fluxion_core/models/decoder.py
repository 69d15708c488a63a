"""The decoder of the Llama family in plain torch: Llama 3.x, SmolLM2, Qwen2.5.

Tokens of all sequences of a step lie in one dimension; what belongs together is the attention
port's business. Matrices that read the same input are stored as one, so that a decode step is a few
passes over the weights.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from fluxion_core.errors import ModelFileError
from fluxion_core.models.attention_port import AttentionPort
from fluxion_core.models.config import ModelConfig
from fluxion_core.models.rope import RotaryTable, rotate


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
        self.layers = [Layer(config, device, dtype) for _ in range(config.num_layers)]
        self.final_norm = nn.Parameter(
            torch.empty(config.hidden_size, device=device, dtype=dtype), False
        )
        self.head = (
            self.embedding
            if config.tie_word_embeddings
            else nn.Parameter(torch.empty_like(self.embedding), False)
        )
        self._names = frozenset(self.tensor_names())
        self._rotary = RotaryTable(config.rope, config.head_dim, config.context_tokens, device)

    def forward(self, token_ids: Tensor, positions: Tensor, attention: AttentionPort) -> Tensor:
        """Hidden states after the final norm.

        Args:
            token_ids: [tokens] int64.
            positions: [tokens] int64, of each token within its sequence.
            attention: called once per layer.

        Returns:
            [tokens, hidden_size].
        """
        config = self.config
        heads, kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        cos, sin = self._rotary.at(positions)
        x = F.embedding(token_ids, self.embedding)
        for index, layer in enumerate(self.layers):
            normed = rms_norm(x, layer.input_norm, config.rms_norm_eps)
            qkv = F.linear(normed, layer.qkv, layer.qkv_bias)
            qkv = qkv.view(-1, heads + 2 * kv_heads, head_dim)
            # Queries and keys turn together: one pass over both.
            turned = rotate(qkv[:, : heads + kv_heads], cos, sin)
            attended = attention.attend(
                index, turned[:, :heads], turned[:, heads:], qkv[:, heads + kv_heads :]
            )
            x = x + F.linear(attended.reshape(-1, heads * head_dim), layer.output)
            normed = rms_norm(x, layer.post_norm, config.rms_norm_eps)
            gate, up = F.linear(normed, layer.gate_up).chunk(2, dim=-1)
            x = x + F.linear(F.silu(gate) * up, layer.down)
        return rms_norm(x, self.final_norm, config.rms_norm_eps)

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, vocab_size] float32 for [rows, hidden_size]."""
        return F.linear(hidden, self.head).float()

    def load_tensor(self, name: str, tensor: Tensor) -> None:
        """Put one weight in its place, under its Hugging Face name.

        Raises:
            ModelFileError: an unknown name, or a shape that the config does not say.
        """
        target = self._place_of(name)
        if target.shape != tensor.shape:
            raise ModelFileError(
                f"tensor {name} is {tuple(tensor.shape)}; the config says {tuple(target.shape)}"
            )
        with torch.no_grad():
            target.copy_(tensor)

    def tensor_names(self) -> set[str]:
        """Names that must be loaded, each once."""
        config = self.config
        names = {"model.embed_tokens.weight", "model.norm.weight"}
        if not config.tie_word_embeddings:
            names.add("lm_head.weight")
        parts = ["input_layernorm.weight", "post_attention_layernorm.weight"]
        parts += [f"self_attn.{p}_proj.weight" for p in "qkvo"]
        parts += [f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")]
        if config.attention_bias:
            parts += [f"self_attn.{p}_proj.bias" for p in "qkv"]
        names |= {f"model.layers.{i}.{part}" for i in range(config.num_layers) for part in parts}
        return names

    def _place_of(self, name: str) -> Tensor:
        config = self.config
        if name not in self._names:
            raise ModelFileError(f"tensor {name} has no place in this architecture")
        if name == "model.embed_tokens.weight":
            return self.embedding
        if name == "model.norm.weight":
            return self.final_norm
        if name == "lm_head.weight":
            return self.head
        _, _, index, part = name.split(".", 3)
        layer = self.layers[int(index)]
        q_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        rows = {
            "q": slice(0, q_rows),
            "k": slice(q_rows, q_rows + kv_rows),
            "v": slice(q_rows + kv_rows, None),
        }
        match part.split("."):
            case ["input_layernorm", _]:
                return layer.input_norm
            case ["post_attention_layernorm", _]:
                return layer.post_norm
            case ["self_attn", "o_proj", _]:
                return layer.output
            case ["self_attn", proj, "weight"]:
                return layer.qkv[rows[proj[0]]]
            case ["self_attn", proj, "bias"]:
                assert layer.qkv_bias is not None
                return layer.qkv_bias[rows[proj[0]]]
            case ["mlp", "gate_proj", _]:
                return layer.gate_up[: config.intermediate_size]
            case ["mlp", "up_proj", _]:
                return layer.gate_up[config.intermediate_size :]
            case _:
                return layer.down


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last dimension, in float32; dtype is kept."""
    if x.dtype == torch.float32:
        return F.rms_norm(x, (x.shape[-1],), weight, eps)
    return (F.rms_norm(x.float(), (x.shape[-1],), None, eps)).to(x.dtype) * weight
