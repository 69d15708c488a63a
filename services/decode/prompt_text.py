"""A prompt's tokens, whichever way the prompt was given, read in steps.

A prompt that cannot fit is refused as soon as that is known: before it is cut, if it is longer than
the vocabulary's longest tokens could make it, else with the piece that is one too many.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fluxion_core.errors import ContextLengthError, InvalidRequestError
from fluxion_core.generation.chat import ChatMessage
from fluxion_core.generation.text_pieces import TextPieces
from fluxion_core.generation.tokenizer import Tokenizer
from fluxion_proto.v1 import generate_pb2
from services.decode.prompt_queue import Steps

MAX_CHAT_MESSAGES = 16 << 10
"""Of a conversation: each costs memory and time, however little it says."""

MAX_PIECE_BYTES = 1 << 20
"""A text without a place to cut for so long is refused: its cutting cannot be interrupted, and
takes a hundred bytes of memory a byte."""

_LOOK_CHARACTERS = 256 << 10
"""Of a text that are counted at a time, a millisecond's worth."""

_RENDERED_A_STEP = 256
"""Pieces that a chat template writes, each a few words or one message."""

PromptMessage = generate_pb2.GenerateRequest | generate_pb2.TokenizeRequest


@dataclass(frozen=True)
class PromptRoom:
    """Length that a prompt may have."""

    context_tokens: int
    max_new_tokens: int
    """That must fit behind it."""

    def check(self, num_tokens: int, *, is_all: bool = True) -> None:
        """Raise ContextLengthError for a prompt of so many tokens, or at least so many."""
        if num_tokens + self.max_new_tokens > self.context_tokens:
            raise ContextLengthError(
                prompt_tokens=num_tokens,
                max_new_tokens=self.max_new_tokens,
                context_tokens=self.context_tokens,
                is_at_least=not is_all,
            )


def prompt_bytes(message: PromptMessage) -> int:
    """Approximate size of a prompt: what reading it costs."""
    match message.WhichOneof("prompt"):
        case "text":
            return len(message.text)
        case "token_ids" if isinstance(message, generate_pb2.GenerateRequest):
            return 4 * len(message.token_ids.ids)
        case "chat":
            messages = message.chat.messages
            # As many are refused: what they say is not looked at.
            has_too_many = len(messages) > MAX_CHAT_MESSAGES
            return 0 if has_too_many else sum(len(one.content) for one in messages)
    return 0


def prompt_token_ids(
    message: PromptMessage, tokenizer: Tokenizer, room: PromptRoom
) -> Steps[list[int]]:
    """The prompt's tokens.

    Raises:
        InvalidRequestError: none was given, or the model has no chat template.
        ContextLengthError: it does not fit.
    """
    match message.WhichOneof("prompt"):
        case "text":
            return (yield from _text_tokens(message.text, tokenizer, room))
        case "token_ids" if isinstance(message, generate_pb2.GenerateRequest):
            room.check(len(message.token_ids.ids))
            return list(message.token_ids.ids)
        case "chat":
            _check_chat(message.chat)
            messages = [ChatMessage(one.role, one.content) for one in message.chat.messages]
            text = yield from _rendered(messages, tokenizer, room)
            # The template writes the beginning-of-text token itself where the model wants one.
            return (yield from _text_tokens(text, tokenizer, room, add_special_tokens=False))
        case _:
            raise InvalidRequestError("no prompt; set text, token_ids or chat")


def _check_chat(chat: generate_pb2.Chat) -> None:
    if (count := len(chat.messages)) > MAX_CHAT_MESSAGES:
        raise InvalidRequestError(f"chat has {count} messages; at most {MAX_CHAT_MESSAGES}")


def _text_tokens(
    text: str, tokenizer: Tokenizer, room: PromptRoom, *, add_special_tokens: bool = True
) -> Steps[list[int]]:
    yield from _refuse_too_long(text, tokenizer.pieces, room)
    token_ids: list[int] = []
    for piece in tokenizer.encode_pieces(
        text, add_special_tokens=add_special_tokens, max_piece_bytes=MAX_PIECE_BYTES
    ):
        room.check(len(token_ids), is_all=False)
        token_ids += piece
        yield
    room.check(len(token_ids))
    return token_ids


def _refuse_too_long(text: str, pieces: TextPieces, room: PromptRoom) -> Steps[None]:
    """Refuse a text of which already a beginning is too long: a look at all of 16 MiB would keep
    the interpreter from everybody else for 30 ms."""
    num_bytes = 0
    for start in range(0, len(text), _LOOK_CHARACTERS):
        num_bytes += pieces.bytes_with_tokens(text[start : start + _LOOK_CHARACTERS])
        room.check(pieces.fewest_tokens(num_bytes), is_all=False)
        yield


def _rendered(
    messages: Sequence[ChatMessage], tokenizer: Tokenizer, room: PromptRoom
) -> Steps[str]:
    """What the model's template makes of a conversation, as long as that may fit."""
    pieces = tokenizer.pieces
    written: list[str] = []
    num_bytes = 0
    for text in tokenizer.render_chat_pieces(messages):
        written.append(text)
        num_bytes += pieces.bytes_with_tokens(text)
        if len(written) % _RENDERED_A_STEP == 0:
            room.check(pieces.fewest_tokens(num_bytes), is_all=False)
            yield
    return "".join(written)
