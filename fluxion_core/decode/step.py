"""A decode step: what whoever runs steps may ask of the body that computes them.

There are two bodies, `host.step.HostStep` and `device.step.DeviceStep`, and whoever runs steps need
not know which one it has. What does not change with the body: which tokens a policy lets a head
read, that a sequence's tokens do not depend on what else is in its steps, and that stored KV is
never moved or rewritten.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from fluxion_core.geometry import BLOCK_SIZES, WindowSpec
from fluxion_core.kvstore.sequence import SequenceKv
from fluxion_core.observe.device_usage import DeviceUsage
from fluxion_core.observe.trace import SpanSource
from fluxion_core.planning.planner import PlannerState
from fluxion_core.planning.policy import Policy
from fluxion_core.planning.prompt_profile import PromptProfile
from fluxion_core.pool.cpu_pool import CpuPool

if TYPE_CHECKING:
    from fluxion_core.decode.profiling import PromptProfiling


@dataclass(frozen=True)
class StepRow:
    """One sequence of a step."""

    sequence: SequenceKv
    """With room for one more token."""
    slot: int
    """Given when it joined."""
    token_id: int
    """Its newest token, whose KV is not yet stored."""
    policy: Policy
    """What to read of its region."""
    state: PlannerState | None = None
    """For policies that need head profiles; one sequence's for its whole life."""


@dataclass(frozen=True)
class HeadErrorSample:
    """Errors of one KV head's group of one row in one layer, measured by exact attention.

    Errors are squares of head output errors (planning/head_profile.py), means over the group.
    """

    squared_error: float
    """0 without a look where the group had read everything."""
    predicted: float | None
    """What its plan was made with; None where the policy predicts nothing."""
    read_bytes: int
    """K and V read for this sample."""


@dataclass(frozen=True)
class StepReads:
    """Reads of one sequence's step in its retrieval region, all layers. Bytes.

    The window is not counted: every policy reads it.
    """

    scanned_bytes: int
    """Digests, by whoever scanned them."""
    attended_bytes: int
    """K and V: the union of what the heads of each group chose."""
    region_bytes: int = 0
    """K and V of the whole region: what `exact` reads."""
    streaming_heads: int = 0
    """Heads that read nothing of the region, summed over layers; 0 where there is no region."""
    planned_heads: int = 0
    """All heads, summed over layers; 0 where there is no region."""
    groups_of_size: tuple[int, ...] = (0,) * len(BLOCK_SIZES)
    """Groups that read blocks of each of BLOCK_SIZES, summed over layers."""
    groups_nothing: int = 0
    """Groups that read nothing of the region, summed over layers."""
    groups_everything: int = 0
    """Groups that read the whole region without a choice, summed over layers."""
    device_scanned_bytes: int = 0
    """Of the digests, those that a GPU scanned in its own memory to make plans."""
    resident_bytes: int = 0
    """Of K and V, those that were read in device memory."""
    head_errors: tuple[HeadErrorSample, ...] = ()
    """Samples of what the plans lost, in few steps. Their bytes are in none of the others."""

    @property
    def total_bytes(self) -> int:
        """Digests, K and V."""
        return self.scanned_bytes + self.attended_bytes

    @property
    def streaming_share(self) -> float:
        """Share of heads that read nothing of the region; 0 where there is no region."""
        return self.streaming_heads / max(1, self.planned_heads)


@dataclass(frozen=True)
class PromptEnd:
    """Result of a prompt's last chunk, beside the KV that is now in the store."""

    logits: Tensor
    """[vocab_size] float32 on the CPU, after the last token."""
    profiling: PromptProfiling | None
    """The prompt's profile, in the making, if it was asked for."""


class DecodeStep(ABC):
    """Runs steps over sequences of one host KV store, and computes prompts between them.

    Life of a sequence: it is committed (its prompt's KV came from elsewhere, or `compute_chunk`
    computed it here), it joins, it is a row of any number of steps, it leaves. One thread only, but
    for `usage` and `span_source`, which may be read from any.
    """

    pool: CpuPool
    """Whose threads compute, and are free between calls."""

    gathers_prompts: bool = False
    """Whether a chunk of a prompt reads what is stored once for all its tokens, and may stop
    between two layers; else each of them reads it, and a chunk is one piece."""

    fills_ahead: bool = False
    """Whether `fill_ahead` does anything."""

    def fill_ahead(self, prompts: Sequence[SequenceKv], *, has_streams: bool) -> None:
        """Copy what is whole of prompts on their way to where their steps will read it, as far as
        there is room. Never waits for it.

        Args:
            prompts: all that have not joined and are being written, here or by other threads,
                which may commit and release them meanwhile. What is not among them any more is
                copied no further.
            has_streams: whether a step follows, which goes on with it.

        Raises:
            FluxionError: it cannot be done now; no sequence is affected.
            DeviceError: as for `run`.
        """
        del prompts, has_streams

    @property
    @abstractmethod
    def usage(self) -> DeviceUsage | None:
        """Counters of a GPU, up to the last step; None where there is none."""

    @property
    @abstractmethod
    def span_source(self) -> SpanSource:
        """The work of steps as spans, for traces."""

    @abstractmethod
    def join(self, sequence: SequenceKv) -> int:
        """A slot for a committed sequence, to be named in its rows until it leaves.

        Raises:
            CapacityError: none is free.
            FluxionError: the sequence was reserved before this body was made.
            DeviceError: as for `run`.
        """

    @abstractmethod
    def leave(self, slot: int) -> None:
        """Give a slot back. The sequence may end after it, not before."""

    @abstractmethod
    def check(self, row: StepRow) -> None:
        """Raise what would keep a row from taking part in a step, whatever others there are.

        To be asked before `run`, so that what is wrong with one row ends that one alone.

        Raises:
            FluxionError: the sequence has not been committed, or its reservation is used up; or
                its policy needs head profiles, and there is no planner or no state of it.
        """

    @abstractmethod
    def run(self, rows: Sequence[StepRow]) -> tuple[Tensor, list[StepReads]]:
        """Store one token of every sequence, and say what may follow it.

        A sequence whose new K or V is not finite has `damage` afterwards, and the token does not
        count; the other rows are not touched by it.

        Args:
            rows: at least one, each of another sequence that has joined.

        Returns:
            [rows, vocab_size] float32 logits on the CPU, valid until the next call; what was read
            for each row.

        Raises:
            FluxionError: see `check`; or two rows share a state.
            CapacityError: more rows than the body was made for.
            DeviceError: the device failed; from then on only `close` may be called.
        """

    @abstractmethod
    def compute_chunk(
        self,
        sequence: SequenceKv,
        token_ids: Sequence[int],
        profile_window: WindowSpec | None,
        *,
        seconds: float | None = None,
    ) -> PromptEnd | None:
        """Compute and store the next tokens of a prompt; after its last one, commit the sequence.

        For what a follow-up adds to text that is stored already: all that is before a token is
        read in place, as a step with policy `exact` reads it; `gathers_prompts` says how often.

        Args:
            sequence: whose prompt has begun (`SequenceKv.begin_prompt`); it has not joined.
            token_ids: the prompt's next tokens.
            profile_window: the default window, if a profile of the prompt is wanted; the same for
                all of its chunks. It is made, later, from some of their queries.
            seconds: that others can wait, about; None: as long as it takes. A body that gathers
                prompts then stops between two layers, with the sequence's tokens not counted yet,
                and goes on in the next call for this sequence, with the tokens that it began with.
                What it has begun is forgotten when another sequence's chunk begins.

        Returns:
            What follows from the prompt's last token; None before that.

        Raises:
            NonFiniteKvError: K or V of one of them came out as NaN or infinite; none counts.
            CapacityError: the device has no memory left for it; none counts.
            DeviceError: as for `run`.
        """

    @abstractmethod
    def advance_profile(self, profiling: PromptProfiling) -> list[PromptProfile] | None:
        """Go on with a prompt's profile for about as long as one layer of a step takes.

        Returns:
            The profile of each layer, if it is done.

        Raises:
            FluxionError: it holds values that are not finite.
        """

    @abstractmethod
    def close(self) -> None:
        """Let go of the device, and of what is pinned. Idempotent."""
