"""Files of a tokenizer: read back, they make the same tokenizer, here and in other programs."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import pytest
import tokenizers

from fluxion_core.generation.chat import ChatMessage, ChatTemplate
from fluxion_core.generation.tokenizer import Tokenizer
from fluxion_core.generation.tokenizer_files import tokenizer_archive, tokenizer_files

TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
TEXT = "hello  wörld <|im_end|>"


@pytest.fixture(params=[True, False], ids=["begins with a token", "begins bare"])
def tokenizer(byte_backend: tokenizers.Tokenizer, request: pytest.FixtureRequest) -> Tokenizer:
    """As of a GGUF file: whether a text begins with <|bos|> is said beside the backend."""
    bare = tokenizers.Tokenizer.from_str(byte_backend.to_str())
    bare.post_processor = tokenizers.processors.Sequence([])
    template = ChatTemplate(TEMPLATE, {"bos_token": "<|bos|>", "eos_token": "<|im_end|>"})
    return Tokenizer(bare, template, bos_token_id=0, eos_token_ids=[1], add_bos=request.param)


@pytest.fixture
def directory(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    with zipfile.ZipFile(io.BytesIO(tokenizer_archive(tokenizer))) as archive:
        archive.extractall(tmp_path)
    return tmp_path


def test_read_back_it_is_the_same_tokenizer(tokenizer: Tokenizer, directory: Path):
    again = Tokenizer.load(directory)
    assert again.fingerprint == tokenizer.fingerprint
    assert again.encode(TEXT) == tokenizer.encode(TEXT)
    assert again.eos_token_ids == tokenizer.eos_token_ids
    messages = [ChatMessage("user", "hi")]
    assert again.render_chat(messages) == tokenizer.render_chat(messages)


def test_transformers_reads_it_and_gets_the_same_ids(tokenizer: Tokenizer, directory: Path):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(directory)
    assert theirs.encode(TEXT) == tokenizer.encode(TEXT)
    assert theirs.eos_token == "<|im_end|>"


def test_a_tokenizer_without_a_template_has_no_template_file(byte_tokenizer: Tokenizer):
    assert "chat_template" not in tokenizer_files(byte_tokenizer)["tokenizer_config.json"]


def test_the_same_tokenizer_makes_the_same_archive(tokenizer: Tokenizer):
    assert tokenizer_archive(tokenizer) == tokenizer_archive(tokenizer)


def test_a_suffix_and_split_special_tokens_are_read_back(byte_backend, tmp_path: Path):
    bare = tokenizers.Tokenizer.from_str(byte_backend.to_str())
    bare.encode_special_tokens = True
    tokenizer = Tokenizer(
        bare, None, bos_token_id=0, eos_token_ids=[1], prefix_ids=[0, 2], suffix_ids=[1]
    )
    for name, text in tokenizer_files(tokenizer).items():
        (tmp_path / name).write_text(text)
    again = Tokenizer.load(tmp_path)
    assert again.encode(TEXT) == tokenizer.encode(TEXT)
    assert again.encode(TEXT)[:2] == [0, 2]
    assert len(again.encode("<|im_end|>", add_special_tokens=False)) > 1


@pytest.mark.parametrize("source", ["{{ bos_token }}hi", "hi", "{{ raise_exception('no') }}"])
def test_a_conversation_begins_elsewhere_as_it_does_here(byte_backend, tmp_path: Path, source: str):
    template = ChatTemplate(source, {"bos_token": "<|bos|>"}, begins_with="<|bos|>")
    tokenizer = Tokenizer(byte_backend, template, bos_token_id=0, eos_token_ids=[1])
    for name, text in tokenizer_files(tokenizer).items():
        (tmp_path / name).write_text(text)
    if "raise" not in source:
        again = Tokenizer.load(tmp_path)
        assert again.render_chat([ChatMessage("user", "x")]) == "<|bos|>hi"
