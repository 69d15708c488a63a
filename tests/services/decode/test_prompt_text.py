"""Prompts are read in steps, no further than they may fit."""

from __future__ import annotations

from pathlib import Path

import pytest

from fluxion_core.errors import ContextLengthError, InvalidRequestError
from fluxion_core.generation import text_pieces
from fluxion_core.generation.chat import ChatTemplate
from fluxion_core.generation.tokenizer import Tokenizer
from fluxion_proto.v1 import generate_pb2
from services.decode import prompt_text
from services.decode.prompt_queue import finish
from services.decode.prompt_text import (
    MAX_CHAT_MESSAGES,
    PromptRoom,
    prompt_bytes,
    prompt_token_ids,
)

ROOM = PromptRoom(context_tokens=100, max_new_tokens=10)


@pytest.fixture
def tokenizer(toy_model_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tokenizer:
    """Of bytes, cut at spaces, a word a piece; nothing is known of how few tokens a text has."""
    monkeypatch.setattr(text_pieces, "PIECE_CHARACTERS", 1)
    tokenizer = Tokenizer.load(toy_model_path)
    tokenizer.pieces = text_pieces.TextPieces(
        True, bridges=(), bytes_a_token=None, silent_bytes=b""
    )
    return tokenizer


def of_text(text: str) -> generate_pb2.GenerateRequest:
    return generate_pb2.GenerateRequest(text=text)


def of_chat(*contents: str) -> generate_pb2.TokenizeRequest:
    messages = [{"role": "user", "content": content} for content in contents]
    return generate_pb2.TokenizeRequest(chat={"messages": messages})


def num_steps(steps) -> int:
    """Until it is refused."""
    count = 0
    try:
        for _ in steps:
            count += 1
    except ContextLengthError:
        return count
    raise AssertionError("it was not refused")


def test_a_text_is_cut_a_piece_a_step_and_no_further_than_it_fits(tokenizer):
    steps = prompt_token_ids(of_text("123456789 " * 9), tokenizer, ROOM)
    assert len(finish(steps)) == 90
    endless = prompt_token_ids(of_text("123456789 " * 1000), tokenizer, ROOM)
    # By hand: one look at the text, and 9 + 9 x 10 are too many, which shows before the next piece.
    assert num_steps(endless) == 11


def test_of_a_text_that_cannot_fit_only_the_beginning_is_looked_at(tokenizer, monkeypatch):
    # By hand: of two bytes a token at most, 182 bytes are 91 tokens: too many behind 10 new ones.
    tokenizer.pieces = text_pieces.TextPieces(True, bridges=(), bytes_a_token=2, silent_bytes=b"")
    monkeypatch.setattr(prompt_text, "_LOOK_CHARACTERS", 100)
    steps = prompt_token_ids(of_text("123456789 " * 1000), tokenizer, ROOM)
    # 100 characters are 50 tokens, 200 are 100.
    with pytest.raises(ContextLengthError, match="at least 100 tokens"):
        finish(steps)


def test_a_text_that_cannot_be_cut_in_time_is_refused(tokenizer, monkeypatch):
    monkeypatch.setattr(prompt_text, "MAX_PIECE_BYTES", 50)
    with pytest.raises(InvalidRequestError, match="more than 50 B in one piece"):
        finish(prompt_token_ids(of_text("words and " + "x" * 60), tokenizer, ROOM))


def test_a_refusal_says_whether_the_prompt_was_cut_to_its_end(tokenizer):
    with pytest.raises(ContextLengthError, match="of 101 tokens plus 10 new"):
        finish(prompt_token_ids(of_text("x" * 101), tokenizer, ROOM))
    with pytest.raises(ContextLengthError, match="of at least 101 tokens plus 10 new"):
        finish(prompt_token_ids(of_text("x" * 101 + " y"), tokenizer, ROOM))


def test_a_conversation_is_written_no_further_than_it_fits(tokenizer):
    tokenizer.pieces = text_pieces.TextPieces(True, bridges=(), bytes_a_token=9, silent_bytes=b"")
    written = 0

    def count(text: str) -> str:
        nonlocal written
        written += 1
        return text

    tokenizer.chat_template = ChatTemplate(
        "{% for m in messages %}{{ m['content'] }}{% endfor %}", {}
    )
    pieces = tokenizer.render_chat_pieces
    tokenizer.render_chat_pieces = lambda messages: map(count, pieces(messages))  # type: ignore[method-assign]
    assert num_steps(prompt_token_ids(of_chat(*["1234567"] * 5000), tokenizer, ROOM)) == 0
    assert written == 256
    assert len(finish(prompt_token_ids(of_chat("a ", "b"), tokenizer, ROOM))) == 3


def test_a_conversation_of_too_many_messages_is_not_looked_at(tokenizer):
    message = of_chat(*[""] * (MAX_CHAT_MESSAGES + 1))
    assert prompt_bytes(message) == 0
    with pytest.raises(InvalidRequestError, match=f"at most {MAX_CHAT_MESSAGES}"):
        finish(prompt_token_ids(message, tokenizer, ROOM))


def test_sizes_are_about_right():
    assert prompt_bytes(of_text("x" * 10)) == 10
    assert prompt_bytes(of_chat("xx", "yyy")) == 5
    ids = generate_pb2.GenerateRequest(token_ids={"ids": [1, 2, 3]})
    assert prompt_bytes(ids) == 12
    assert prompt_bytes(generate_pb2.GenerateRequest()) == 0
