"""What the class of a tokenizer means beside tokenizer.json; transformers is the oracle."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
import transformers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from fluxion_core.errors import ModelFileError
from fluxion_core.generation.tokenizer import Tokenizer

TEXTS = ["", "ab a b", "  ab", " a", "</s>ab a", "a</s> b", "é a"]
BYTE_LEVEL_TEXTS = ["", "he a", " a", "<|im_end|> a"]


def sentence_pieces(kind: str) -> tokenizers.Tokenizer:
    """As tokenizer.json of Llama 2 has been written at three times."""
    pieces = [*"▁abcdefgh", "▁a", "▁b", "ab", "▁ab"]
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{v:02X}>" for v in range(256)), *pieces]
    merges = [("▁", "a"), ("▁", "b"), ("a", "b"), ("▁a", "b")]
    model = models.BPE(
        vocab={token: index for index, token in enumerate(vocabulary)},
        merges=merges,
        byte_fallback=True,
        unk_token="<unk>",
        fuse_unk=True,
    )
    backend = tokenizers.Tokenizer(model)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    match kind:
        case "prepending":
            backend.normalizer = normalizers.Sequence(
                [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
            )
            steps.append(decoders.Strip(" ", 1, 0))
        case "metaspace":
            backend.pre_tokenizer = pre_tokenizers.Metaspace(
                replacement="▁", prepend_scheme="first", split=False
            )
            steps.append(decoders.Strip(" ", 1, 0))
        case _:
            backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in vocabulary[:3]])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return backend


def byte_level(*, prefix: bool) -> tokenizers.Tokenizer:
    vocabulary = ["<|endoftext|>", "<|im_end|>", "he", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    model = models.BPE(vocab={t: i for i, t in enumerate(vocabulary)}, merges=[("h", "e")])
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in vocabulary[:2]])
    return backend


def write(
    directory: Path, backend: tokenizers.Tokenizer, config: object, model_type: str = "llama"
) -> Path:
    backend.save(str(directory / "tokenizer.json"))
    (directory / "config.json").write_text(json.dumps({"model_type": model_type}))
    if config is not None:
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def assert_same_as_transformers(directory: Path, texts: list[str]) -> None:
    ours = Tokenizer.load(directory)
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    for text in texts:
        expected = theirs.encode(text)
        assert ours.encode(text) == expected
        for skip in (True, False):
            decoded = theirs.decode(expected, skip_special_tokens=skip)
            assert ours.decode(expected, skip_special_tokens=skip) == decoded


@pytest.mark.parametrize("kind", ["prepending", "metaspace", "bare"])
@pytest.mark.parametrize(
    "config",
    [
        None,
        {"tokenizer_class": "LlamaTokenizer"},
        {"tokenizer_class": "LlamaTokenizerFast", "legacy": False},
        {"tokenizer_class": "LlamaTokenizer", "legacy": True},
        {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": False},
        {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": False, "legacy": True},
        {"tokenizer_class": "PreTrainedTokenizerFast", "add_prefix_space": False},
        {"tokenizer_class": "PreTrainedTokenizerFast", "legacy": False},
    ],
    ids=str,
)
def test_sentence_pieces_are_cut_as_their_class_says(tmp_path, kind, config):
    assert_same_as_transformers(write(tmp_path, sentence_pieces(kind), config), TEXTS)


@pytest.mark.parametrize(
    ("name", "prefix"),
    [
        ("LlamaTokenizer", False),
        ("LlamaTokenizerFast", True),
        ("GPT2Tokenizer", False),
        ("GPT2TokenizerFast", True),
        ("PreTrainedTokenizerFast", True),
        ("Qwen2Tokenizer", False),
    ],
)
def test_byte_level_tokenizers_are_cut_as_tokenizer_json_says(tmp_path, name, prefix):
    config = {"tokenizer_class": name, "add_prefix_space": prefix}
    model_type = "qwen2" if name == "Qwen2Tokenizer" else "llama"
    directory = write(tmp_path, byte_level(prefix=prefix), config, model_type)
    assert_same_as_transformers(directory, BYTE_LEVEL_TEXTS)


@pytest.mark.parametrize("name", ["GPT2Tokenizer", "Qwen2TokenizerFast"])
@pytest.mark.parametrize("prefix", [True, False])
def test_a_space_before_every_text_that_one_file_wants_is_a_contradiction(tmp_path, name, prefix):
    config = {"tokenizer_class": name, "add_prefix_space": not prefix}
    with pytest.raises(ModelFileError, match=f"add_prefix_space is {not prefix} for"):
        Tokenizer.load(write(tmp_path, byte_level(prefix=prefix), config))


@pytest.mark.parametrize(
    ("name", "model_type", "ends"),
    [
        ("Qwen2Tokenizer", "qwen2", {0}),
        (None, "qwen2", {0}),
        ("GPT2Tokenizer", "llama", {0}),
        ("PreTrainedTokenizerFast", "llama", set()),
    ],
)
def test_a_class_names_the_end_of_text_where_no_file_does(tmp_path, name, model_type, ends):
    config = None if name is None else {"tokenizer_class": name}
    directory = write(tmp_path, byte_level(prefix=False), config, model_type)
    assert Tokenizer.load(directory).eos_token_ids == ends
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    assert theirs.eos_token_id == next(iter(ends), None)
