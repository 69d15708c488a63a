"""Entries of GGUF files: what llama.cpp would compute, or a refusal that names the entry."""

from __future__ import annotations

import logging
import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers

from fluxion_core.errors import ModelError, ModelFileError, UnsupportedModelError
from fluxion_core.models.config import FactorScaling, LinearScaling, ModelConfig, RopeConfig
from fluxion_core.models.gguf_file import read_config
from fluxion_core.models.gguf_index import open_gguf
from tests.fluxion_core.models.test_weights import load, write_gguf

Edit = Callable[[gguf.GGUFWriter], object]


@pytest.fixture(scope="module")
def tiny() -> transformers.PreTrainedModel:
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        max_position_embeddings=64,
    )
    return transformers.LlamaForCausalLM(config)


def nothing(writer: gguf.GGUFWriter) -> None:
    del writer


def config_of(directory: Path, tiny: transformers.PreTrainedModel, edit: Edit) -> ModelConfig:
    path = directory / "tiny.gguf"
    return read_config(open_gguf(write_gguf(path, tiny, edit=edit)))


def published(writer: gguf.GGUFWriter) -> None:
    """What llama.cpp's converter and quantiser write beside what `write_gguf` does."""
    writer.add_type("model")
    writer.add_name("Llama 3.1 8B Instruct")
    writer.add_finetune("Instruct")
    writer.add_basename("Llama-3.1")
    writer.add_size_label("8B")
    writer.add_license("llama3.1")
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, "Llama 3.1 8B")
    writer.add_base_model_organization(0, "Meta Llama")
    writer.add_tags(["facebook", "text-generation"])
    writer.add_languages(["en", "de"])
    writer.add_file_type(15)
    writer.add_quantization_version(2)
    writer.add_vocab_size(40)
    writer.add_value_length(16)
    writer.add_string("quantize.imatrix.file", "imatrix.dat")
    writer.add_int32("quantize.imatrix.entries_count", 224)
    writer.add_uint16("split.count", 1)
    writer.add_uint16("split.no", 0)
    writer.add_int32("split.tensors.count", 12)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")


def test_what_converters_write_is_read_without_a_word(tmp_path, tiny, caplog):
    with caplog.at_level(logging.INFO):
        config = config_of(tmp_path, tiny, published)
    assert not [each for each in caplog.records if each.name.startswith("fluxion")]
    assert config == config_of(tmp_path, tiny, nothing)


FREQS = np.array([1.0, 1.0, 2.0, 4.0, 8.0, 8.0, 8.0, 8.0], np.float32)


def add_freqs(writer: gguf.GGUFWriter) -> None:
    writer.add_tensor("rope_freqs.weight", FREQS)


@pytest.mark.parametrize(
    ("edits", "scaling"),
    [
        ([], None),
        ([lambda w: w.add_rope_scaling_factor(4.0)], LinearScaling(4.0)),
        ([lambda w: w.add_float32("llama.rope.scale_linear", 4.0)], LinearScaling(4.0)),
        (
            [
                lambda w: w.add_rope_scaling_factor(2.0),
                lambda w: w.add_float32("llama.rope.scale_linear", 4.0),
            ],
            LinearScaling(2.0),
        ),
        ([lambda w: w.add_rope_scaling_factor(0.0)], None),
        ([lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)], None),
        (
            [
                lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.NONE),
                lambda w: w.add_rope_scaling_factor(4.0),
            ],
            None,
        ),
        ([add_freqs], FactorScaling(tuple(FREQS.tolist()))),
        (
            [add_freqs, lambda w: w.add_rope_scaling_factor(4.0)],
            FactorScaling(tuple((4 * FREQS).tolist())),
        ),
    ],
)
def test_rotary_scaling_is_llama_cpps(tmp_path, tiny, edits, scaling):
    def edit(writer: gguf.GGUFWriter) -> None:
        for each in edits:
            each(writer)

    assert config_of(tmp_path, tiny, edit).rope == RopeConfig(1e4, scaling)


NUMBERS = {
    "attention.scale": 0.5,
    "attention.clamp_kqv": 8.0,
    "attention.max_alibi_bias": 8.0,
    "attention.temperature_scale": 0.1,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "logit_scale": 0.0625,
    "residual_scale": 0.22,
    "embedding_scale": 12.0,
    "rope.scaling.attn_factor": 1.2,
    "rope.scaling.alpha": 1000.0,
    "rope.scaling.yarn_log_multiplier": 0.1,
}
COUNTS = {
    "attention.sliding_window": 32,
    "attention.kv_lora_rank": 512,
    "attention.shared_kv_layers": 2,
    "expert_count": 8,
    "expert_shared_count": 1,
    "leading_dense_block_count": 1,
    "nextn_predict_layers": 1,
    "pooling_type": 3,
    "rope.dimension_count": 8,
    "attention.value_length": 8,
}


@pytest.mark.parametrize("key", sorted(NUMBERS | COUNTS))
def test_an_entry_that_changes_the_answer_is_refused_by_name(tmp_path, tiny, key):
    def edit(writer: gguf.GGUFWriter) -> None:
        full = f"llama.{key}"
        # The fixture has one already.
        writer.kv_data[0].pop(full, None)
        if key in NUMBERS:
            writer.add_float32(full, NUMBERS[key])
        else:
            writer.add_uint32(full, COUNTS[key])

    with pytest.raises(UnsupportedModelError, match=key.replace("rope.dimension_count", "8 of 16")):
        config_of(tmp_path, tiny, edit)


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (lambda w: w.add_bool("llama.attention.causal", False), "attention to what follows"),
        (lambda w: w.add_bool("llama.use_parallel_residual", True), "beside each other"),
        (lambda w: w.add_string("llama.tensor_data_layout", "own"), "another layout"),
        (lambda w: w.add_array("llama.rope.dimension_sections", [2, 2, 4, 0]), "positions of"),
        (lambda w: w.add_type("adapter"), "general.type is 'adapter'"),
        (lambda w: w.add_type("imatrix"), "general.type is 'imatrix'"),
        (lambda w: w.add_string("adapter.type", "lora"), "adapter.type: an adapter"),
        (lambda w: w.add_quantization_version(1), "general.quantization_version is 1"),
        (lambda w: w.add_vocab_size(41), "vocab_size is 41; token_embd.weight has 40 rows"),
        (lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE), "'longrope'"),
        (
            lambda w: w.add_tensor("rope_freqs.weight", FREQS.astype(np.float16)),
            "rope_freqs.weight is F16",
        ),
    ],
)
def test_an_entry_of_another_kind_is_refused_by_name(tmp_path, tiny, edit, sentence):
    with pytest.raises(ModelError) as refusal:
        config_of(tmp_path, tiny, edit)
    assert sentence in str(refusal.value)


@pytest.mark.parametrize(
    "edit",
    [
        lambda w: w.add_float32("llama.attention.scale", 0.0),
        lambda w: w.add_float32("llama.logit_scale", 1.0),
        lambda w: w.add_uint32("llama.expert_count", 0),
        lambda w: w.add_uint32("llama.attention.sliding_window", 64),
        lambda w: w.add_uint32("llama.attention.sliding_window", 0),
        lambda w: w.add_bool("llama.attention.causal", True),
        lambda w: w.add_string("llama.tensor_data_layout", "Meta AI original pth"),
        lambda w: w.add_float32("llama.rope.scaling.attn_factor", 1.0),
    ],
)
def test_an_entry_that_changes_nothing_is_read_without_a_word(tmp_path, tiny, caplog, edit):
    assert config_of(tmp_path, tiny, edit) == config_of(tmp_path, tiny, nothing)
    assert not caplog.records


def test_entries_that_nobody_knows_are_said(tmp_path, tiny, caplog):
    def edit(writer: gguf.GGUFWriter) -> None:
        writer.add_float32("llama.reads_backwards", 1.0)
        writer.add_uint32("qwen2.context_length", 9)
        writer.add_string("general.own", "x")

    config_of(tmp_path, tiny, edit)
    assert "entries=llama.reads_backwards" in caplog.text
    assert "entries=qwen2.context_length" in caplog.text
    assert "general.own" not in caplog.text


def test_sampling_that_the_file_suggests_is_said(tmp_path, tiny, caplog):
    with caplog.at_level(logging.INFO):
        config_of(tmp_path, tiny, lambda w: w.add_float32("general.sampling.temp", 0.6))
    assert "temp 0.6" in caplog.text


@pytest.mark.parametrize(
    "name",
    [
        "blk.0.attn_output.bias",
        "blk.0.attn_q_norm.weight",
        "output.bias",
        "blk.0.ffn_gate_inp.weight",
        "rope_factors_long.weight",
        "blk.0.attn_q.weight.lora_a",
        "cls.weight",
    ],
)
def test_a_tensor_without_a_place_is_refused_by_name(tmp_path, tiny, name):
    edit: Edit = lambda writer: writer.add_tensor(name, np.ones(8, np.float32))  # noqa: E731
    with pytest.raises(ModelFileError, match=name):
        load(write_gguf(tmp_path / "odd.gguf", tiny, edit=edit))


def test_a_head_of_its_own_is_used_and_without_one_the_embedding(tmp_path, tiny):
    with_head = load(write_gguf(tmp_path / "head.gguf", tiny))
    assert torch.equal(with_head.decoder.head, tiny.lm_head.weight)
    assert not with_head.config.tie_word_embeddings


def test_an_entry_or_a_key_that_comes_twice_is_refused(tmp_path, tiny):
    path = write_gguf(
        tmp_path / "tiny.gguf", tiny, edit=lambda w: w.add_uint32("llama.feature_length", 1)
    )
    content = path.read_bytes()
    # Of the same length as another key.
    twice = content.replace(b"llama.feature_length", b"llama.context_length")
    assert twice != content
    path.write_bytes(twice)
    with pytest.raises(ModelFileError, match=r"llama\.context_length comes twice"):
        open_gguf(path)


def test_tensors_that_share_their_place_are_refused(tmp_path, tiny):
    path = write_gguf(tmp_path / "tiny.gguf", tiny)
    content = bytearray(path.read_bytes())
    tensors = gguf.GGUFReader(path).tensors
    last = tensors[-1]
    # The offset is the last entry of a tensor's line in the index.
    line = bytes(last.field.parts[0].tobytes()) + last.name.encode()
    at = content.index(line) + len(line) + 4 + 8 * len(last.shape) + 4
    struct.pack_into("<Q", content, at, 0)
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match=f"tensor {last.name} is at 0 in the place of"):
        open_gguf(path)


def test_an_alignment_that_is_no_power_of_two_is_refused(tmp_path, tiny):
    path = write_gguf(
        tmp_path / "tiny.gguf", tiny, edit=lambda w: w.add_uint32("general.alignment", 24)
    )
    with pytest.raises(ModelFileError, match="alignment is 24"):
        open_gguf(path)
