"""Prompts computed where they are decoded: a chunk at a time over the host KV store, on the CPU.

For what a follow-up turn adds to text that is stored already. The tokens of a chunk are the rows of
one step that all read the same sequence; their keys and values are appended to it like generated
tokens', so that nothing has to come over the wire. Each row reads everything before it in place,
which costs as much a token as a decode step with policy exact: long new parts are a prefill node's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fluxion_core.decode.host.attention import HybridAttention
from fluxion_core.decode.host.decoder import HostDecoder
from fluxion_core.decode.host.profiling import PromptProfiling
from fluxion_core.geometry import WindowSpec
from fluxion_core.kvstore.sequence import SequenceKv
from fluxion_core.planning.prompt_profile import PROFILED_QUERIES


@dataclass(frozen=True)
class PromptEnd:
    """What a prompt's last chunk gives, beside the KV that is now in the store."""

    logits: Tensor
    """[vocab_size] float32, after the last token."""
    profiling: PromptProfiling | None
    """The prompt's profile, in the making, if it was asked for."""


def next_chunk_tokens(num_left: int, most: int, *, wants_profile: bool) -> int:
    """How many of the tokens that are left the next chunk takes.

    Args:
        num_left: tokens of the prompt that are not stored yet, above 0.
        most: that a chunk should take.
        wants_profile: whether the last chunk must have the queries that a profile is made from:
            those of 16 tokens, or of all that is left.
    """
    in_last = PROFILED_QUERIES if wants_profile else 1
    if num_left <= max(most, in_last):
        return num_left
    return min(most, num_left - in_last)


def compute_chunk(
    decoder: HostDecoder,
    attention: HybridAttention,
    sequence: SequenceKv,
    token_ids: Sequence[int],
    *,
    profile_window: WindowSpec | None = None,
) -> PromptEnd | None:
    """Compute and store the next tokens of a prompt; commits the sequence after its last one.

    Args:
        decoder: the model.
        attention: over the store that holds the sequence.
        sequence: whose prompt has begun (`SequenceKv.begin_prompt`).
        token_ids: the prompt's next tokens.
        profile_window: the default window, if a profile of the prompt is wanted. It is made, later,
            from the queries of the last chunk, of up to 16 tokens.

    Returns:
        What follows from the prompt's last token; None before that.

    Raises:
        NonFiniteKvError: K or V of one of them came out as NaN or infinite.
    """
    first, count = sequence.num_tokens, len(token_ids)
    is_last = first + count == sequence.num_prompt_tokens
    port: HybridAttention | _QueryKeeper = attention
    if is_last and profile_window is not None:
        port = _QueryKeeper(attention)
    attention.begin_chunk(sequence, count)
    hidden = decoder(torch.tensor(token_ids), torch.arange(first, first + count), port)
    attention.end_chunk()
    if not is_last:
        return None
    sequence.commit()
    profiling = None
    if isinstance(port, _QueryKeeper) and profile_window is not None:
        profiling = PromptProfiling(sequence, profile_window, port.queries, attention.pool)
    return PromptEnd(decoder.logits(hidden[-1:])[0], profiling)


class _QueryKeeper:
    """Attention of a prompt's last chunk that keeps its last queries."""

    def __init__(self, attention: HybridAttention) -> None:
        self._attention = attention
        self.queries: list[Tensor] = []
        """Of each layer, [rows, heads, head_dim] float32."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See AttentionPort."""
        self.queries.append(query[-PROFILED_QUERIES:].to(torch.float32, copy=True))
        return self._attention.attend(layer, query, key, value)
