"""A decode step without a GPU: the CPU pool computes the dense part and attends.

The same calls as `decode.device.step.DeviceStep`, so that whoever runs steps need not care; and,
here only, chunks of prompts. A sequence's tokens are the same bits whatever else is in its steps,
and whatever chunks its prompt comes in.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from fluxion_core.decode.host.attention import HybridAttention
from fluxion_core.decode.host.chunk import PromptEnd, compute_chunk
from fluxion_core.decode.host.decoder import HostDecoder
from fluxion_core.decode.host.profiling import ProfilePace, PromptProfiling
from fluxion_core.decode.work import StepReads, StepRow, check_row
from fluxion_core.geometry import WindowSpec
from fluxion_core.kvstore.sequence import SequenceKv
from fluxion_core.planning.prompt_profile import PromptProfile
from fluxion_core.pool.spans import PoolSpans


class HostStep:
    """Runs steps. One thread only.

    Args:
        decoder: the model.
        attention: over the store that holds the sequences.
    """

    usage = None
    """Of a GPU: there is none."""

    def __init__(self, decoder: HostDecoder, attention: HybridAttention) -> None:
        self._decoder = decoder
        self._attention = attention
        self.pool = attention.pool
        """Whose threads compute, and are free between steps."""
        self._pace = ProfilePace(decoder.config.num_layers)
        self.span_source = PoolSpans(attention.pool)
        """For traces of steps."""

    def join(self, sequence: SequenceKv) -> int:
        """Nothing to do: windows are read from the store."""
        del sequence
        return 0

    def leave(self, slot: int) -> None:
        """Nothing to do."""

    def check(self, row: StepRow) -> None:
        """See `decode.work.check_row`."""
        check_row(row, self._attention.planner)

    @torch.inference_mode()
    def run(self, rows: Sequence[StepRow]) -> tuple[Tensor, list[StepReads]]:
        """One token of every sequence.

        Returns:
            [rows, vocab_size] float32 logits; what was read for each row.

        Raises:
            FluxionError: see HybridAttention.begin_step.
        """
        started = time.perf_counter()
        token_ids = torch.tensor([row.token_id for row in rows])
        positions = torch.tensor([row.sequence.num_tokens for row in rows])
        self._attention.begin_step(
            [row.sequence for row in rows],
            [row.policy for row in rows],
            [row.state for row in rows],
        )
        hidden = self._decoder(token_ids, positions, self._attention)
        reads = self._attention.end_step()
        logits = self._decoder.logits(hidden)
        self._pace.step_took(time.perf_counter() - started)
        return logits, reads

    @torch.inference_mode()
    def compute_chunk(
        self, sequence: SequenceKv, token_ids: Sequence[int], profile_window: WindowSpec | None
    ) -> PromptEnd | None:
        """The next tokens of a prompt; see `chunk.compute_chunk`."""
        started = time.perf_counter()
        end = compute_chunk(
            self._decoder, self._attention, sequence, token_ids, profile_window=profile_window
        )
        self._pace.chunk_took(time.perf_counter() - started)
        return end

    @torch.inference_mode()
    def advance_profile(self, profiling: PromptProfiling) -> list[PromptProfile] | None:
        """Go on with a prompt's profile for about as long as one layer of a step takes.

        Returns:
            The profile of each layer, if it is done.

        Raises:
            FluxionError: it holds values that are not finite.
        """
        self._pace.advance(profiling)
        return profiling.profiles if profiling.is_done else None

    def close(self) -> None:
        """Nothing to do: memory goes with the process."""
