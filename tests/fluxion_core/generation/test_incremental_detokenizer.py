"""Pieces of text: together they are the whole, and none splits a character."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from fluxion_core.generation.tokenizer import IncrementalDetokenizer, Tokenizer


def all_pieces(tokenizer: Tokenizer, token_ids: list[int], *, skip: bool) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=skip)
    return [*(detokenizer.push(token_id) for token_id in token_ids), detokenizer.flush()]


@settings(derandomize=True, max_examples=500)
@given(token_ids=st.lists(st.integers(0, 300)), skip=st.booleans())
def test_pieces_of_any_bytes_make_the_whole(byte_tokenizer, token_ids, skip):
    # Almost all of these are no valid UTF-8; ids beyond the vocabulary stand for nothing.
    pieces = all_pieces(byte_tokenizer, token_ids, skip=skip)
    assert "".join(pieces) == byte_tokenizer.decode(token_ids, skip_special_tokens=skip)


@settings(derandomize=True, max_examples=300)
@given(
    text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd")),
    name=st.sampled_from(["byte", "fallback"]),
    data=st.data(),
)
def test_pieces_of_a_text_are_whole_characters(
    byte_tokenizer, fallback_tokenizer, text, name, data
):
    tokenizer = byte_tokenizer if name == "byte" else fallback_tokenizer
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    # A special token anywhere, left out of the text, changes nothing.
    token_ids.insert(data.draw(st.integers(0, len(token_ids))), 0)
    pieces = all_pieces(tokenizer, token_ids, skip=True)
    assert "".join(pieces) == tokenizer.decode(token_ids)
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_a_character_comes_out_with_its_last_byte(byte_tokenizer):
    token_ids = byte_tokenizer.encode("a€b", add_special_tokens=False)
    assert all_pieces(byte_tokenizer, token_ids, skip=True) == ["a", "", "", "€", "b", ""]


def test_an_unfinished_character_becomes_a_replacement_at_the_end(byte_tokenizer):
    token_ids = byte_tokenizer.encode("a€", add_special_tokens=False)[:-1]
    detokenizer = IncrementalDetokenizer(byte_tokenizer)
    assert [detokenizer.push(token_id) for token_id in token_ids] == ["a", "", ""]
    assert detokenizer.flush() == "\N{REPLACEMENT CHARACTER}"
    assert detokenizer.flush() == ""


def test_spaces_between_sentencepiece_words_survive(fallback_tokenizer):
    token_ids = fallback_tokenizer.encode("a b é a", add_special_tokens=False)
    pieces = all_pieces(fallback_tokenizer, token_ids, skip=True)
    assert pieces == ["a", " b", " ", "", "é", " a", ""]


def test_special_tokens_are_in_the_text_unless_told_otherwise(byte_tokenizer):
    # A stop string that is one is found then.
    token_ids = byte_tokenizer.encode("a<|im_end|>b", add_special_tokens=False)
    detokenizer = IncrementalDetokenizer(byte_tokenizer)
    assert [detokenizer.push(token_id) for token_id in token_ids] == ["a", "<|im_end|>", "b"]
