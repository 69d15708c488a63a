"""Decoders against transformers, file formats against each other, damaged files refused."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from fluxion_core.errors import (
    ModelError,
    ModelFileError,
    ModelNotFoundError,
    UnsupportedModelError,
)
from fluxion_core.kernels.dense_attention import cpu as dense_attention
from fluxion_core.models.locate import locate_model
from fluxion_core.models.rope import inverse_frequencies
from fluxion_core.models.safetensors_dir import read_config
from fluxion_core.models.weights import LoadedModel, load_model

SIZES = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CONFIGS = {
    "llama-plain": (LlamaConfig, {"tie_word_embeddings": True}),
    "llama-3-scaled": (LlamaConfig, {"rope_parameters": LLAMA3_ROPE}),
    "llama-3-scaled-tied": (
        LlamaConfig,
        {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True},
    ),
    "llama-linear": (
        LlamaConfig,
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "llama-wide-heads": (LlamaConfig, {"head_dim": 32}),
    "qwen2.5": (Qwen2Config, {}),
    "qwen2.5-tied": (Qwen2Config, {"tie_word_embeddings": True}),
}


class Recording:
    """An attention port that keeps keys and values of one sequence."""

    def __init__(self) -> None:
        self.kv: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def attend(self, layer, query, key, value):
        if layer in self.kv:
            key = torch.cat((self.kv[layer][0], key))
            value = torch.cat((self.kv[layer][1], value))
        self.kv[layer] = key, value
        return dense_attention.attend_chunk(query, key.transpose(0, 1), value.transpose(0, 1))


@pytest.fixture(scope="module", params=CONFIGS)
def checkpoint(request, tmp_path_factory):
    """A random checkpoint as transformers saves it, and its model."""
    config_type, changes = CONFIGS[request.param]
    torch.manual_seed(len(request.param))
    model_type = LlamaForCausalLM if config_type is LlamaConfig else Qwen2ForCausalLM
    model = model_type(config_type(**{**SIZES, **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
            else:
                parameter.mul_(3.0)
    directory = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(directory)
    return directory, model


def load(path: Path) -> LoadedModel:
    return load_model(path, device=torch.device("cpu"), dtype=torch.float32)


@torch.inference_mode()
def logits_of(loaded: LoadedModel, token_ids: torch.Tensor, pieces: int = 1) -> torch.Tensor:
    port, positions = Recording(), torch.arange(len(token_ids))
    rows = [
        loaded.decoder.logits(loaded.decoder(token_ids[part], positions[part], port))
        for part in positions.chunk(pieces)
    ]
    return torch.cat(rows)


def test_logits_are_those_of_transformers(checkpoint):
    directory, model = checkpoint
    token_ids = torch.randint(160, (200,), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = model(token_ids[None]).logits[0]
    loaded = load(directory)
    for pieces in (1, 3, 200):
        found = logits_of(loaded, token_ids, pieces)
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-4)


def write_gguf(directory: Path, target: Path) -> None:
    """The same checkpoint as llama.cpp's converter lays it out."""
    raw = json.loads((directory / "config.json").read_text())
    config = read_config(directory)
    arch = config.architecture
    writer = gguf.GGUFWriter(target, arch)
    writer.add_context_length(config.context_tokens)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope.theta)
    rope = raw.get("rope_parameters") or {}
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if rope.get("rope_type") == "llama3":
        plain = 1.0 / config.rope.theta ** (torch.arange(0, config.head_dim, 2) / config.head_dim)
        factors = plain / inverse_frequencies(config.rope, config.head_dim)
        writer.add_tensor("rope_freqs.weight", factors.float().numpy())
    names = gguf.get_tensor_name_map(
        gguf.MODEL_ARCH.LLAMA if arch == "llama" else gguf.MODEL_ARCH.QWEN2, config.num_layers
    )
    for name, tensor in load_file(directory / "model.safetensors").items():
        array = tensor.float().numpy()
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = config.num_heads if "q_proj" in name else config.num_kv_heads
            rows = array.reshape(heads, 2, array.shape[0] // heads // 2, -1)
            array = rows.swapaxes(1, 2).reshape(array.shape)
        target_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(target_name, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_safetensors_and_gguf_copies_of_one_model_agree(checkpoint, tmp_path: Path):
    directory, _ = checkpoint
    write_gguf(directory, tmp_path / "toy.gguf")
    token_ids = torch.randint(160, (150,), generator=torch.Generator().manual_seed(1))
    one, other = load(directory), load(tmp_path / "toy.gguf")
    torch.testing.assert_close(
        logits_of(one, token_ids), logits_of(other, token_ids), atol=1e-4, rtol=1e-4
    )
    assert one.config.num_kv_heads == other.config.num_kv_heads


@pytest.fixture(scope="module")
def toy_directory(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("toy")
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(directory)
    return directory


@pytest.fixture
def toy(toy_directory: Path, tmp_path: Path) -> Path:
    """A copy of a toy checkpoint, to be damaged."""
    for file in toy_directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_sharded_weights_are_read_from_all_files(toy: Path):
    whole = load(toy)
    tensors = load_file(toy / "model.safetensors")
    names = sorted(tensors)
    weight_map = {}
    for shard in range(3):
        part = {name: tensors[name] for name in names[shard::3]}
        file = f"model-{shard}.safetensors"
        save_file(part, toy / file)
        weight_map |= dict.fromkeys(part, file)
    (toy / "model.safetensors").unlink()
    (toy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    token_ids = torch.arange(50)
    assert torch.equal(logits_of(load(toy), token_ids), logits_of(whole, token_ids))
    (toy / "model-1.safetensors").unlink()
    with pytest.raises(ModelFileError, match=r"lacks model-1\.safetensors"):
        load(toy)


def test_the_revision_follows_the_content_not_the_name(toy: Path, toy_directory: Path):
    assert load(toy).revision_hash == load(toy_directory).revision_hash
    tensors = load_file(toy / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, toy / "model.safetensors")
    assert load(toy).revision_hash != load(toy_directory).revision_hash


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"architectures": ["MambaForCausalLM"]}, UnsupportedModelError, "Mamba"),
        ({"hidden_act": "gelu"}, UnsupportedModelError, "gelu"),
        ({"attention_bias": True}, UnsupportedModelError, "bias"),
        ({"rope_parameters": {"rope_type": "yarn"}}, UnsupportedModelError, "yarn"),
        ({"num_hidden_layers": 0}, ModelFileError, "num_layers"),
        ({"num_key_value_heads": 3}, ModelFileError, "KV heads"),
        ({"hidden_size": "big"}, ModelFileError, "hidden_size"),
        ({"num_hidden_layers": 4}, ModelFileError, "missing"),
        ({"num_hidden_layers": 2}, ModelFileError, "no place"),
        ({"intermediate_size": 100}, ModelFileError, "the config says"),
        ({"vocab_size": None}, ModelFileError, "vocab_size"),
    ],
)
def test_configs_that_cannot_be_served_say_why(toy: Path, change: dict, error, words: str):
    config = json.loads((toy / "config.json").read_text())
    (toy / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(error, match=words):
        load(toy)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe"])
def test_a_config_that_is_no_object_is_refused(toy: Path, content: bytes):
    (toy / "config.json").write_bytes(content)
    with pytest.raises(ModelFileError):
        load(toy)


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.01, 0.5, 0.999])
def test_truncated_safetensors_are_refused(toy: Path, share: float):
    file = toy / "model.safetensors"
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])
    with pytest.raises(ModelFileError):
        load(toy)


@pytest.fixture(scope="module")
def gguf_bytes(toy_directory: Path, tmp_path_factory) -> bytes:
    target = tmp_path_factory.mktemp("gguf") / "toy.gguf"
    write_gguf(toy_directory, target)
    return target.read_bytes()


@pytest.mark.parametrize("share", [0.0, 0.00001, 0.0005, 0.002, 0.01, 0.3, 0.9, 0.9999])
def test_truncated_gguf_files_are_refused(gguf_bytes: bytes, tmp_path: Path, share: float):
    path = tmp_path / "cut.gguf"
    path.write_bytes(gguf_bytes[: int(len(gguf_bytes) * share)])
    with pytest.raises(ModelFileError):
        load(path)


def test_unknown_files_are_not_guessed_at(tmp_path: Path):
    path = tmp_path / "model.bin"
    path.write_bytes(b"PK\x03\x04 something else")
    with pytest.raises(ModelFileError, match="not a GGUF file"):
        load(path)
    with pytest.raises(ModelNotFoundError):
        load(tmp_path / "nothing.gguf")


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(at=st.integers(0, 2500), value=st.integers(0, 255))
def test_a_damaged_gguf_index_raises_nothing_but_model_errors(
    gguf_bytes: bytes, tmp_path: Path, at: int, value: int
):
    damaged = bytearray(gguf_bytes)
    damaged[at] = value
    path = tmp_path / "damaged.gguf"
    path.write_bytes(damaged)
    with contextlib.suppress(ModelError):
        load(path)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(at=st.integers(0, 2000), value=st.integers(0, 255))
def test_a_damaged_safetensors_index_raises_nothing_but_model_errors(
    toy_directory: Path, tmp_path: Path, at: int, value: int
):
    for file in toy_directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    damaged = bytearray((toy_directory / "model.safetensors").read_bytes())
    damaged[at] = value
    (tmp_path / "model.safetensors").write_bytes(damaged)
    with contextlib.suppress(ModelError):
        load(tmp_path)


def test_models_are_found_by_path_and_by_name(tmp_path: Path, toy_directory: Path):
    assert locate_model(str(toy_directory), tmp_path) == toy_directory
    (tmp_path / "smollm2-135m").mkdir()
    with pytest.raises(ModelNotFoundError, match="fluxion pull smollm2-135m"):
        locate_model("smollm2-135m", tmp_path)
    file = tmp_path / "smollm2-135m" / "a.gguf"
    file.write_bytes(b"GGUF")
    assert locate_model("smollm2-135m", tmp_path) == file
    (tmp_path / "smollm2-135m" / "b.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelNotFoundError, match="several"):
        locate_model("smollm2-135m", tmp_path)
    for name in ("", "nothing", "../../etc"):
        with pytest.raises(ModelNotFoundError):
            locate_model(name, tmp_path)
