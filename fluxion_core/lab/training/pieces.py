"""Token ids of documents, cut for training: pieces, some of them with quotations or look-ups.

In ordinary text, heads seldom need anything from far back. So that there are enough steps in which
they do, one piece of five quotes itself: at each sampled run, tokens are a copy of an earlier
stretch, of which the run sees the beginning and then has to go on. Another one has facts written
into it that are asked for at the runs, and a third one the same, but in place of the document's
text a passage of it over and over (lookups.py).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from fluxion_core.lab.training.collect import RUN_OFFSETS, RUN_STEPS, prompt_ends
from fluxion_core.lab.training.lookups import Encode, repeated_passage, with_lookups

PIECE_TOKENS = 4608
"""Room for prompts of up to 4,096 tokens and the steps after them."""

MINIMUM_TOKENS = 2600

KINDS = ("plain", "quoting", "plain", "asking", "repeating")

_LEAD_TOKENS = 8
"""Quoted tokens before a run's first step."""


@dataclass(frozen=True)
class Piece:
    """One text to collect samples from."""

    name: str
    token_ids: list[int]


def cut(
    documents: Sequence[tuple[str, Sequence[int]]], encode: Encode, *, seed: int = 1
) -> list[Piece]:
    """Training pieces of documents, in random order.

    Args:
        documents: name and token ids of each.
        encode: text to tokens, without a beginning-of-text token.
        seed: of quotations, look-ups and order.
    """
    generator = random.Random(seed)
    pieces: list[Piece] = []
    for name, token_ids in documents:
        for first in range(0, len(token_ids), PIECE_TOKENS):
            ids = list(token_ids[first : first + PIECE_TOKENS])
            if len(ids) < MINIMUM_TOKENS:
                continue
            kind = KINDS[len(pieces) % len(KINDS)]
            if kind == "quoting":
                ids = with_quotations(ids, generator)
            elif kind != "plain":
                text = ids if kind == "asking" else repeated_passage(ids, generator)
                ids = with_lookups(text, encode, generator)
            pieces.append(Piece(f"{name}-{first}-{kind}", ids))
    generator.shuffle(pieces)
    return pieces


def with_quotations(token_ids: Sequence[int], generator: random.Random) -> list[int]:
    """A text as long, with a copy of earlier tokens at every run that is sampled."""
    ids = list(token_ids)
    count = _LEAD_TOKENS + RUN_STEPS + 2
    for end in prompt_ends(len(ids)):
        for offset in RUN_OFFSETS:
            at = end + offset - _LEAD_TOKENS
            # From beyond the recent window, so that it takes retrieval to go on.
            source = generator.randrange(64, max(65, at - 300 - count))
            ids[at : at + count] = ids[source : source + count]
    return ids
