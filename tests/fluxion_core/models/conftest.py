"""Toy models with random weights, as the oracle (transformers) makes and saves them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    # Short, so that some of the toy's wavelengths lie below, within and above the stretched band.
    "original_max_position_embeddings": 64,
}
SIZES = {
    "vocab_size": 160,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
}


class DenseCausal:
    """The attention port in the plainest way: one sequence, everything in one call."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        group = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
        heads = [x.transpose(0, 1).unsqueeze(0) for x in (query, key, value)]
        return scaled_dot_product_attention(*heads, is_causal=True)[0].transpose(0, 1)


@pytest.fixture
def dense_causal() -> DenseCausal:
    return DenseCausal()


def toy_llama(**changes: object) -> transformers.PreTrainedModel:
    torch.manual_seed(7)
    config = transformers.LlamaConfig(**{**SIZES, "rope_theta": 500_000.0, **changes})
    return _randomised(transformers.LlamaForCausalLM(config))


def toy_qwen2(**changes: object) -> transformers.PreTrainedModel:
    torch.manual_seed(8)
    config = transformers.Qwen2Config(**{**SIZES, "rope_theta": 1_000_000.0, **changes})
    return _randomised(transformers.Qwen2ForCausalLM(config))


def _randomised(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    # Fresh models have norms of one and biases of zero, which would hide a lost one.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=0.3 if name.endswith("bias") else 0.15)
    return model.eval()


MODELS = {
    "llama3-untied": lambda: toy_llama(rope_parameters={**LLAMA3_SCALING, "rope_theta": 5e5}),
    "llama3-tied": lambda: toy_llama(
        rope_parameters={**LLAMA3_SCALING, "rope_theta": 5e5}, tie_word_embeddings=True
    ),
    "llama-linear": lambda: toy_llama(
        rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
    ),
    "llama-wide-heads": lambda: toy_llama(head_dim=32),
    "qwen2-untied": toy_qwen2,
    "qwen2-tied": lambda: toy_qwen2(tie_word_embeddings=True),
}


@pytest.fixture(params=sorted(MODELS))
def toy(request: pytest.FixtureRequest) -> transformers.PreTrainedModel:
    return MODELS[request.param]()


@pytest.fixture
def toy_dir(toy: transformers.PreTrainedModel, tmp_path: Path) -> Path:
    toy.save_pretrained(tmp_path / "toy")
    return tmp_path / "toy"


@pytest.fixture
def llama() -> transformers.PreTrainedModel:
    """One plain toy, for tests that one is enough for."""
    return toy_llama()


@pytest.fixture
def llama_dir(tmp_path: Path) -> Path:
    """One safetensors directory, for tests that damage it."""
    toy_llama().save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


@pytest.fixture
def token_ids() -> Tensor:
    generator = torch.Generator().manual_seed(9)
    return torch.randint(0, SIZES["vocab_size"], (150,), generator=generator)
