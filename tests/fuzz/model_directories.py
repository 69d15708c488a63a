"""Model directories with damaged files: safetensors headers, configs, tokenizers, templates."""

from __future__ import annotations

import json
import struct
import tempfile
from pathlib import Path
from random import Random

import torch
from safetensors.torch import save
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tests.fuzz.gguf_files import fast_directory, load_as_a_node
from tests.fuzz.harness import Outcome
from tests.fuzz.mutate import mutate_bytes, mutate_json, odd_integer

_TEMPLATE = "{{ messages[0].content }}"
_ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789.,?!WĠĊð"
_LENGTH = struct.Struct("<Q")
_FIRST, _SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


class ModelDirectories:
    """One small model in two files with a few changes each; every tenth time there are none.

    Most often it is the header of a safetensors file that is damaged.
    """

    name = "safetensors"
    unit = "headers"

    def __init__(self) -> None:
        # A thread more costs more than it does.
        torch.set_num_threads(1)
        self._temporary = tempfile.TemporaryDirectory(prefix="fluxion-fuzz-", dir=fast_directory())
        self._directory = Path(self._temporary.name)
        self._files = seed_directory()
        for name, content in self._files.items():
            (self._directory / name).write_bytes(content)
        self._shards = (_FIRST, _SECOND)
        self._others = [name for name in self._files if name not in self._shards]

    def close(self) -> None:
        """Remove the files."""
        self._temporary.cleanup()

    def run(self, random: Random) -> Outcome:
        """Load the directory as a node does, with one or two of its files damaged."""
        is_damaged = random.random() < 0.9
        changed: set[str] = set()
        if is_damaged:
            for _ in range(random.choice((1, 1, 1, 2))):
                others = self._others if random.random() < 0.4 else self._shards
                changed.add(random.choice(others))
        total = sum(map(len, self._files.values()))
        try:
            for name in sorted(changed):
                content = self._damaged(random, name)
                total += len(content)
                self._replace(name, content)
            result = load_as_a_node(self._directory, is_damaged=is_damaged)
        finally:
            for name in changed:
                self._replace(name, self._files[name])
        return Outcome(result, 1, total)

    def _replace(self, name: str, content: bytes) -> None:
        path = self._directory / name
        # A new file each time: what was mapped keeps its content.
        path.unlink(missing_ok=True)
        path.write_bytes(content)

    def _damaged(self, random: Random, name: str) -> bytes:
        content = self._files[name]
        if name in self._shards:
            return damage_safetensors(random, content)
        if name.endswith(".json") and random.random() < 0.8:
            value = json.loads(content)
            for _ in range(random.choice((1, 1, 2, 4))):
                value = mutate_json(random, value)
            return json.dumps(value).encode("utf-8", "surrogatepass")
        return mutate_bytes(random, content)


def damage_safetensors(random: Random, content: bytes) -> bytes:
    """Change the length in front, the header, or cut the file."""
    (size,) = _LENGTH.unpack_from(content)
    header, data = content[_LENGTH.size : _LENGTH.size + size], content[_LENGTH.size + size :]
    match random.randrange(10):
        case 0:
            return _LENGTH.pack(odd_integer(random, 64, size)) + header + data
        case 1:
            return content[: random.randrange(len(content))]
        case 2:
            return content + random.randbytes(random.randrange(1, 40))
        case 3 | 4:
            header = mutate_bytes(random, header)
        case _:
            value = json.loads(header)
            for _ in range(random.choice((1, 1, 1, 2, 4))):
                value = _with_odd_entry(random, value)
            header = json.dumps(value).encode("utf-8", "surrogatepass")
    return _LENGTH.pack(len(header)) + header + data


def _with_odd_entry(random: Random, header: object) -> object:
    """Something odd about one tensor's dtype, shape or place, or anywhere."""
    if not isinstance(header, dict) or not header or random.random() < 0.3:
        return mutate_json(random, header)
    name = random.choice(sorted(header))
    entry = header[name]
    if not isinstance(entry, dict):
        return mutate_json(random, header)
    entry = dict(entry)
    match random.randrange(4):
        case 0:
            entry["dtype"] = random.choice(
                ("F64", "F32", "F16", "BF16", "I8", "BOOL", "F8_E4M3", "")
            )
        case 1:
            shape = entry.get("shape")
            entry["shape"] = mutate_json(random, shape if isinstance(shape, list) else [])
        case 2:
            begin, end = odd_integer(random, 64), odd_integer(random, 64)
            entry["data_offsets"] = random.choice(
                ([begin, end], [end, begin], [0, end], [begin, 0])
            )
        case _:
            return {**header, random.choice(sorted(header)): entry, name + "x": entry}
    return {**header, name: entry}


def seed_directory() -> dict[str, bytes]:
    """The files of a small Llama that loads, by name."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "vocab_size": 48,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "bos_token_id": 46,
        "eos_token_id": 47,
    }
    layer = "model.layers.0"
    shapes = {
        "model.embed_tokens.weight": (48, 32),
        "lm_head.weight": (48, 32),
        "model.norm.weight": (32,),
        f"{layer}.input_layernorm.weight": (32,),
        f"{layer}.post_attention_layernorm.weight": (32,),
        f"{layer}.self_attn.q_proj.weight": (32, 32),
        f"{layer}.self_attn.k_proj.weight": (16, 32),
        f"{layer}.self_attn.v_proj.weight": (16, 32),
        f"{layer}.self_attn.o_proj.weight": (32, 32),
        f"{layer}.mlp.gate_proj.weight": (32, 32),
        f"{layer}.mlp.up_proj.weight": (32, 32),
        f"{layer}.mlp.down_proj.weight": (32, 32),
    }
    place = {name: _FIRST if index < 6 else _SECOND for index, name in enumerate(shapes)}
    shards = {
        shard: save(
            {
                name: torch.ones(shape, dtype=torch.bfloat16)
                for name, shape in shapes.items()
                if place[name] == shard
            }
        )
        for shard in (_FIRST, _SECOND)
    }
    special = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": _TEMPLATE}
    texts = {
        "config.json": config,
        "generation_config.json": {"eos_token_id": [47]},
        "tokenizer_config.json": special,
        "model.safetensors.index.json": {"metadata": {}, "weight_map": place},
    }
    return {
        **shards,
        **{name: json.dumps(value).encode() for name, value in texts.items()},
        "tokenizer.json": _tokenizer().encode(),
        "chat_template.jinja": _TEMPLATE.encode(),
    }


def _tokenizer() -> str:
    vocabulary = {character: index for index, character in enumerate(_ALPHABET)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    text: str = tokenizer.to_str()
    return text
