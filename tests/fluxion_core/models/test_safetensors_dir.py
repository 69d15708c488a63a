"""config.json and generation_config.json, entry by entry; transformers is the oracle."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
import transformers

from fluxion_core.errors import ModelError, ModelFileError, UnsupportedModelError
from fluxion_core.models.rope import inverse_frequencies
from fluxion_core.models.safetensors_dir import read_config

BASE: dict[str, object] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 160,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
QWEN2 = {**BASE, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# As they are published.
PUBLISHED: dict[str, dict[str, object]] = {
    "Llama-3.1-8B-Instruct": {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009],
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 8192},
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.42.3",
        "use_cache": True,
        "vocab_size": 128256,
    },
    "Qwen2.5-7B-Instruct": {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "hidden_act": "silu",
        "hidden_size": 3584,
        "initializer_range": 0.02,
        "intermediate_size": 18944,
        "max_position_embeddings": 32768,
        "max_window_layers": 28,
        "model_type": "qwen2",
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 131072,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.43.1",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 152064,
    },
    "SmolLM2-1.7B": {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 8192,
        "max_position_embeddings": 8192,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 24,
        "num_key_value_heads": 32,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 130000,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
        "transformers_version": "4.40.1",
        "use_cache": True,
        "vocab_size": 49152,
    },
}
SUGGESTING = {
    "bos_token_id": 151643,
    "pad_token_id": 151643,
    "do_sample": True,
    "eos_token_id": [151645, 151643],
    "repetition_penalty": 1.05,
    "temperature": 0.7,
    "top_p": 0.8,
    "top_k": 20,
    "transformers_version": "4.37.0",
}


def write(directory: Path, config: dict[str, object], generation: object = None) -> Path:
    (directory / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    return directory


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_published_configs_are_read_without_a_word(tmp_path, caplog, name):
    config = read_config(write(tmp_path, PUBLISHED[name]))
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert config.num_kv_heads == theirs.num_key_value_heads
    assert config.tie_word_embeddings == theirs.tie_word_embeddings
    assert config.rope.theta == theirs.rope_parameters["rope_theta"]


@pytest.mark.parametrize("base", [BASE, QWEN2], ids=["llama", "qwen2"])
@pytest.mark.parametrize(
    ("left_out", "ours"),
    [
        ("vocab_size", "vocab_size"),
        ("hidden_size", "hidden_size"),
        ("num_hidden_layers", "num_layers"),
        ("num_attention_heads", "num_heads"),
        ("num_key_value_heads", "num_kv_heads"),
        ("intermediate_size", "intermediate_size"),
        ("max_position_embeddings", "context_tokens"),
        ("rms_norm_eps", "rms_norm_eps"),
        ("tie_word_embeddings", "tie_word_embeddings"),
        ("bos_token_id", "bos_token_id"),
        ("eos_token_id", "eos_token_ids"),
    ],
)
def test_what_is_left_out_is_what_it_is_in_transformers(tmp_path, base, left_out, ours):
    # Such that every default fits beside the others.
    sizes = {"num_attention_heads": 32, "hidden_size": 512}
    config = {name: value for name, value in (base | sizes).items() if name != left_out}
    theirs = transformers.AutoConfig.from_pretrained(write(tmp_path, config))
    expected: object = getattr(theirs, left_out)
    if left_out == "eos_token_id":
        expected = () if expected is None else (expected,)
    assert getattr(read_config(tmp_path), ours) == expected


def test_null_is_no_default_where_transformers_makes_none(tmp_path):
    config = {**BASE, "bos_token_id": None, "eos_token_id": None, "num_key_value_heads": None}
    ours = read_config(write(tmp_path, config))
    assert (ours.bos_token_id, ours.eos_token_ids, ours.num_kv_heads) == (None, (), 4)


ROPES: dict[str, dict[str, object]] = {
    "none": {},
    "theta alone": {"rope_theta": 5e5},
    "old linear": {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "old linear, older name too": {
        "rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 4.0}
    },
    "old llama3": {"rope_theta": 5e5, "rope_scaling": LLAMA3},
    "theta in the scaling": {"rope_scaling": {**LLAMA3, "rope_theta": 5e5}},
    "null scaling": {"rope_theta": 5e5, "rope_scaling": None},
    "empty scaling": {"rope_scaling": {}, "rope_parameters": {"rope_theta": 5e5}},
    "new default": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "new linear": {"rope_parameters": {"rope_type": "linear", "factor": 2, "rope_theta": 1e5}},
    "new without theta": {"rope_parameters": {"rope_type": "linear", "factor": 2}},
    "new, theta beside": {
        "rope_theta": 7e4,
        "rope_parameters": {"rope_type": "linear", "factor": 2},
    },
    "linear added to new": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
    },
    "llama3 added to new": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        "rope_scaling": LLAMA3,
    },
    "the same twice": {
        "rope_theta": 5e5,
        "rope_parameters": {**LLAMA3, "rope_theta": 5e5},
        "rope_scaling": LLAMA3,
    },
    "length beside": {
        "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 128},
        "original_max_position_embeddings": 128,
    },
    "length beside alone": {
        "rope_scaling": {k: v for k, v in LLAMA3.items() if not k.startswith("original")},
        "original_max_position_embeddings": 128,
    },
    "all channels": {"partial_rotary_factor": 1.0},
    "more than linear needs": {
        "rope_scaling": {"type": "linear", "factor": 4.0, "beta_fast": 32, "attention_factor": 2.0}
    },
}


@pytest.mark.parametrize("name", sorted(ROPES))
def test_rotary_frequencies_are_those_of_transformers(tmp_path, name):
    ours = read_config(write(tmp_path, BASE | ROPES[name]))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    expected = transformers.LlamaForCausalLM(theirs).model.rotary_emb.inv_freq
    torch.testing.assert_close(
        inverse_frequencies(ours.rope, ours.head_dim), expected, rtol=1e-5, atol=0
    )


@pytest.mark.parametrize(
    ("scaling", "unread"),
    [
        ({"rope_type": "default", "factor": 4.0}, "factor"),
        ({"factor": 4.0}, "factor"),
        (
            {"rope_type": "linear", "factor": 4.0, "beta_fast": 32, "mscale": 1},
            '"beta_fast, mscale"',
        ),
        ({**LLAMA3, "truncate": True}, "truncate"),
    ],
)
def test_rotary_entries_that_do_not_count_are_said(tmp_path, caplog, scaling, unread):
    ours = read_config(write(tmp_path, BASE | {"rope_scaling": scaling}))
    assert f"entries={unread}" in caplog.text
    theirs = transformers.LlamaForCausalLM(transformers.AutoConfig.from_pretrained(tmp_path))
    expected = theirs.model.rotary_emb.inv_freq
    torch.testing.assert_close(inverse_frequencies(ours.rope, 16), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("ropes", "sentence"),
    [
        (
            {
                "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
                "rope_scaling": {"rope_type": "linear", "factor": 4.0},
            },
            "rope_theta of rope_parameters does not count beside rope_scaling",
        ),
        (
            {
                "rope_parameters": {**LLAMA3, "rope_theta": 1e4},
                "rope_scaling": {"rope_type": "linear", "factor": 4.0},
            },
            "rope_type is 'llama3' in rope_parameters and 'linear' in rope_scaling",
        ),
        (
            {
                "rope_parameters": {"rope_type": "linear", "factor": 2.0},
                "rope_scaling": {"rope_type": "linear", "factor": 4.0},
            },
            "factor is 2.0 in rope_parameters and 4.0",
        ),
        (
            {"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
            "rope_theta is 500000.0 in one place and 10000.0 in another",
        ),
        (
            {"rope_scaling": {"type": "linear", "rope_type": "llama3", "factor": 4.0}},
            "both 'llama3' and 'linear'",
        ),
        (
            {"rope_scaling": LLAMA3, "original_max_position_embeddings": 128},
            "original_max_position_embeddings is 64 in one place and 128",
        ),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rotary scaling 'yarn'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rotary scaling 'dynamic'"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rotary scaling 'longrope'"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "a part of"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "by kinds of layers"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear'; must be an object"),
        ({"rope_theta": "1e6"}, "rope_theta is '1e6'; must be a number"),
    ],
)
def test_rotary_settings_that_contradict_or_are_unknown_are_refused(tmp_path, ropes, sentence):
    with pytest.raises(ModelError) as refusal:
        read_config(write(tmp_path, BASE | ropes))
    assert sentence in str(refusal.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": ["LlamaForCausalLM"], "model_type": "mistral"},
        {"architectures": ["MistralForCausalLM"], "model_type": "llama"},
        {"architectures": ["LlamaForCausalLM", "MixtralForCausalLM"]},
        {"architectures": ["LlamaForSequenceClassification"]},
        {"hidden_act": "gelu"},
        {"hidden_act": None},
        {"attention_bias": True},
        {"mlp_bias": True},
        {"sliding_window": 64},
        {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
        {"quantization_config": {"quant_method": "gptq"}},
        {"compression_config": {"format": "int8"}},
        {"per_layer_config": {"0": {"num_key_value_heads": 1}}},
        {"auto_map": {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}},
        {"pruned_heads": {"0": [1]}},
        {"is_encoder_decoder": True},
        {"add_cross_attention": True},
        {"is_causal": False},
        {"use_bidirectional_attention": True},
        {"attention_chunk_size": 128},
        {"num_local_experts": 8},
        {"embedding_multiplier": 12.0},
        {"residual_multiplier": 0.22},
        {"attention_multiplier": 0.0078125},
        {"logits_scaling": 16.0},
        {"logit_scale": 0.0625},
        {"scale_depth": 1.4},
        {"attn_logit_softcapping": 50.0},
        {"final_logit_softcapping": 30.0},
        {"query_pre_attn_scalar": 256},
        {"clip_qkv": 8.0},
        {"use_qk_norm": True},
        {"alibi": True},
        {"no_rope_layers": [1, 1, 0]},
        {"rotary_pct": 0.5},
        {"kv_lora_rank": 512},
        {"vision_config": {"hidden_size": 1}},
        {"use_mrope": True},
    ],
    ids=str,
)
def test_what_would_change_the_answer_and_is_not_implemented_is_refused_by_name(tmp_path, changes):
    with pytest.raises(UnsupportedModelError) as refusal:
        read_config(write(tmp_path, BASE | changes))
    assert any(
        name in str(refusal.value) for name in [*changes, "sliding-window", "biases", "kind"]
    )
    assert "config.json" in str(refusal.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"embedding_multiplier": 1},
        {"logit_scale": 1.0},
        {"attn_logit_softcapping": None},
        {"quantization_config": None},
        {"auto_map": {}},
        {"num_local_experts": 0},
        {"is_causal": True},
        {"hidden_act": "swish"},
        {"sliding_window": None},
        {"sliding_window": 512},
        {"sliding_window": 64, "use_sliding_window": False},
        {"layer_types": ["full_attention"] * 3},
        {"architectures": None},
        {"architectures": []},
        {"model_type": None},
        {"temperature": 0.5, "top_k": 7, "num_beams": 4},
        {"torch_dtype": "float16", "dtype": "bfloat16"},
        {"pretraining_tp": 4},
    ],
    ids=str,
)
def test_what_changes_nothing_is_read_without_a_word(tmp_path, caplog, changes):
    assert read_config(write(tmp_path, BASE | changes)) == read_config(write(tmp_path, BASE))
    assert not caplog.records


@pytest.mark.parametrize(
    ("changes", "has_window"),
    [
        ({}, False),
        ({"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 3}, False),
        ({"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 2}, True),
        ({"use_sliding_window": True, "sliding_window": 64}, False),
        ({"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}, False),
        ({"use_sliding_window": False, "sliding_window": 64, "max_window_layers": 0}, False),
        (
            {
                "use_sliding_window": True,
                "max_window_layers": 0,
                "layer_types": ["full_attention"] * 3,
            },
            False,
        ),
    ],
    ids=str,
)
def test_a_window_of_qwen2_is_there_where_transformers_has_one(tmp_path, changes, has_window):
    theirs = transformers.AutoConfig.from_pretrained(write(tmp_path, QWEN2 | changes))
    assert has_window == ("sliding_attention" in theirs.layer_types)
    if has_window:
        with pytest.raises(UnsupportedModelError, match="sliding-window"):
            read_config(tmp_path)
    else:
        read_config(tmp_path)


def test_an_entry_that_nobody_knows_is_said(tmp_path, caplog):
    read_config(write(tmp_path, BASE | {"reads_backwards": True, "half_heads": [1], "off": False}))
    assert 'entries="half_heads, reads_backwards"' in caplog.text


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'; must be true or false"),
        ({"mlp_bias": 0}, "mlp_bias is 0; must be true or false"),
        ({"eos_token_id": 160}, "special token 160 of 160 tokens"),
        ({"layer_types": ["full_attention"]}, "layer_types has not 3 entries"),
    ],
)
def test_an_entry_of_the_wrong_kind_is_refused(tmp_path, changes, sentence):
    with pytest.raises(ModelFileError, match=sentence):
        read_config(write(tmp_path, BASE | changes))


def test_how_the_makers_would_sample_is_said_and_left_to_requests(tmp_path, caplog):
    config = {**PUBLISHED["Qwen2.5-7B-Instruct"]}
    with caplog.at_level(logging.INFO):
        ours = read_config(write(tmp_path, config, SUGGESTING))
    assert ours.eos_token_ids == (151643, 151645)
    assert "repetition_penalty 1.05, temperature 0.7, top_k 20, top_p 0.8" in caplog.text
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize(
    "changes",
    [
        {"suppress_tokens": [5]},
        {"begin_suppress_tokens": [5]},
        {"bad_words_ids": [[5, 6]]},
        {"forced_bos_token_id": 5},
        {"forced_eos_token_id": 2},
        {"sequence_bias": [[[5], -1.0]]},
        {"stop_strings": ["END"]},
        {"num_beams": 4},
        {"guidance_scale": 1.5},
        {"exponential_decay_length_penalty": [4, 1.1]},
        {"token_healing": True},
    ],
    ids=str,
)
def test_a_generation_config_that_asks_for_more_than_tokens_is_refused_by_name(tmp_path, changes):
    with pytest.raises(
        UnsupportedModelError, match=f"generation_config.json: {next(iter(changes))}"
    ):
        read_config(write(tmp_path, BASE, changes))


def test_a_generation_config_written_out_in_full_asks_for_nothing(tmp_path, caplog):
    everything = transformers.GenerationConfig().to_dict()
    with caplog.at_level(logging.INFO):
        read_config(write(tmp_path, BASE, everything))
    assert not caplog.records
