"""Texts in pieces have the tokens of the whole, and never fewer tokens than is said before."""

from __future__ import annotations

import random
import sys
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from fluxion_core.errors import InvalidRequestError
from fluxion_core.generation import text_pieces
from fluxion_core.generation.gguf_pre_tokenization import PRE_TOKENIZATIONS
from fluxion_core.generation.text_pieces import (
    SPLIT_GPT2,
    SPLIT_LLAMA3,
    SPLIT_QWEN2,
    TextPieces,
    pieces_of,
)
from fluxion_core.generation.tokenizer import Tokenizer

FRAGMENTS = [
    *(
        "word",
        "Wort",
        "don't",
        "I'LL",
        "x",
        "é",
        "e\u0301",
        "слово",
        "漢字",
        "かな",
        "각",
        "각\u11a8",
    ),
    *(" ", "  ", "   ", "\n", "\r\n", "\t", "\u00a0", "\u3000", "\u2028", "\x85", "\x1c", "\u200b"),
    *(",", ".", "!?", "、", "。", "\uff01", "'", '"', "-", "_", "((", "#", "\ufeff", "\u0301"),
    *("1", "1234567", "²", "½", "٣", "🙂", "👩\u200d🚀", "<|im_end|>", "<|im_", "def f():\n    "),
]


def texts(count: int) -> Iterator[str]:
    """Random texts of some ten words with everything between them that might be in their way."""
    draw = random.Random(7)
    for _ in range(count):
        yield "".join(
            draw.choice(FRAGMENTS) + draw.choice(["", "", " ", draw.choice(FRAGMENTS)])
            for _ in range(draw.randrange(40))
        )


def like_smollm2(smollm2: Tokenizer) -> tokenizers.Tokenizer:
    return smollm2._backend


def split_by(pattern: str, **changes: object) -> Callable[[Tokenizer], tokenizers.Tokenizer]:
    """The embedded model's merges behind another model's pattern."""

    def make(smollm2: Tokenizer) -> tokenizers.Tokenizer:
        backend = tokenizers.Tokenizer.from_str(smollm2._backend.to_str())
        split = pre_tokenizers.Split(Regex(pattern), **{"behavior": "isolated", **changes})
        last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, last])
        if pattern == SPLIT_QWEN2:
            backend.normalizer = normalizers.NFC()
        return backend

    return make


def cut_as(name: str) -> Callable[[Tokenizer], tokenizers.Tokenizer]:
    """The embedded model's merges behind the patterns that a GGUF file names so."""

    def make(smollm2: Tokenizer) -> tokenizers.Tokenizer:
        backend = tokenizers.Tokenizer.from_str(smollm2._backend.to_str())
        backend.pre_tokenizer = PRE_TOKENIZATIONS[name].pre_tokenizer()
        return backend

    return make


KINDS = {
    "tekken": cut_as("tekken"),
    "llama.cpp's default": cut_as("default"),
    "smollm2": like_smollm2,
    "gpt2": split_by(SPLIT_GPT2),
    "llama3": split_by(SPLIT_LLAMA3),
    "qwen2": split_by(SPLIT_QWEN2),
    "removed": split_by(SPLIT_LLAMA3, behavior="removed", invert=True),
}


@pytest.fixture(scope="module")
def smollm2(smollm2_path: Path) -> Tokenizer:
    return Tokenizer.load(smollm2_path)


@pytest.fixture(scope="module", params=KINDS)
def backend(smollm2, request) -> tokenizers.Tokenizer:
    return KINDS[request.param](smollm2)


def ids_of(backend: tokenizers.Tokenizer, text: str) -> list[int]:
    return backend.encode(text, add_special_tokens=False).ids


@pytest.mark.model
@pytest.mark.parametrize("size", [1, 7])
def test_pieces_have_the_tokens_of_the_whole(backend, size: int, monkeypatch):
    monkeypatch.setattr(text_pieces, "PIECE_CHARACTERS", size)
    pieces = pieces_of(backend)
    assert pieces.has_places
    num_pieces = 0
    for text in texts(400):
        cut = list(pieces.cut(text))
        num_pieces += len(cut)
        assert "".join(cut) == text
        assert [i for piece in cut for i in ids_of(backend, piece)] == ids_of(backend, text)
    assert num_pieces > 1500


@pytest.mark.model
def test_no_text_has_fewer_tokens_than_is_said_before(backend):
    pieces = pieces_of(backend)
    for text in texts(200):
        fewest = pieces.fewest_tokens(pieces.bytes_with_tokens(text))
        assert fewest <= len(ids_of(backend, text))
    if not backend.normalizer:
        # By hand: the vocabulary's longest token has 81 B; this text is of tokens of 64.
        text = "#" * 8000
        assert pieces.bytes_a_token == 81
        assert pieces.fewest_tokens(pieces.bytes_with_tokens(text)) == 99
        assert len(ids_of(backend, text)) == 125


@pytest.mark.model
def test_bytes_without_a_token_count_for_nothing(smollm2):
    # The embedded model leaves out six control characters and what no script is written with.
    text = "\x04\x06\x13" * 1000
    assert smollm2.encode(text) == []
    assert smollm2.pieces.bytes_with_tokens(text) == 0


def test_composing_makes_nothing_four_times_shorter():
    longest = dict[str, int]()
    decomposed = {}
    for code in range(sys.maxunicode + 1):
        if 0xD800 <= code < 0xE000:
            continue
        character = chr(code)
        parts = unicodedata.normalize("NFD", character)
        if len(parts) == 1:
            longest[parts] = max(longest.get(parts, 0), len(character.encode()))
        if parts != character:
            decomposed[character] = parts
    for character, parts in decomposed.items():
        before = sum(longest.get(part, len(part.encode())) for part in parts)
        after = len(unicodedata.normalize("NFC", character).encode())
        assert before < text_pieces._COMPOSED_SHRINKS * after


@pytest.mark.model
def test_a_place_within_an_added_token_is_none(smollm2, monkeypatch):
    monkeypatch.setattr(text_pieces, "PIECE_CHARACTERS", 1)
    backend = like_smollm2(smollm2)
    backend = tokenizers.Tokenizer.from_str(backend.to_str())
    backend.add_special_tokens([AddedToken("<end of turn>", normalized=False)])
    pieces = pieces_of(backend)
    assert pieces.bridges == ("<end of turn>",)
    cut = list(pieces.cut("the <end of turn> it says <end of"))
    assert cut == ["the", " <end of turn>", " it", " says", " <end", " of"]


def bytes_only(**changes: object) -> tokenizers.Tokenizer:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    for name, value in changes.items():
        setattr(backend, name, value)
    return backend


def with_added(**flags: bool) -> tokenizers.Tokenizer:
    backend = bytes_only()
    backend.add_special_tokens([AddedToken("<mask>", **flags)])
    return backend


LOWER = normalizers.Lowercase()
UNKNOWN_SPLIT = pre_tokenizers.Split(Regex(r"\w+ \w+"), "isolated")


@pytest.mark.parametrize(
    ("backend", "has_places", "bytes_a_token"),
    [
        (bytes_only(), True, 1),
        (bytes_only(normalizer=normalizers.NFC()), True, 4),
        (bytes_only(normalizer=LOWER), False, None),
        (bytes_only(pre_tokenizer=None), False, None),
        (bytes_only(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)), False, None),
        (bytes_only(pre_tokenizer=pre_tokenizers.Metaspace()), False, None),
        (bytes_only(pre_tokenizer=pre_tokenizers.ByteLevel(False, use_regex=False)), False, 1),
        (
            bytes_only(
                pre_tokenizer=pre_tokenizers.Sequence(
                    [UNKNOWN_SPLIT, pre_tokenizers.ByteLevel(False, use_regex=False)]
                )
            ),
            False,
            None,
        ),
        (with_added(), True, 6),
        (with_added(lstrip=True), False, None),
        (with_added(rstrip=True), False, None),
        (with_added(single_word=True), False, 6),
        (bytes_only(model=models.BPE({"a": 0}, [])), True, 1),
        (bytes_only(model=models.BPE({"a": 0, "?": 1}, [], unk_token="?")), True, None),
        (bytes_only(model=models.Unigram([("a", 0.0)], 0, False)), True, None),
    ],
)
def test_what_is_not_known_of_a_tokenizer_is_not_said(backend, has_places, bytes_a_token):
    pieces = pieces_of(backend)
    assert (pieces.has_places, pieces.bytes_a_token) == (has_places, bytes_a_token)


def test_a_text_that_cannot_be_cut_is_refused_where_it_is_too_long(monkeypatch):
    monkeypatch.setattr(text_pieces, "PIECE_CHARACTERS", 10)
    pieces = TextPieces(True, bridges=(), bytes_a_token=None, silent_bytes=b"")

    def cut(text: str) -> list[int]:
        return [len(piece) for piece in pieces.cut(text, max_piece_bytes=100)]

    assert cut("x" * 100) == [100]
    assert cut("word " + "x" * 90 + " x" * 20) == [95, 10, 10, 10, 10]
    for text in ("x" * 101, "漢" * 34, "word one two three " + "x" * 200):
        with pytest.raises(InvalidRequestError, match="break it with spaces"):
            cut(text)
        # Who can wait for it may have it whole.
        assert "".join(pieces.cut(text)) == text
