"""Tokenizers of Hugging Face directories, against transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers

from fluxion_core.errors import (
    InvalidRequestError,
    ModelFileError,
    ModelNotFoundError,
)
from fluxion_core.generation.chat import ChatMessage
from fluxion_core.generation.tokenizer import Tokenizer

TEXTS = [
    "",
    " ",
    "hello world",
    "  lead and trail  ",
    "def f(x: int) -> dict[str, int]:\n    return {'k': x ** 2}  # y\n\n\n\tif x != 0:\n",
    "1234567 3.14 12a 0xFF 1,000,000",
    "Ünïcode — naïve 日本語 مرحبا हिन्दी",
    "🙂👩‍👩‍👧‍👦🇫🇷 x",
    "tabs\t\tand\r\nlines\n \n   \n",
    "don't I'll WE'RE they'd",
    "<|im_start|>user\nhi<|im_end|>\n",
    "a\u0301 é \u200b\ufeff",
]


@pytest.fixture
def model_dir(byte_backend, tmp_path: Path) -> Path:
    byte_backend.save(str(tmp_path / "tokenizer.json"))
    config = {
        "bos_token": "<|bos|>",
        "eos_token": {"__type": "AddedToken", "content": "<|im_end|>", "special": True},
        "chat_template": "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 1}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))
    return tmp_path


def test_a_directorys_tokenizer_is_that_of_transformers(model_dir):
    ours = Tokenizer.load(model_dir)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(model_dir)
    for text in [*TEXTS, "x<|im_end|>1234"]:
        assert ours.encode(text) == theirs.encode(text)
        expected = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text, add_special_tokens=False) == expected
    assert ours.bos_token_id == 0
    assert ours.eos_token_ids == {1, 2}
    assert ours.render_chat([ChatMessage("user", "hi")]) == "<|bos|>hi<|im_end|>"


def test_a_template_file_comes_before_the_config(model_dir):
    (model_dir / "chat_template.jinja").write_text("{{ messages[0].role }}")
    assert Tokenizer.load(model_dir).render_chat([ChatMessage("user", "hi")]) == "user"


def test_of_named_templates_the_default_is_taken(model_dir):
    named = [{"name": "rag", "template": "no"}, {"name": "default", "template": "yes"}]
    (model_dir / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert Tokenizer.load(model_dir).render_chat([ChatMessage("user", "hi")]) == "yes"


def test_without_a_template_chat_is_an_invalid_request(model_dir):
    (model_dir / "tokenizer_config.json").unlink()
    tokenizer = Tokenizer.load(model_dir)
    assert not tokenizer.has_chat_template
    with pytest.raises(InvalidRequestError, match="send text or token_ids"):
        tokenizer.render_chat([ChatMessage("user", "hi")])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "{}"),
        ("tokenizer.json", "not json"),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", '{"chat_template": "{% for"}'),
        ("config.json", '{"eos_token_id": ["two", 3]}'),
        ("generation_config.json", '{"eos_token_id": [{}]}'),
    ],
)
def test_a_damaged_directory_is_refused(model_dir, name, content):
    (model_dir / name).write_text(content)
    with pytest.raises(ModelFileError, match=r"json|template"):
        Tokenizer.load(model_dir)


def test_a_text_beyond_the_vocabulary_is_an_invalid_request(model_dir):
    path = model_dir / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"] = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "<nothing>"}
    path.write_text(json.dumps(content | {"added_tokens": [], "post_processor": None}))
    tokenizer = Tokenizer.load(model_dir)
    assert tokenizer.encode("a") == [0]
    with pytest.raises(InvalidRequestError, match="tokenizer refuses the text"):
        tokenizer.encode("b")


def test_a_directory_without_a_tokenizer_says_so(tmp_path):
    with pytest.raises(ModelNotFoundError, match=r"holds no tokenizer\.json"):
        Tokenizer.load(tmp_path)


def test_a_vocabulary_larger_than_the_model_is_the_wrong_one(byte_tokenizer):
    byte_tokenizer.check_fits(byte_tokenizer.vocab_size)
    # Models pad their embedding; a larger one fits.
    byte_tokenizer.check_fits(byte_tokenizer.vocab_size + 64)
    with pytest.raises(ModelFileError, match="wrong tokenizer"):
        byte_tokenizer.check_fits(byte_tokenizer.vocab_size - 1)


def test_ids_with_gaps_are_counted_to_the_last(byte_backend):
    import tokenizers

    gapped = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 9}, unk_token="a"))
    tokenizer = Tokenizer(gapped, None, bos_token_id=None, eos_token_ids=[], add_bos=False)
    assert tokenizer.vocab_size == 10
