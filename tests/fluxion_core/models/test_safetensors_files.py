"""Weights of a directory: every stored tensor counts, and so does every file that lies there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from fluxion_core.errors import ModelFileError, UnsupportedModelError
from fluxion_core.models.weights import LoadedModel, load_model
from tests.fluxion_core.models.conftest import toy_llama

ONE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def load(path: Path) -> LoadedModel:
    return load_model(path, device=torch.device("cpu"), dtype=torch.float32)


def edit_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def heads(directory: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """The head in use: transformers' and ours."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory).lm_head.weight
    return theirs, load(directory).decoder.head


def test_a_trained_head_is_used_whatever_the_config_says_of_tying(llama_dir, caplog):
    edit_config(llama_dir, tie_word_embeddings=True)
    theirs, ours = heads(llama_dir)
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, load_file(llama_dir / ONE_FILE)["model.embed_tokens.weight"])
    assert "the stored head is another; it is used" in caplog.text


@pytest.mark.parametrize("row", [0, 159])
def test_one_other_row_makes_another_head(llama_dir, row):
    weights = load_file(llama_dir / ONE_FILE)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    weights["lm_head.weight"][row, 3] += 1
    save_file(weights, llama_dir / ONE_FILE)
    edit_config(llama_dir, tie_word_embeddings=True)
    theirs, ours = heads(llama_dir)
    assert torch.equal(ours, theirs)
    assert not load(llama_dir).config.tie_word_embeddings


def test_a_copy_of_the_embedding_is_stored_once(llama_dir, caplog):
    weights = load_file(llama_dir / ONE_FILE)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, llama_dir / ONE_FILE)
    edit_config(llama_dir, tie_word_embeddings=True)
    model = load(llama_dir)
    assert model.decoder.head is model.decoder.embedding
    assert not caplog.records


def test_a_head_without_an_embedding_is_both(llama_dir):
    weights = load_file(llama_dir / ONE_FILE)
    del weights["model.embed_tokens.weight"]
    save_file(weights, llama_dir / ONE_FILE, metadata={"format": "pt"})
    edit_config(llama_dir, tie_word_embeddings=True)
    theirs, ours = heads(llama_dir)
    assert torch.equal(ours, theirs)
    assert torch.equal(load(llama_dir).decoder.embedding, weights["lm_head.weight"])


def test_an_untied_model_without_a_head_is_not_made_up(llama_dir):
    weights = load_file(llama_dir / ONE_FILE)
    del weights["lm_head.weight"]
    save_file(weights, llama_dir / ONE_FILE)
    with pytest.raises(ModelFileError, match=r"1 tensors are missing, the first: lm_head\.weight"):
        load(llama_dir)


@pytest.mark.parametrize(
    "name", ["model.rotary_emb.inv_freq", "model.layers.1.self_attn.rotary_emb.inv_freq"]
)
@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_stored_frequencies_are_computed_anew_and_said_if_they_differ(
    llama_dir, caplog, name, factor
):
    weights = load_file(llama_dir / ONE_FILE)
    weights[name] = factor / 500_000.0 ** (torch.arange(0, 16, 2) / 16)
    save_file(weights, llama_dir / ONE_FILE)
    load(llama_dir)
    assert ("are not the config's" in caplog.text) == (factor != 1)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_norm.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.0.self_attn.k_scale",
        "model.layers.0.mlp.gate_proj.weight_scale",
        "model.layers.0.post_feedforward_layernorm.weight",
        "model.layers.0.block_sparse_moe.gate.weight",
        "model.layers.0.rotary_emb.inv_freq.weight",
        "score.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
    ],
)
def test_a_tensor_without_a_place_is_refused_by_name(llama_dir, name):
    weights = load_file(llama_dir / ONE_FILE)
    weights[name] = torch.ones(4)
    save_file(weights, llama_dir / ONE_FILE)
    with pytest.raises(ModelFileError, match=f"tensor {name} has no place"):
        load(llama_dir)


@pytest.mark.parametrize(("form", "is_read"), [("pt", True), ("mlx", True), ("tf", False)])
def test_the_layout_of_another_library_is_refused(llama_dir, form, is_read):
    save_file(load_file(llama_dir / ONE_FILE), llama_dir / ONE_FILE, metadata={"format": form})
    if is_read:
        load(llama_dir)
    else:
        with pytest.raises(UnsupportedModelError, match="format is 'tf'"):
            load(llama_dir)


def test_an_adapter_beside_the_model_is_refused(llama_dir):
    (llama_dir / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(UnsupportedModelError, match="merge it into them"):
        load(llama_dir)


def index_of(directory: Path, weight_map: dict[str, str]) -> None:
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def test_an_index_of_the_one_file_is_no_second_set(llama_dir):
    index_of(llama_dir, dict.fromkeys(load_file(llama_dir / ONE_FILE), ONE_FILE))
    load(llama_dir)


def test_a_file_and_an_index_of_other_files_are_two_models(llama_dir):
    toy_llama().save_pretrained(llama_dir / "again", max_shard_size="40KB")
    for path in (llama_dir / "again").glob("model*"):
        path.rename(llama_dir / path.name)
    with pytest.raises(ModelFileError, match="of other files; keep one"):
        load(llama_dir)


def test_a_tensor_that_the_index_sees_elsewhere_is_missed(llama_dir):
    index_of(llama_dir, {"model.norm.weight": ONE_FILE, "model.own.weight": ONE_FILE})
    with pytest.raises(ModelFileError, match=r"lacks model\.own\.weight, which the index says"):
        load(llama_dir)


def test_a_file_that_no_index_names_is_said(llama_dir, caplog):
    save_file({"other": torch.ones(1)}, llama_dir / "consolidated.safetensors")
    load(llama_dir)
    assert "files=consolidated.safetensors" in caplog.text


def test_several_files_without_an_index_are_refused(llama_dir):
    (llama_dir / ONE_FILE).rename(llama_dir / "model-00001-of-00002.safetensors")
    save_file({"other": torch.ones(1)}, llama_dir / "model-00002-of-00002.safetensors")
    with pytest.raises(ModelFileError, match=r"but no model\.safetensors\.index\.json"):
        load(llama_dir)


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "sub/model.safetensors", "/etc/passwd", ""]
)
def test_an_index_of_files_elsewhere_is_refused(llama_dir, name):
    index_of(llama_dir, {"model.norm.weight": name})
    with pytest.raises(ModelFileError, match=r"which lies elsewhere|lacks|of other files"):
        load(llama_dir)
