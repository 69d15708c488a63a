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
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from fluxion_core.decode.profiling import ProfilePace, PromptProfiling
from fluxion_core.decode.step import PromptEnd
from fluxion_core.decode.work import ChunkWork, RowAttention
from fluxion_core.geometry import WindowSpec
from fluxion_core.kvstore.sequence import SequenceKv
from fluxion_core.models.attention_port import AttentionPort
from fluxion_core.models.config import ModelConfig
from fluxion_core.planning.profiled_queries import KeptQueries, ProfiledPositions
from fluxion_core.planning.prompt_profile import PromptProfile
from fluxion_core.pool.cpu_pool import CpuPool


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
        # Goes with a sequence that is given up.
        self._kept: WeakKeyDictionary[SequenceKv, KeptQueries] = WeakKeyDictionary()

    def step_took(self, seconds: float) -> None:
        """Learn how long a step took: a slice of a profile takes as long as one of its layers."""
        self._pace.step_took(seconds)

    @torch.inference_mode()
    def advance_profile(self, profiling: PromptProfiling) -> list[PromptProfile] | None:
        """Go on with a prompt's profile; see DecodeStep."""
        self._pace.advance(profiling)
        return profiling.profiles if profiling.is_done else None

    def _profiled(self, sequence: SequenceKv) -> ProfiledPositions:
        """Positions whose queries a prompt's chunks keep, from the next one on."""
        kept = self._kept.get(sequence)
        if kept is None:
            kept = KeptQueries(
                sequence.num_prompt_tokens, self._decoder.config.num_layers, sequence.num_tokens
            )
            self._kept[sequence] = kept
        return kept.positions

    def _keep(self, sequence: SequenceKv, picked: Sequence[Tensor]) -> None:
        """Keep the profiled queries of a chunk that is done, of each layer."""
        for layer, queries in enumerate(picked):
            self._kept[sequence].add(layer, queries)

    def _end(
        self, sequence: SequenceKv, hidden: Tensor, profile_window: WindowSpec | None
    ) -> PromptEnd:
        """Commit a prompt whose last token has the hidden state [1, hidden_size]."""
        sequence.commit()
        profiling = (
            PromptProfiling(sequence, profile_window, self._kept.pop(sequence), self._pool)
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
            None if profile_window is None else self._profiled(sequence),
            first,
        )
        positions = torch.arange(first, first + count)
        hidden = self._decoder(torch.tensor(token_ids), positions, attention)
        work.finish()
        self._keep(sequence, attention.queries)
        end = self._end(sequence, hidden[-1:], profile_window) if is_last else None
        self._pace.chunk_took(time.perf_counter() - started)
        return end


class _ChunkAttention:
    """Attention port of one chunk.

    Args:
        attention: of the chunk's rows.
        profiled: whose queries are picked, for a profile; None for no profile.
        first_token: of the chunk.
    """

    def __init__(
        self, attention: RowAttention, profiled: ProfiledPositions | None, first_token: int
    ) -> None:
        self._attention = attention
        self._profiled, self._first_token = profiled, first_token
        self.queries: list[Tensor] = []
        """Picked ones of each layer, [rows, heads, head_dim]; empty without a profile."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend in one layer; see AttentionPort."""
        if self._profiled is not None:
            self.queries.append(self._profiled.pick(query, self._first_token))
        return self._attention.attend(layer, query, key, value)
