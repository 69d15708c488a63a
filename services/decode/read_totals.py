"""Sums of what decode steps have read of retrieval regions: for a request's usage and the engine's
counters."""

from __future__ import annotations

from dataclasses import dataclass, field

from fluxion_core.decode.step import StepReads
from fluxion_core.geometry import BLOCK_SIZES


@dataclass
class ReadTotals:
    """Sums of StepReads. Bytes, and heads and groups over all layers and steps."""

    scanned_bytes: int = 0
    """Digests."""
    attended_bytes: int = 0
    """K and V: unions of what the heads of each group chose."""
    region_bytes: int = 0
    """What `exact` reads."""
    streaming_heads: int = 0
    """Heads that read nothing of a region."""
    planned_heads: int = 0
    """All heads, where there was a region."""
    groups_of_size: list[int] = field(default_factory=lambda: [0] * len(BLOCK_SIZES))
    """Groups that chose blocks of each of BLOCK_SIZES."""
    groups_nothing: int = 0
    """Groups that read nothing: tasks skipped."""
    groups_everything: int = 0
    """Groups that read the whole region without a choice."""
    resident_bytes: int = 0
    """Of K and V, what lay in device memory."""

    def add(self, reads: StepReads) -> None:
        """Count one step of one sequence."""
        self.scanned_bytes += reads.scanned_bytes
        self.attended_bytes += reads.attended_bytes
        self.region_bytes += reads.region_bytes
        self.streaming_heads += reads.streaming_heads
        self.planned_heads += reads.planned_heads
        for level, count in enumerate(reads.groups_of_size):
            self.groups_of_size[level] += count
        self.groups_nothing += reads.groups_nothing
        self.groups_everything += reads.groups_everything
        self.resident_bytes += reads.resident_bytes

    @property
    def total_bytes(self) -> int:
        """Digests, K and V."""
        return self.scanned_bytes + self.attended_bytes

    @property
    def share_of_exact(self) -> float:
        """Bytes read / bytes that `exact` reads; 0 where there was no region."""
        return self.total_bytes / max(1, self.region_bytes)

    @property
    def streaming_share(self) -> float:
        """Share of heads that read nothing; 0 where there was no region."""
        return self.streaming_heads / max(1, self.planned_heads)
