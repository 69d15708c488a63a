"""The parts of a tokenizer, as a model's files have them."""

from __future__ import annotations

from dataclasses import dataclass

import tokenizers

from fluxion_core.generation.chat import ChatTemplate


@dataclass(frozen=True)
class Vocabulary:
    """A vocabulary with its special tokens and chat template."""

    backend: tokenizers.Tokenizer
    """Cuts a text whole: it neither truncates nor pads. Its post-processor is not used."""
    chat_template: ChatTemplate | None
    without_template: str
    """Why there is no template, for a request that needs one."""
    bos_token_id: int | None
    eos_token_ids: frozenset[int]
    """Tokens that end a turn or a text."""
    prefix_ids: tuple[int, ...]
    """Tokens before every text."""
    suffix_ids: tuple[int, ...]
    """Tokens after every text."""
    stored_size: int
    """Ids below this are the vocabulary's own; tokens that only other files name are behind."""
