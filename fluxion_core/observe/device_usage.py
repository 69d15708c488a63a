"""Counters of a GPU by its engine: busy and idle seconds, bytes over PCIe, who did tasks, and what
its tier of the KV store held and spared.

Plain counters since start, of one device. Whoever runs the steps adds to them, the metrics read a
copy: no key is ever added, so that one may be taken from another thread. They exist only where
there is a GPU: without one there is no DeviceUsage, and the metrics made from it are absent rather
than zero.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from itertools import product
from typing import Literal, get_args

IdleCause = Literal["host_attention", "no_work", "host_step"]
"""Why the GPU did nothing: it waited for the CPU's share of a layer; there was no sequence to
decode; Python prepared or ended a step."""

PcieDirection = Literal["host_to_device", "device_to_host"]

PciePurpose = Literal[
    "digests",
    "selected_kv",
    "queries",
    "attention_states",
    "logits",
    "window",
    "prefill_kv",
    "weights",
    "tier_fill",
    "missing_kv",
]
"""What bytes crossed PCIe for: digests that the GPU scans and KV that it attends to in host memory;
queries, keys and values of new tokens for the CPU, attention states of either device for the other,
logits; KV for the device's default window; a prompt's KV on its way from a prefill GPU; weights of
the model; KV that is copied into the device's tier, and KV that the GPU attends to in host memory
because the tier does not hold it."""

TaskDevice = Literal["cpu", "gpu"]

DigestPlace = Literal["device", "host"]
"""Which memory digests are read in."""

PolicyKind = Literal["exact", "fixed", "threshold", "marginal"]
"""Name of a policy without its numbers."""

IDLE_CAUSES: tuple[IdleCause, ...] = get_args(IdleCause)
PCIE_DIRECTIONS: tuple[PcieDirection, ...] = get_args(PcieDirection)
PCIE_PURPOSES: tuple[PciePurpose, ...] = get_args(PciePurpose)
TASK_DEVICES: tuple[TaskDevice, ...] = get_args(TaskDevice)
DIGEST_PLACES: tuple[DigestPlace, ...] = get_args(DigestPlace)
POLICY_KINDS: tuple[PolicyKind, ...] = get_args(PolicyKind)


@dataclass
class TierUsage:
    """Tier of the KV store in device memory: what it holds now, and counters since start. Bytes.

    Hits and misses are K and V that policies chose of retrieval regions; they add up to what was
    attended to.
    """

    capacity_bytes: int = 0
    """K and V that it has room for."""
    held_bytes: int = 0
    """K and V that it holds now."""
    hit_bytes: dict[PolicyKind, int] = field(default_factory=lambda: dict.fromkeys(POLICY_KINDS, 0))
    """Read in device memory, by the sequence's policy; every kind has an entry."""
    missed_bytes: dict[PolicyKind, int] = field(
        default_factory=lambda: dict.fromkeys(POLICY_KINDS, 0)
    )
    """Read in host memory because the tier did not hold them, likewise."""
    filled_bytes: int = 0
    """Copied into it: over PCIe, as `tier_fill`, but for what has left default windows, which the
    device holds."""
    evicted_bytes: int = 0
    """Given up for others. What leaves because its slab was freed does not count."""
    digest_capacity_bytes: int = 0
    """Digests that there is room for in device memory."""
    digest_bytes: dict[DigestPlace, int] = field(
        default_factory=lambda: dict.fromkeys(DIGEST_PLACES, 0)
    )
    """Digests that running sequences select by now, by where the GPU reads them; every place has an
    entry. What sequences share counts once."""


@dataclass
class DeviceUsage:
    """Counters of one GPU since start.

    Busy and idle seconds add up to the time since the engine's start.
    """

    busy_seconds: float = 0.0
    """Kernels of ours ran, those that stalled on host memory included."""
    idle_seconds: dict[IdleCause, float] = field(
        default_factory=lambda: dict.fromkeys(IDLE_CAUSES, 0.0)
    )
    """By cause; every cause has an entry."""
    pcie_bytes: dict[tuple[PcieDirection, PciePurpose], int] = field(
        default_factory=lambda: dict.fromkeys(product(PCIE_DIRECTIONS, PCIE_PURPOSES), 0)
    )
    """By direction and purpose; every pair has an entry."""

    @property
    def accounted_seconds(self) -> float:
        """Seconds that have a cause, busy and idle."""
        return self.busy_seconds + sum(self.idle_seconds.values())

    tasks_by_device: dict[TaskDevice, int] = field(
        default_factory=lambda: dict.fromkeys(TASK_DEVICES, 0)
    )
    """Attention tasks (GQA groups of sequences, per layer) by who did them."""
    tier: TierUsage | None = None
    """Of the tier; None where there is none."""


class UsageClock:
    """Gives every second of a device a cause: what steps did not count themselves is idle time.

    Args:
        usage: of the device; None where there is none.
    """

    def __init__(self, usage: DeviceUsage | None) -> None:
        self._usage = usage
        self._until, self._accounted = 0.0, 0.0
        self.start()

    def start(self) -> None:
        """Begin to count time."""
        self._until = time.perf_counter()
        self._accounted = 0.0 if self._usage is None else self._usage.accounted_seconds

    def account(self, cause: IdleCause) -> None:
        """Give the time since the last call, but for what was counted in between, a cause."""
        usage, now = self._usage, time.perf_counter()
        if usage is not None:
            rest = now - self._until - (usage.accounted_seconds - self._accounted)
            # The device's clock and the host's may differ a little.
            usage.idle_seconds[cause] += max(0.0, rest)
            self._accounted = usage.accounted_seconds
        self._until = now
