"""GGUF files with damaged indexes: metadata, tensor infos, vocabulary."""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from random import Random

import numpy as np
import torch
from gguf import GGMLQuantizationType, quants

from fluxion_core.errors import FluxionError
from fluxion_core.generation.chat import ChatMessage
from fluxion_core.generation.tokenizer import Tokenizer
from fluxion_core.models.weights import load_model
from tests.fuzz.harness import Outcome, ViolationError
from tests.fuzz.mutate import mutate_bytes, odd_integer, odd_text

_TYPES = {"u32": 4, "i32": 5, "f32": 6, "bool": 7, "string": 8, "array": 9, "u64": 10, "f64": 12}
_CODES = {"u32": "I", "i32": "i", "f32": "f", "bool": "?", "u64": "Q", "f64": "d"}
_TEMPLATE = "{{ messages[0].content }}"


@dataclass(frozen=True)
class Part:
    """One element of an index: a number, or a string with its length in front."""

    kind: str
    value: int | float | bytes

    @cached_property
    def encoded(self) -> bytes:
        """As the file has it."""
        if isinstance(self.value, bytes):
            return struct.pack("<Q", len(self.value)) + self.value
        return struct.pack(f"<{_CODES[self.kind]}", self.value)


class GgufFiles:
    """Small files of both architectures with a few changes each; every tenth has none."""

    name = "gguf"
    unit = "headers"

    def __init__(self) -> None:
        # A thread more costs more than it does.
        torch.set_num_threads(1)
        self._directory = tempfile.TemporaryDirectory(prefix="fluxion-fuzz-", dir=fast_directory())
        self._path = Path(self._directory.name) / "model.gguf"
        self._seeds = [
            seed_file("llama", "F32", "gpt-2"),
            seed_file("llama", "Q8_0", "smollm"),
            seed_file("llama", "Q4_1", "llama-bpe", has_factors=True),
            seed_file("qwen2", "F16", "qwen2"),
        ]

    def close(self) -> None:
        """Remove the file."""
        self._directory.cleanup()

    def run(self, random: Random) -> Outcome:
        """Load one file as a node does."""
        parts, data = random.choice(self._seeds)
        is_damaged = random.random() < 0.9
        if is_damaged and random.random() < 0.8:
            for _ in range(random.choice((1, 1, 1, 2, 4))):
                parts = damage(random, parts)
        content = serialized(parts, data)
        if is_damaged and random.random() < 0.3:
            # The data behind the index are numbers that anything may stand for.
            content = mutate_bytes(random, content[: len(content) - len(data)]) + data
        if is_damaged and random.random() < 0.1:
            content = content[: random.randrange(len(content))]
        # A new file each time: what was mapped keeps its content.
        self._path.unlink(missing_ok=True)
        self._path.write_bytes(content)
        return Outcome(load_as_a_node(self._path, is_damaged=is_damaged), 1, len(content))


def load_as_a_node(path: Path, *, is_damaged: bool) -> str:
    """Load a model and its tokenizer, and use the latter.

    Returns:
        accepted, or the name of the error.
    """
    try:
        tokenizer = Tokenizer.load(path)
        loaded = load_model(path, device=torch.device("cpu"), dtype=torch.float32)
        tokenizer.check_fits(loaded.config.vocab_size)
        tokenizer.decode(tokenizer.encode("Why is the sky dark? 12345 \U0001f600"))
        if tokenizer.has_chat_template:
            tokenizer.render_chat([ChatMessage("user", "hello")])
    except FluxionError as error:
        if not is_damaged:
            raise ViolationError(f"a whole model was refused: {error}") from error
        return type(error).__name__
    return "accepted"


def fast_directory() -> str | None:
    """Where files cost no disk, if there is such a place."""
    shared_memory = Path("/dev/shm")
    return str(shared_memory) if shared_memory.is_dir() else None


def damage(random: Random, parts: list[Part]) -> list[Part]:
    """Change, lose, double or swap parts of an index."""
    parts = list(parts)
    if not parts:
        return parts
    # The vocabulary is most of the parts; what precedes and follows it says more.
    numbers = [index for index, part in enumerate(parts) if part.kind != "string"]
    at = (
        random.choice(numbers)
        if numbers and random.random() < 0.6
        else random.randrange(len(parts))
    )
    part = parts[at]
    match random.randrange(8):
        case 0:
            del parts[at : at + random.choice((1, 1, 2, 3, 20))]
        case 1:
            parts[at:at] = parts[at : at + random.choice((1, 2, 3, 20))]
        case 2:
            other = random.randrange(len(parts))
            parts[at], parts[other] = parts[other], part
        case _:
            parts[at] = _odd(random, part)
    return parts


def _odd(random: Random, part: Part) -> Part:
    match part.kind:
        case "string" if random.random() < 0.5:
            assert isinstance(part.value, bytes)
            return Part("string", mutate_bytes(random, part.value))
        case "string":
            return Part("string", odd_text(random).encode("utf-8", "surrogatepass"))
        case "u64":
            return Part("u64", odd_integer(random, 64, int(part.value)))
        case "u32" | "bool":
            return Part("u32", odd_integer(random, 32, int(part.value)))
        case "i32":
            return Part("i32", odd_integer(random, 32) - 2**31)
        case kind:
            nan, inf = float("nan"), float("inf")
            return Part(kind, random.choice((0.0, -1.0, 1e-40, 3e38, nan, inf, -inf)))


def serialized(parts: list[Part], data: bytes) -> bytes:
    """The file: index, padding to 32 bytes, data."""
    index = b"GGUF" + b"".join(part.encoded for part in parts)
    return index + bytes(-len(index) % 32) + data


def seed_file(
    architecture: str, kind: str, cutting: str, *, has_factors: bool = False
) -> tuple[list[Part], bytes]:
    """Index and data of a small model that loads."""
    hidden, heads, kv_heads, feed_forward = 32, 2, 1, 32
    tokens = _vocabulary()
    metadata: dict[str, tuple[str, object]] = {
        "general.architecture": ("string", architecture),
        "general.alignment": ("u32", 32),
        f"{architecture}.embedding_length": ("u32", hidden),
        f"{architecture}.attention.head_count": ("u32", heads),
        f"{architecture}.attention.head_count_kv": ("u32", kv_heads),
        f"{architecture}.block_count": ("u32", 1),
        f"{architecture}.feed_forward_length": ("u32", feed_forward),
        f"{architecture}.context_length": ("u32", 512),
        f"{architecture}.attention.layer_norm_rms_epsilon": ("f32", 1e-5),
        f"{architecture}.rope.freq_base": ("f32", 10_000.0),
        "tokenizer.ggml.model": ("string", "gpt2"),
        "tokenizer.ggml.pre": ("string", cutting),
        "tokenizer.ggml.bos_token_id": ("u32", len(tokens) - 2),
        "tokenizer.ggml.eos_token_id": ("u32", len(tokens) - 1),
        "tokenizer.ggml.add_bos_token": ("bool", True),
        "tokenizer.chat_template": ("string", _TEMPLATE),
        "tokenizer.ggml.tokens": ("strings", tokens),
        "tokenizer.ggml.token_type": ("i32s", [1] * (len(tokens) - 2) + [3, 3]),
        "tokenizer.ggml.merges": ("strings", ["a b", "c d"]),
    }
    if architecture == "llama" and not has_factors:
        metadata["llama.rope.scaling.type"] = ("string", "linear")
        metadata["llama.rope.scaling.factor"] = ("f32", 2.0)
    kv_dim = hidden // heads * kv_heads
    shapes = {
        "token_embd.weight": (len(tokens), hidden),
        "output_norm.weight": (hidden,),
        "blk.0.attn_norm.weight": (hidden,),
        "blk.0.ffn_norm.weight": (hidden,),
        "blk.0.attn_q.weight": (hidden, hidden),
        "blk.0.attn_k.weight": (kv_dim, hidden),
        "blk.0.attn_v.weight": (kv_dim, hidden),
        "blk.0.attn_output.weight": (hidden, hidden),
        "blk.0.ffn_gate.weight": (feed_forward, hidden),
        "blk.0.ffn_up.weight": (feed_forward, hidden),
        "blk.0.ffn_down.weight": (hidden, feed_forward),
    }
    if architecture == "qwen2":
        shapes |= {
            "blk.0.attn_q.bias": (hidden,),
            "blk.0.attn_k.bias": (kv_dim,),
            "blk.0.attn_v.bias": (kv_dim,),
        }
    if has_factors:
        shapes["rope_freqs.weight"] = (hidden // heads // 2,)
    parts = [Part("u32", 3), Part("u64", len(shapes)), Part("u64", len(metadata))]
    for key, (value_kind, value) in metadata.items():
        parts.append(Part("string", key.encode()))
        parts.extend(_value_parts(value_kind, value))
    data = b""
    for name, shape in shapes.items():
        stored = GGMLQuantizationType[kind if len(shape) == 2 else "F32"]
        content = quants.quantize(np.ones(shape, np.float32), stored).tobytes()
        parts += [Part("string", name.encode()), Part("u32", len(shape))]
        parts += [Part("u64", size) for size in reversed(shape)]
        parts += [Part("u32", int(stored)), Part("u64", len(data))]
        data += content + bytes(-len(content) % 32)
    return parts, data


def _value_parts(kind: str, value: object) -> Iterator[Part]:
    if kind in ("strings", "i32s"):
        assert isinstance(value, list)
        inner = kind[:-1]
        yield Part("u32", _TYPES["array"])
        yield Part("u32", _TYPES[inner])
        yield Part("u64", len(value))
        for each in value:
            yield Part(inner, each.encode() if inner == "string" else each)
    else:
        yield Part("u32", _TYPES[kind])
        yield Part(kind, value.encode() if isinstance(value, str) else value)  # type: ignore[arg-type]


def _vocabulary() -> list[str]:
    """GPT-2's characters of some bytes, two merges, two control tokens."""
    return [
        *"abcdefghijklmnopqrstuvwxyz0123456789.,?!WĠĊð",
        "ab",
        "cd",
        "<|endoftext|>",
        "<|im_end|>",
    ]
