"""Tokens that tokenizer.json's post-processor puts around a text."""

from __future__ import annotations

import json
from typing import cast

import tokenizers

from fluxion_core.errors import UnsupportedModelError

Frame = tuple[tuple[int, ...], tuple[int, ...]]
"""Token ids before a text, and after it."""


def frame_of(backend: tokenizers.Tokenizer) -> Frame:
    """Tokens before and after every text.

    Raises:
        UnsupportedModelError: the post-processor does something else to a text.
    """
    if backend.post_processor is None:
        return (), ()
    # What the library writes of it into a file.
    return _frame(json.loads(backend.post_processor.__getstate__()))


def _frame(state: dict[str, object]) -> Frame:
    match state:
        case {"type": "ByteLevel"}:
            # Changes where tokens lie in the text, and no token.
            return (), ()
        case {"type": "Sequence", "processors": list(processors)}:
            frames = [frame for each in processors if any(frame := _frame(each))]
            # The library itself fails where a second one would put tokens around those of a first.
            if len(frames) <= 1:
                return frames[0] if frames else ((), ())
        case {"type": "BertProcessing" | "RobertaProcessing", "cls": [_, first], "sep": [_, last]}:
            return (cast(int, first),), (cast(int, last),)
        case {"type": "TemplateProcessing", "single": list(pieces), "special_tokens": dict(tokens)}:
            texts = [index for index, piece in enumerate(pieces) if "Sequence" in piece]
            if len(texts) == 1:
                (at,) = texts
                return _ids(pieces[:at], tokens), _ids(pieces[at + 1 :], tokens)
    raise UnsupportedModelError(
        f"post-processor {state.get('type')!r} of tokenizer.json; supported: ByteLevel, "
        f"TemplateProcessing of one text, BertProcessing, RobertaProcessing and sequences of these"
    )


def _ids(
    pieces: list[dict[str, dict[str, str]]], tokens: dict[str, dict[str, list[int]]]
) -> tuple[int, ...]:
    named = (tokens[piece["SpecialToken"]["id"]]["ids"] for piece in pieces)
    return tuple(token_id for ids in named for token_id in ids)
