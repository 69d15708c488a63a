"""Prompts computed where they are decoded: a chunk at a time over the host KV store.

For what a follow-up turn adds to text that is stored already. The tokens of a chunk are the rows of
one step that all read the same sequence; their keys and values are appended to it like generated
tokens', so that nothing has to come over the wire. Here each row reads everything before it in
place, by the CPUs, which costs as much a token as a decode step with policy exact: long new parts
are a prefill node's. A body on a GPU reads it once for all rows: device/prompts.py.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from fluxion_core.decode.profiling import ProfilePace, PromptProfiling
from fluxion_core.decode.step import PromptEnd
from fluxion_core.decode.work import ChunkWork, RowAttention
from fluxion_core.geometry import WindowSpec
from fluxion_core.kvstore.sequence import SequenceKv
from fluxion_core.models.attention_port import AttentionPort
from fluxion_core.models.config import ModelConfig
from fluxion_core.planning.prompt_profile import PROFILED_QUERIES, PromptProfile
from fluxion_core.pool.cpu_pool import CpuPool


def next_chunk_tokens(num_left: int, most: int, *, wants_profile: bool) -> int:
    """Tokens that the next chunk takes, of those that are left.

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


class ChunkDecoder(Protocol):
    """A model, on the CPU or on a device: models.decoder or decode.host.decoder."""

    @property
    def config(self) -> ModelConfig:
        """Config of the model."""

    def __call__(self, token_ids: Tensor, positions: Tensor, attention: AttentionPort) -> Tensor:
        """See Decoder.forward."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states; as of `Decoder.logits`."""
        ...


class PromptEnds:
    """Ends of prompts that were computed in chunks, and their profiles. The body's thread only.

    Args:
        decoder: the model.
        pool: threads that make profiles.
    """

    def __init__(self, decoder: ChunkDecoder, pool: CpuPool) -> None:
        self._decoder, self._pool = decoder, pool
        self._pace = ProfilePace(decoder.config.num_layers)

    def step_took(self, seconds: float) -> None:
        """Learn how long a step took: a slice of a profile takes as long as one of its layers."""
        self._pace.step_took(seconds)

    @torch.inference_mode()
    def advance_profile(self, profiling: PromptProfiling) -> list[PromptProfile] | None:
        """Go on with a prompt's profile; see DecodeStep."""
        self._pace.advance(profiling)
        return profiling.profiles if profiling.is_done else None

    def _end(
        self,
        sequence: SequenceKv,
        hidden: Tensor,
        queries: list[Tensor],
        profile_window: WindowSpec | None,
    ) -> PromptEnd:
        """Commit a prompt whose last token has the hidden state [1, hidden_size]."""
        sequence.commit()
        profiling = (
            PromptProfiling(sequence, profile_window, queries, self._pool)
            if profile_window is not None
            else None
        )
        logits = self._decoder.logits(hidden)[0]
        return PromptEnd(logits.to("cpu", torch.float32), profiling)


class PromptComputer(PromptEnds):
    """Computes prompts by the CPUs, and takes turns with a body's steps. The body's thread only.

    Args:
        decoder: the model.
        pool: threads that attend, and make profiles.
    """

    @torch.inference_mode()
    def compute_chunk(
        self, sequence: SequenceKv, token_ids: Sequence[int], profile_window: WindowSpec | None
    ) -> PromptEnd | None:
        """Compute and store a prompt's next tokens; see DecodeStep."""
        started = time.perf_counter()
        first, count = sequence.num_tokens, len(token_ids)
        is_last = first + count == sequence.num_prompt_tokens
        config = self._decoder.config
        work = ChunkWork(sequence, count, config.num_heads)
        attention = _ChunkAttention(
            RowAttention(work, self._pool, count, config.num_heads, config.head_dim),
            keeps_queries=is_last and profile_window is not None,
        )
        positions = torch.arange(first, first + count)
        hidden = self._decoder(torch.tensor(token_ids), positions, attention)
        work.finish()
        end = None
        if is_last:
            end = self._end(sequence, hidden[-1:], attention.queries, profile_window)
        self._pace.chunk_took(time.perf_counter() - started)
        return end


class _ChunkAttention:
    """Attention port of one chunk.

    Args:
        attention: of the chunk's rows.
        keeps_queries: whether its last queries are kept, for a profile.
    """

    def __init__(self, attention: RowAttention, *, keeps_queries: bool) -> None:
        self._attention = attention
        self._keeps_queries = keeps_queries
        self.queries: list[Tensor] = []
        """Of each layer, [rows, heads, head_dim] float32 on the CPU, if they are kept."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend in one layer; see AttentionPort."""
        if self._keeps_queries:
            last = query[-PROFILED_QUERIES:]
            self.queries.append(last.to("cpu", torch.float32, copy=True))
        return self._attention.attend(layer, query, key, value)
