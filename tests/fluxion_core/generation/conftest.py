"""Small vocabularies: byte-level ones as Llama 3 and Qwen2 have, and one with byte fallback."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from fluxion_core.generation.tokenizer import Tokenizer

SPECIAL = ["<|bos|>", "<|im_end|>", "<|user defined ☃|>"]
MERGES = [("1", "2"), ("12", "3"), ("123", "4"), ("Ġ", "x"), ("Ã", "©"), ("h", "e"), ("!", "!")]
WrittenGguf = Callable[..., Path]


def byte_vocabulary() -> list[str]:
    """Special tokens, all bytes, what merges make, and a word that no merge makes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return [*SPECIAL, *alphabet, *(left + right for left, right in MERGES), "whole"]


@pytest.fixture
def write_gguf(tmp_path: Path) -> WrittenGguf:
    """A function that writes a GGUF file with the byte-level vocabulary; keywords change it."""

    def write(**changes: object) -> Path:
        tokens = byte_vocabulary()
        values: dict[str, object] = {
            "model": "gpt2",
            "pre": "gpt-2",
            "tokens": tokens,
            "merges": [" ".join(pair) for pair in MERGES],
            "token_type": [3, 3, 4] + [1] * (len(tokens) - 3),
            "bos_token_id": 0,
            "eos_token_id": 1,
            "chat_template": "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}",
            **changes,
        }
        path = tmp_path / "vocabulary.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        for name, value in values.items():
            own = name.startswith("chat_template")
            key = f"tokenizer.{name}" if own else f"tokenizer.ggml.{name}"
            match value:
                case None:
                    continue
                case bool():
                    writer.add_bool(key, value)
                case int():
                    writer.add_uint32(key, value)
                case str():
                    writer.add_string(key, value)
                case _:
                    writer.add_array(key, value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


@pytest.fixture(scope="session")
def byte_backend() -> tokenizers.Tokenizer:
    """As a tokenizer.json of Llama 3: byte-level, a text begins with <|bos|>."""
    vocabulary = {token: index for index, token in enumerate(byte_vocabulary())}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=MERGES))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL[:2]])
    backend.add_tokens([AddedToken(SPECIAL[2], normalized=False)])
    backend.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", 0)]
    )
    return backend


@pytest.fixture(scope="session")
def fallback_backend() -> tokenizers.Tokenizer:
    """As SentencePiece models become: ▁ for a space, bytes for characters that are not known."""
    known = [*"▁abcdefgh", "▁a", "▁b"]
    vocabulary = ["<s>", *(f"<0x{value:02X}>" for value in range(256)), *known]
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(vocabulary)},
            merges=[("▁", "a"), ("▁", "b")],
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens([AddedToken("<s>", normalized=False)])
    return backend


def wrap(backend: tokenizers.Tokenizer) -> Tokenizer:
    return Tokenizer(backend, None, bos_token_id=0, eos_token_ids=[1], add_bos=False)


@pytest.fixture(scope="session")
def byte_tokenizer(byte_backend: tokenizers.Tokenizer) -> Tokenizer:
    return wrap(byte_backend)


@pytest.fixture(scope="session")
def fallback_tokenizer(fallback_backend: tokenizers.Tokenizer) -> Tokenizer:
    return wrap(fallback_backend)
