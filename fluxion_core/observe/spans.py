"""Spans: what was done from when to when, on which track. The common form of all step traces."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Span:
    """One piece of work on one track.

    Tracks are named by what works there: "engine" for the step loop; "cpu 0", "cpu 1", … for
    attention workers; "gpu" for the GPU's dense part and "gpu tasks 0", … for tasks of its lane
    that run side by side; "pcie host_to_device" and "pcie device_to_host"; "handoff HOST:PORT
    REQUEST" for a hand-off's call, with " kv" for what comes beside it. Spans of one track do not
    overlap, except where one holds the other whole.
    """

    track: str
    name: str
    start_ns: int
    """On the system's monotonic clock (time.monotonic_ns), like end_ns."""
    end_ns: int
    """start_ns for something that happened at a moment."""
    args: Mapping[str, int | float | str] = field(default_factory=dict)
    """What a viewer shows beside it: bytes, sequence, layer."""
