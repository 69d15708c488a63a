"""Places to cut a text so that its pieces have the whole text's tokens; how few it can have.

Both are known for byte-level vocabularies that cut text as GPT-2, Llama 3 or Qwen2 do before they
merge bytes: SmolLM2, Llama 3, Qwen2 and their kin. Of any other kind a text is one piece, and
nothing is said about its tokens before it has been cut.

A piece may end between a character that is no white space and a space, or between a letter and a
mark of punctuation or a line's end: there each of those patterns ends a match, whatever comes
before and after, none looks back, and Unicode's composition does not reach across.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import cast

import tokenizers
from tokenizers import models

from fluxion_core.errors import InvalidRequestError
from fluxion_core.geometry import ceil_div

SPLIT_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SPLIT_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLIT_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

SPLIT_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLIT_NUMBER, SPLIT_NUMBERS, SPLIT_THREE_DIGITS = r"\p{N}", r"\p{N}+", "[0-9]{3}"
SPLIT_MARKS = r"[\p{P}\$\+<=>\^~\|]+"

PIECE_CHARACTERS = 16 << 10
"""A piece ends at the first place behind so many: some milliseconds, and some MiB of memory."""

_KNOWN_SPLITS = frozenset({SPLIT_GPT2, SPLIT_LLAMA3, SPLIT_QWEN2, SPLIT_TEKKEN})
_WITHIN_PLACES = frozenset({SPLIT_NUMBER, SPLIT_NUMBERS, SPLIT_THREE_DIGITS, SPLIT_MARKS})
"""No match of these lies across a place, but not every place ends one."""

_PLACE = re.compile(
    # What patterns and Python may disagree on, whether it is white space, is none of it here.
    "(?<=[^\\s\x1c-\x1f\x85\u180e\u200b-\u200f\u2028-\u202f\u205f-\u2064\ufeff]) "
    # Letters of alphabets that are written without spaces, and of those that programs are.
    "|(?<=[A-Za-z\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3])"
    "[\n,.;:!?\u3001\u3002\uff0c\uff0e\uff1a\uff1b\uff1f\uff01]"
)


def _byte_characters() -> dict[int, str]:
    """GPT-2's characters for bytes: printable Latin-1 for itself, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    table = {value: chr(value) for value in printable}
    return table | {value: chr(0x100 + index) for index, value in enumerate(others)}


BYTE_CHARACTERS = _byte_characters()

_COMPOSED_SHRINKS = 4
"""NFC makes no text this many times shorter: 3.5 times where three code points of 3, 2 and 2 bytes
become U+0390."""


@dataclass(frozen=True)
class TextPieces:
    """Places at which texts of a tokenizer may be cut, and how few tokens they can have.

    Made by `pieces_of`.
    """

    has_places: bool
    """Whether texts may be cut where `_PLACE` says."""
    bridges: tuple[str, ...]
    """Added tokens that may lie across such a place."""
    bytes_a_token: int | None
    """No token stands for more bytes of UTF-8 than this; None if that is not known."""
    silent_bytes: bytes
    """Bytes that have no token, and are left out of a text."""

    def bytes_with_tokens(self, text: str) -> int:
        """Bytes of a text's UTF-8 that its tokens stand for."""
        return len(text.encode().translate(None, self.silent_bytes))

    def fewest_tokens(self, bytes_with_tokens: int) -> int:
        """A text with so many of them has at least so many tokens."""
        return 0 if self.bytes_a_token is None else ceil_div(bytes_with_tokens, self.bytes_a_token)

    def cut(self, text: str, *, max_piece_bytes: int = sys.maxsize) -> Iterator[str]:
        """Pieces of a text, whose tokens one after another are the whole text's; at least one.

        Raises:
            InvalidRequestError: a piece would be larger than allowed.
        """
        start = 0
        while True:
            end = self._end_of_piece(text, start, min(len(text), start + max_piece_bytes + 1))
            piece = text[start:end]
            if len(piece) > max_piece_bytes // 4 and len(piece.encode()) > max_piece_bytes:
                raise InvalidRequestError(
                    f"the text has more than {max_piece_bytes} B in one piece, from character "
                    f"{start} on, that the model's tokenizer cannot take bit by bit; break it with "
                    f"spaces or lines, or send token_ids"
                )
            yield piece
            start = end
            if start >= len(text):
                return

    def _end_of_piece(self, text: str, start: int, last: int) -> int:
        """Where the piece from `start` on ends; `last` if it has no end before."""
        at = start + PIECE_CHARACTERS
        while self.has_places and (found := _PLACE.search(text, at, last)):
            at = found.start()
            if not any(self._reaches_across(token, text, at) for token in self.bridges):
                return at
            at += 1
        return last

    @staticmethod
    def _reaches_across(token: str, text: str, at: int) -> bool:
        return token in text[max(0, at - len(token) + 1) : at + len(token) - 1]


def pieces_of(backend: tokenizers.Tokenizer) -> TextPieces:
    """Read a tokenizer's `TextPieces`; takes a moment for a large vocabulary."""
    steps = _pre_tokenizers(backend)
    added = list(backend.get_added_tokens_decoder().values())
    normalizers = _members(backend.normalizer, "normalizers")
    composes = [step["type"] for step in normalizers] == ["NFC"]
    # A token that takes the spaces beside it stands for any number of them.
    is_plain = (composes or not normalizers) and not any(t.lstrip or t.rstrip for t in added)
    is_bytes = bool(steps) and steps[-1]["type"] == "ByteLevel"
    if not (is_plain and is_bytes and all(map(_keeps_text, steps))):
        return TextPieces(False, bridges=(), bytes_a_token=None, silent_bytes=b"")
    bridges = tuple(token.content for token in added if _PLACE.search(token.content, 1))
    is_bridged_anyhow = any(t.single_word for t in added) or (composes and bool(bridges))
    vocabulary = backend.get_vocab(with_added_tokens=False)
    silent = bytes(value for value, token in BYTE_CHARACTERS.items() if token not in vocabulary)
    # Of a byte-level vocabulary each character is a byte.
    longest = max([*map(len, vocabulary), *(len(token.content.encode()) for token in added)])
    return TextPieces(
        has_places=any(map(_cuts_at_places, steps)) and not is_bridged_anyhow,
        bridges=bridges,
        bytes_a_token=(
            longest * (_COMPOSED_SHRINKS if composes else 1)
            if _leaves_out(backend.model, silent, composes=composes)
            else None
        ),
        silent_bytes=silent,
    )


def _leaves_out(model: object, silent: bytes, *, composes: bool) -> bool:
    """Whether bytes without a token are just left out, and can be told before.

    They might be one unknown token with their neighbours, or appear only as a text is composed.
    """
    if not isinstance(model, models.BPE):
        return False
    return not silent or (model.unk_token is None and not composes)


def _pre_tokenizers(backend: tokenizers.Tokenizer) -> list[dict[str, object]]:
    return _members(backend.pre_tokenizer, "pretokenizers")


def _members(component: object, name: str) -> list[dict[str, object]]:
    """What a part of a tokenizer does, step by step; nothing if it is not there."""
    if component is None:
        return []
    state = json.loads(cast(bytes, component.__getstate__()))
    steps = state[name] if state["type"] == "Sequence" else [state]
    return cast(list[dict[str, object]], steps)


def _keeps_text(step: Mapping[str, object]) -> bool:
    """Whether all of a text is still there after this step, and nothing more."""
    match step["type"]:
        case "ByteLevel":
            return step["add_prefix_space"] is False
        case "Digits":
            return True
        case "Split":
            return _cuts_at_places(step) or _cuts_within_places(step)
    return False


def _cuts_at_places(step: Mapping[str, object]) -> bool:
    """Whether this step ends a match wherever `_PLACE` says."""
    match step:
        case {"type": "ByteLevel", "use_regex": True}:
            return True
        case {"type": "Split", "pattern": {"Regex": str(pattern)}}:
            # The patterns leave nothing between their matches.
            ways = (("Isolated", False), ("Removed", True))
            return pattern in _KNOWN_SPLITS and (step["behavior"], step["invert"]) in ways
    return False


def _cuts_within_places(step: Mapping[str, object]) -> bool:
    """Whether no match of this step lies across a place."""
    match step:
        case {"pattern": {"Regex": str(pattern)}, "behavior": "Isolated", "invert": False}:
            return pattern in _WITHIN_PLACES
    return False
