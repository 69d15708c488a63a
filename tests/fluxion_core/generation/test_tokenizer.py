"""The embedded model's tokenizer against transformers' own, and text in pieces."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from fluxion_core.errors import InvalidRequestError, ModelFileError, ModelNotFoundError
from fluxion_core.generation.chat import ChatMessage, ChatTemplate
from fluxion_core.generation.tokenizer import IncrementalDetokenizer, Tokenizer

TEXTS = [
    "Hello world",
    "  def f(x):\n\t\treturn x**2  \n\n\n",
    "日本語 emoji 👩‍👩‍👧 ñandú",
    "1234567 and 3.14159, 2026-01-31",
    "<|im_start|>user\nhi<|im_end|>",
    "a\u0301  b   c\r\n\r\n",
    "it's we'll DON'T",
    "",
]


@pytest.fixture(scope="module")
def tokenizer(smollm2_path: Path) -> Tokenizer:
    return Tokenizer.load(smollm2_path)


@pytest.fixture(scope="module")
def oracle(smollm2_path: Path):
    return AutoTokenizer.from_pretrained(smollm2_path.parent, gguf_file=smollm2_path.name)


@pytest.mark.model
@pytest.mark.parametrize("text", TEXTS)
def test_tokens_are_those_of_transformers(tokenizer: Tokenizer, oracle, text: str):
    token_ids = tokenizer.encode(text)
    assert token_ids == oracle(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(token_ids, skip_special_tokens=False) == text


@pytest.mark.model
@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=60))
def test_any_text_survives_in_pieces_that_never_split_a_character(tokenizer: Tokenizer, text: str):
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=False)
    token_ids = tokenizer.encode(text)
    whole = tokenizer.decode(token_ids, skip_special_tokens=False)
    pieces = [detokenizer.push(token) for token in token_ids]
    assert "".join(pieces) + detokenizer.flush() == whole
    # The vocabulary lacks a few bytes that no assigned character needs; those texts lose them.
    if whole == text and "\N{REPLACEMENT CHARACTER}" not in text:
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


@pytest.mark.model
@settings(max_examples=100, deadline=None)
@given(token_ids=st.lists(st.integers(0, 49151), max_size=30))
def test_any_tokens_come_out_as_their_text(tokenizer: Tokenizer, token_ids: list[int]):
    detokenizer = IncrementalDetokenizer(tokenizer)
    text = "".join(detokenizer.push(token) for token in token_ids) + detokenizer.flush()
    assert text == tokenizer.decode(token_ids)


@pytest.mark.model
def test_the_chat_template_gives_what_transformers_gives(tokenizer: Tokenizer, oracle):
    turns = [("user", "hi"), ("assistant", "hello"), ("user", "why?")]
    ours = tokenizer.render_chat([ChatMessage(*turn) for turn in turns])
    theirs = oracle.apply_chat_template(
        [{"role": role, "content": content} for role, content in turns],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert ours == theirs


@pytest.mark.model
def test_a_directory_with_the_same_vocabulary_agrees(tokenizer: Tokenizer, tmp_path: Path):
    tokenizer._backend.save(str(tmp_path / "tokenizer.json"))
    config = {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 2}))
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}{{ eos_token }}")
    other = Tokenizer.load(tmp_path)
    for text in TEXTS:
        assert other.encode(text) == tokenizer.encode(text)
    assert other.fingerprint == tokenizer.fingerprint
    assert other.eos_token_ids == {2}
    assert other.render_chat([ChatMessage("user", "x")]) == "x<|im_end|>"


@pytest.mark.model
def test_a_tokenizer_of_another_model_is_refused(tokenizer: Tokenizer):
    tokenizer.check_fits(49152)
    with pytest.raises(ModelFileError, match="wrong tokenizer"):
        tokenizer.check_fits(32000)


def test_tokenizer_files_that_are_not_there_or_damaged_are_refused(tmp_path: Path):
    with pytest.raises(ModelNotFoundError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelFileError):
        Tokenizer.load(tmp_path)


def test_templates_cannot_reach_beyond_their_messages():
    with pytest.raises(ModelFileError, match="compile"):
        ChatTemplate("{% if %}", {})
    escape = ChatTemplate("{{ messages.__class__.__mro__ }}", {})
    with pytest.raises(InvalidRequestError):
        escape.render([ChatMessage("user", "x")])
    refusing = ChatTemplate("{{ raise_exception('roles must alternate') }}", {})
    with pytest.raises(InvalidRequestError, match="roles must alternate"):
        refusing.render([ChatMessage("user", "x")])
    with pytest.raises(InvalidRequestError, match="no messages"):
        refusing.render([])
