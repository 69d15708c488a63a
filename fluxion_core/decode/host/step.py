"""A decode step without a GPU: the CPU pool computes the dense part and attends.

A sequence's tokens are the same bits whatever else is in its steps, and whatever chunks its prompt
comes in.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from fluxion_core.decode.chunk import PromptComputer
from fluxion_core.decode.host.attention import HostAttention
from fluxion_core.decode.host.decoder import HostDecoder
from fluxion_core.decode.profiling import PromptProfiling
from fluxion_core.decode.step import DecodeStep, PromptEnd, StepReads, StepRow
from fluxion_core.geometry import WindowSpec
from fluxion_core.kvstore.sequence import SequenceKv
from fluxion_core.observe.trace import SpanSource
from fluxion_core.planning.prompt_profile import PromptProfile
from fluxion_core.pool.spans import PoolSpans


class HostStep(DecodeStep):
    """Runs steps. One thread only.

    Args:
        decoder: the model.
        attention: over the store that holds the sequences.
    """

    def __init__(self, decoder: HostDecoder, attention: HostAttention) -> None:
        self._decoder = decoder
        self._attention = attention
        self.pool = attention.pool
        self._prompts = PromptComputer(decoder, attention.pool)
        self._span_source = PoolSpans(attention.pool)

    @property
    def usage(self) -> None:
        """None: there is no GPU."""

    @property
    def span_source(self) -> SpanSource:
        """Spans of steps, for traces."""
        return self._span_source

    def join(self, sequence: SequenceKv) -> int:
        """Nothing to do: windows are read from the store."""
        del sequence
        return 0

    def leave(self, slot: int) -> None:
        """Nothing to do."""

    def check(self, row: StepRow) -> None:
        """Raise on what would keep a row from taking part in a step; see DecodeStep."""
        self._attention.plans.check(row)

    @torch.inference_mode()
    def run(self, rows: Sequence[StepRow]) -> tuple[Tensor, list[StepReads]]:
        """Run one step; see DecodeStep."""
        started = time.perf_counter()
        token_ids = torch.tensor([row.token_id for row in rows])
        positions = torch.tensor([row.sequence.num_tokens for row in rows])
        self._attention.begin_step(rows)
        hidden = self._decoder(token_ids, positions, self._attention)
        reads = self._attention.end_step()
        logits = self._decoder.logits(hidden)
        self._prompts.step_took(time.perf_counter() - started)
        return logits, reads

    def compute_chunk(
        self,
        sequence: SequenceKv,
        token_ids: Sequence[int],
        profile_window: WindowSpec | None,
        *,
        seconds: float | None = None,
    ) -> PromptEnd | None:
        """Compute and store a prompt's next tokens, all at once; see DecodeStep."""
        del seconds
        return self._prompts.compute_chunk(sequence, token_ids, profile_window)

    def advance_profile(self, profiling: PromptProfiling) -> list[PromptProfile] | None:
        """Go on with a prompt's profile; see DecodeStep."""
        return self._prompts.advance_profile(profiling)

    def close(self) -> None:
        """Nothing to do: memory goes with the process."""
