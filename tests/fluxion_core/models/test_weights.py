"""Loading: logits are those of transformers; whatever is wrong with a file is said."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fluxion_core.errors import (
    ModelError,
    ModelFileError,
    ModelNotFoundError,
    UnsupportedModelError,
)
from fluxion_core.models import gguf_file
from fluxion_core.models.attention_port import AttentionPort
from fluxion_core.models.decoder import tensor_shapes
from fluxion_core.models.gguf_index import open_gguf
from fluxion_core.models.weights import LoadedModel, load_model

CPU = torch.device("cpu")
GGUF_NAMES = {hf: ours for ours, hf in gguf_file._TOP_PARTS.items()}
GGUF_PARTS = {hf: ours for ours, hf in gguf_file._LAYER_PARTS.items()}


class Remembering:
    """The attention port of one sequence that comes in pieces."""

    def __init__(self) -> None:
        self._kv: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        before = self._kv.get(layer, (key[:0], value[:0]))
        key, value = (torch.cat(pair) for pair in zip(before, (key, value), strict=True))
        self._kv[layer] = key, value
        seen = torch.arange(len(key)) <= torch.arange(len(key) - len(query), len(key))[:, None]
        group = query.shape[1] // key.shape[1]
        heads = [
            x.transpose(0, 1)
            for x in (query, *(x.repeat_interleave(group, 1) for x in (key, value)))
        ]
        return scaled_dot_product_attention(*heads, attn_mask=seen).transpose(0, 1)


def load(path: Path, dtype: torch.dtype = torch.float32) -> LoadedModel:
    return load_model(path, device=CPU, dtype=dtype)


def our_logits(model: LoadedModel, token_ids: Tensor, port: AttentionPort) -> Tensor:
    with torch.inference_mode():
        hidden = model.decoder(token_ids, torch.arange(len(token_ids)), port)
        return model.decoder.logits(hidden)


def oracle_logits(model: transformers.PreTrainedModel, token_ids: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(token_ids[None]).logits[0]


def write_gguf(
    path: Path,
    toy: transformers.PreTrainedModel,
    *,
    quantisation: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    edit: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
) -> Path:
    """What llama.cpp's converter writes for this model, in our own words."""
    config = toy.config
    arch = config.model_type
    writer = gguf.GGUFWriter(path, arch)
    head_dim = config.head_dim if arch == "llama" else config.hidden_size // 4
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if config.rope_parameters["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_parameters["factor"])
    if config.rope_parameters["rope_type"] == "llama3":
        # Factors from the oracle's own frequencies, so that ours are not their own judge.
        stretched = toy.model.rotary_emb.inv_freq.double()
        plain = 5e5 ** -(torch.arange(0, head_dim, 2).double() / head_dim)
        writer.add_tensor("rope_freqs.weight", (plain / stretched).float().numpy())
    edit(writer)
    for name, tensor in toy.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = tensor.numpy()
        if name in GGUF_NAMES:
            stored_name = GGUF_NAMES[name]
        else:
            _, _, index, part = name.split(".", 3)
            stored_name = f"blk.{index}.{GGUF_PARTS[part]}"
            if arch == "llama" and part in ("self_attn.q_proj.weight", "self_attn.k_proj.weight"):
                # llama.cpp's own permutation: halves become interleaved pairs.
                heads = array.shape[0] // head_dim
                shape = (heads, 2, head_dim // 2, array.shape[1])
                array = array.reshape(shape).swapaxes(1, 2).reshape(array.shape)
        if array.ndim == 1 or quantisation == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(stored_name, np.ascontiguousarray(array))
        else:
            quantised = gguf.quantize(np.ascontiguousarray(array), quantisation)
            writer.add_tensor(stored_name, quantised, raw_dtype=quantisation)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_logits_are_those_of_transformers(toy, toy_dir, token_ids, dense_causal):
    ours = our_logits(load(toy_dir), token_ids, dense_causal)
    expected = oracle_logits(toy, token_ids)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4 * expected.std().item())


def test_a_prompt_in_pieces_has_the_logits_of_the_whole(toy_dir, token_ids, dense_causal):
    model = load(toy_dir)
    whole = our_logits(model, token_ids, dense_causal)
    port, rows = Remembering(), []
    for positions in torch.arange(len(token_ids)).split([64, 1, 1, 84]):
        with torch.inference_mode():
            rows.append(model.decoder.logits(model.decoder(token_ids[positions], positions, port)))
    torch.testing.assert_close(torch.cat(rows), whole, rtol=1e-4, atol=1e-4)


def test_bfloat16_is_no_further_from_float32_than_transformers_is(
    toy, toy_dir, token_ids, dense_causal
):
    exact = oracle_logits(toy, token_ids)
    theirs = oracle_logits(toy.to(torch.bfloat16), token_ids).float()
    ours = our_logits(load(toy_dir, torch.bfloat16), token_ids, dense_causal)
    assert (ours - exact).norm() <= 1.25 * (theirs - exact).norm()


def test_a_gguf_copy_agrees_with_safetensors(toy, toy_dir, tmp_path, token_ids, dense_causal):
    ours = load(write_gguf(tmp_path / "toy.gguf", toy))
    twin = load(toy_dir)
    for (name, weight), (_, same) in zip(
        ours.decoder.named_parameters(), twin.decoder.named_parameters(), strict=True
    ):
        assert torch.equal(weight, same), name
    torch.testing.assert_close(
        our_logits(ours, token_ids, dense_causal), our_logits(twin, token_ids, dense_causal)
    )
    assert ours.config.tie_word_embeddings == twin.config.tie_word_embeddings
    assert ours.config.attention_bias == twin.config.attention_bias


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_1"])
def test_quantised_rows_are_those_of_the_whole_tensor(
    kind, toy, tmp_path, monkeypatch: pytest.MonkeyPatch
):
    # Pieces as small as they get: one head at a time.
    monkeypatch.setattr(gguf_file, "_PIECE_BYTES", 1)
    quantisation = gguf.GGMLQuantizationType[kind]
    model = load(write_gguf(tmp_path / "toy.gguf", toy, quantisation=quantisation))
    for name, weight in toy.state_dict().items():
        if weight.ndim == 2 and not (name == "lm_head.weight" and toy.config.tie_word_embeddings):
            rounded = gguf.dequantize(gguf.quantize(weight.numpy(), quantisation), quantisation)
            assert torch.equal(model.decoder.weight(name), torch.from_numpy(rounded)), name


def test_shards_are_one_model(toy, toy_dir, tmp_path, token_ids, dense_causal):
    toy.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    whole, sharded = load(toy_dir), load(tmp_path / "sharded")
    for name in tensor_shapes(whole.config):
        assert torch.equal(whole.decoder.weight(name), sharded.decoder.weight(name)), name


def test_equal_files_have_equal_hashes_and_other_weights_another(llama_dir, tmp_path):
    copy = tmp_path / "elsewhere"
    copy.mkdir()
    for file in llama_dir.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert load(copy).revision_hash == load(llama_dir).revision_hash
    weights = load_file(copy / "model.safetensors")
    weights["model.norm.weight"][3] += 1
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert load(copy).revision_hash != load(llama_dir).revision_hash


def test_all_weights_are_parameters(llama_dir):
    model = load(llama_dir)
    expected = sum(torch.Size(shape).numel() for shape in tensor_shapes(model.config).values())
    assert sum(parameter.numel() for parameter in model.decoder.parameters()) == expected


def test_end_tokens_come_from_both_configs(llama_dir):
    generation = llama_dir / "generation_config.json"
    generation.write_text(json.dumps({"eos_token_id": [5, 2]}))
    assert load(llama_dir).config.eos_token_ids == (2, 3, 5)


def edit_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, "supported: LlamaForCausalLM"),
        ({"architectures": None, "model_type": None}, "supported: LlamaForCausalLM"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"attention_bias": True}, "biases"),
        ({"mlp_bias": True}, "biases"),
        ({"use_sliding_window": True, "sliding_window": 64}, "sliding-window"),
        ({"quantization_config": {"bits": 4}}, "use GGUF"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "'yarn'"),
        ({"partial_rotary_factor": 0.5}, "part of the channels"),
    ],
)
def test_an_unsupported_option_is_refused(llama_dir, changes, sentence):
    edit_config(llama_dir, **changes)
    with pytest.raises(UnsupportedModelError, match=sentence):
        load(llama_dir)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"hidden_size": None}, "hidden_size is None; must be a number"),
        ({"hidden_size": "big"}, "hidden_size is 'big'"),
        ({"hidden_size": 64.5}, "must be an integer"),
        ({"hidden_size": 1 << 50}, "the config says"),
        ({"num_hidden_layers": 1 << 50}, "layers, the file has"),
        ({"num_hidden_layers": 4}, "9 tensors are missing"),
        ({"num_hidden_layers": 2}, "has no place"),
        ({"vocab_size": 161}, r"is \(160, 64\); the config says \(161, 64\)"),
        ({"num_key_value_heads": 3}, "no multiple"),
        ({"rms_norm_eps": -1}, "rms_norm_eps is -1"),
        ({"max_position_embeddings": 0}, "context_tokens is 0"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0}}, "rotary factor is 0"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8}}, "low_freq_factor is None"),
        ({"rope_parameters": [1]}, "must be an object"),
        ({"eos_token_id": "two"}, "token ids are 'two'"),
        ({"eos_token_id": [2, {}]}, "token ids are"),
        ({"eos_token_id": -1}, "token ids are -1"),
        ({"num_attention_heads": 10**400}, "must be a number"),
    ],
)
def test_a_wrong_config_is_refused_before_memory_is_taken(llama_dir, changes, sentence):
    edit_config(llama_dir, **changes)
    with pytest.raises(ModelFileError, match=sentence):
        load(llama_dir)


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"a": NaN', "\x00", '{"a": 1, "b": 2, "a": 3}', '[{"x": 1, "x": 1}]']
)
def test_a_config_that_is_no_object_is_refused(llama_dir, text):
    (llama_dir / "config.json").write_text(text)
    with pytest.raises(ModelFileError, match=r"config\.json"):
        load(llama_dir)


@pytest.mark.parametrize("keep", [0, 7, 8, 100, -1])
def test_a_truncated_safetensors_file_is_refused(llama_dir, keep):
    path = llama_dir / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelFileError, match="fetch it again"):
        load(llama_dir)


def test_a_safetensors_index_of_garbage_is_refused_or_read(llama_dir):
    # By law, as for GGUF.
    path = llama_dir / "model.safetensors"
    whole = path.read_bytes()
    generator = np.random.default_rng(5)
    refused = 0
    for _ in range(100):
        changed = bytearray(whole)
        changed[generator.integers(2000)] = generator.integers(256)
        path.write_bytes(changed)
        try:
            load(llama_dir)
        except ModelError:
            refused += 1
    assert refused > 50


def test_a_safetensors_tensor_of_integers_is_refused(llama_dir):
    path = llama_dir / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"] = weights["model.norm.weight"].to(torch.int8)
    save_file(weights, path)
    with pytest.raises(UnsupportedModelError, match=r"model\.norm\.weight is I8"):
        load(llama_dir)


def test_a_missing_shard_is_named(toy, tmp_path):
    toy.save_pretrained(tmp_path, max_shard_size="40KB")
    lost = sorted(tmp_path.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(ModelFileError, match=lost.name):
        load(tmp_path)


@pytest.mark.parametrize("odd", [None, 7, 0.5, ["a"], {}])
def test_an_index_that_names_no_files_is_refused(llama_dir, odd):
    weight_map = {"model.norm.weight": "model.safetensors", "lm_head.weight": odd}
    index = llama_dir / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ModelFileError, match="names files that are no text"):
        load(llama_dir)


def test_an_index_with_a_name_that_no_file_can_have_is_refused(llama_dir):
    index = llama_dir / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "x" * 2000}}))
    with pytest.raises(ModelFileError, match="File name too long"):
        load(llama_dir)


def test_a_config_of_a_size_that_none_has_is_not_read(llama_dir):
    with (llama_dir / "config.json").open("r+b") as file:
        file.truncate((64 << 20) + 1)
    with pytest.raises(ModelFileError, match="67108864 at most"):
        load(llama_dir)


def test_a_directory_without_weights_is_refused(llama_dir):
    (llama_dir / "model.safetensors").unlink()
    with pytest.raises(ModelFileError, match="no safetensors"):
        load(llama_dir)


def test_nothing_at_the_path_is_said(tmp_path):
    with pytest.raises(ModelNotFoundError, match="no such file"):
        load(tmp_path / "absent.gguf")


@pytest.fixture
def llama_gguf(tmp_path: Path) -> Path:
    """A file so small that it can be cut and damaged everywhere."""
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
    return write_gguf(tmp_path / "small.gguf", transformers.LlamaForCausalLM(config))


def test_a_gguf_file_cut_anywhere_is_refused(llama_gguf, tmp_path):
    whole = llama_gguf.read_bytes()
    cut = tmp_path / "cut.gguf"
    for keep in [*range(0, 2000, 7), *range(2000, len(whole), 997), len(whole) - 1]:
        cut.write_bytes(whole[:keep])
        with pytest.raises(ModelFileError):
            load(cut)


def data_start(path: Path) -> int:
    return min(t.data_offset for t in gguf.GGUFReader(path).tensors)


def test_a_gguf_index_of_garbage_is_refused_or_read(llama_gguf, tmp_path):
    # By law: whatever byte is changed, the outcome is a model or a ModelError, never a crash.
    # (Half of the changes hit names and numbers that a model can do without.)
    whole = llama_gguf.read_bytes()
    generator = np.random.default_rng(4)
    broken = tmp_path / "broken.gguf"
    refused = 0
    for _ in range(300):
        changed = bytearray(whole)
        for place in generator.integers(4, data_start(llama_gguf), size=2):
            changed[place] = generator.integers(256)
        broken.write_bytes(changed)
        try:
            load(broken)
        except ModelError as error:
            refused += str(broken) in str(error)
    assert refused > 100


def test_the_index_agrees_with_the_gguf_package(llama_gguf):
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(llama_gguf).tensors}
    ours = open_gguf(llama_gguf).tensors
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.shape == tuple(int(n) for n in reversed(theirs[name].shape))
        assert tensor.type == theirs[name].tensor_type
        assert tensor.rows.tobytes() == theirs[name].data.tobytes()


@pytest.mark.parametrize(
    ("edit", "error", "sentence"),
    [
        (lambda w: w.add_uint32("llama.expert_count", 8), UnsupportedModelError, "experts"),
        (lambda w: w.add_uint16("split.count", 3), UnsupportedModelError, "one of 3 files"),
        (
            lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN),
            UnsupportedModelError,
            "'yarn'",
        ),
        (
            lambda w: w.add_tensor("blk.0.attn_q_norm.weight", np.ones(4, np.float32)),
            ModelFileError,
            "attn_q_norm",
        ),
    ],
)
def test_what_a_gguf_file_asks_beyond_us_is_refused(tmp_path, llama, edit, error, sentence):
    path = write_gguf(tmp_path / "odd.gguf", llama, edit=edit)
    with pytest.raises(error, match=sentence):
        load(path)


@pytest.mark.parametrize(
    ("index", "sentence"),
    [
        # Lists and strings that fit the file and that no model has.
        (struct.pack("<QcIIQ", 1, b"k", 9, 0, (1 << 22) + 1), "k has 4194305 entries"),
        (struct.pack("<QcIIQ", 1, b"k", 9, 8, (1 << 22) + 1), "k has 4194305 entries"),
        (struct.pack("<Q", (1 << 24) + 1), "a string of 16777217 B"),
    ],
)
def test_a_gguf_file_that_is_all_metadata_is_not_read(tmp_path, index, sentence):
    path = tmp_path / "large.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + index)
    with path.open("r+b") as file:
        file.truncate(1 << 26)
    with pytest.raises(ModelFileError, match=sentence):
        load(path)


def test_another_architecture_is_unsupported(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "gemma.gguf", "gemma")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedModelError, match="architecture 'gemma'; supported: llama"):
        load(tmp_path / "gemma.gguf")


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"", ModelFileError),
        (b"GGML" + bytes(100), ModelFileError),
        (b"GGUF" + struct.pack("<I", 1), UnsupportedModelError),
        (b"GGUF" + struct.pack(">I", 3) + bytes(16), UnsupportedModelError),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0), ModelFileError),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60), ModelFileError),
        # A key of 2^63 bytes; an array of 2^62 strings.
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 63), ModelFileError),
        (b"GGUF" + struct.pack("<IQQQcIIQ", 3, 0, 1, 1, b"k", 9, 8, 1 << 62), ModelFileError),
    ],
)
def test_what_is_no_gguf_file_is_refused(tmp_path, content, error):
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(error):
        load(path)


@pytest.mark.model
def test_the_embedded_model_is_read_whole(smollm2_path):
    model = load(smollm2_path)
    assert model.revision_hash.startswith("b179c9523d0e6a0f")
    config = model.config
    assert (config.num_layers, config.num_heads, config.num_kv_heads) == (30, 9, 3)
    assert (config.vocab_size, config.context_tokens, config.rope.theta) == (49152, 8192, 1e5)
    assert config.tie_word_embeddings
