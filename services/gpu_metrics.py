"""Metrics of a node's GPU: what its engine counts, the tier of the KV store there included, and
what the driver says, through NVML.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from prometheus_client.metrics_core import Metric

from fluxion_core.errors import FluxionError
from fluxion_core.machine.threads import start_thread
from fluxion_core.observe.device_usage import DeviceUsage, TierUsage
from fluxion_core.observe.log import event
from fluxion_core.observe.metrics import MetricDefinition
from fluxion_core.observe.nvml import NvmlReader, open_nvml
from services.metrics import WatchingCollector

_log = logging.getLogger(__name__)

AnswerT = TypeVar("AnswerT")

GPU_BUSY = MetricDefinition(
    "fluxion_gpu_busy_seconds_total",
    "counter",
    "seconds",
    "GPU with kernels of the engine, those that wait for host memory included.",
    needs="gpu",
)
GPU_IDLE = MetricDefinition(
    "fluxion_gpu_idle_seconds_total",
    "counter",
    "seconds",
    "GPU without work, by cause: host_attention, host_step or no_work.",
    ("cause",),
    needs="gpu",
)
PCIE_BYTES = MetricDefinition(
    "fluxion_pcie_bytes_total",
    "counter",
    "bytes",
    "Payload that the engine moved or read over PCIe.",
    ("direction", "purpose"),
    needs="gpu",
)
TIER_CAPACITY = MetricDefinition(
    "fluxion_tier_capacity_bytes",
    "gauge",
    "bytes",
    "K and V that the store's tier in device memory has room for.",
    needs="tier",
)
TIER_HELD = MetricDefinition(
    "fluxion_tier_held_bytes", "gauge", "bytes", "K and V that the tier holds.", needs="tier"
)
TIER_HITS = MetricDefinition(
    "fluxion_tier_hit_bytes_total",
    "counter",
    "bytes",
    "K and V of retrieval regions that steps read in device memory, by kind of policy.",
    ("policy",),
    needs="tier",
)
TIER_MISSES = MetricDefinition(
    "fluxion_tier_missed_bytes_total",
    "counter",
    "bytes",
    "K and V of retrieval regions that steps read in host memory because the tier did not hold "
    "them, by kind of policy. With the hits, what steps attended to.",
    ("policy",),
    needs="tier",
)
TIER_FILLED = MetricDefinition(
    "fluxion_tier_filled_bytes_total",
    "counter",
    "bytes",
    "K and V copied into the tier.",
    needs="tier",
)
TIER_EVICTED = MetricDefinition(
    "fluxion_tier_evicted_bytes_total",
    "counter",
    "bytes",
    "K and V given up to make room; what left because its slab was freed does not count.",
    needs="tier",
)
TIER_DIGEST_CAPACITY = MetricDefinition(
    "fluxion_tier_digest_capacity_bytes",
    "gauge",
    "bytes",
    "Digests that there is room for in device memory.",
    needs="tier",
)
TIER_DIGESTS = MetricDefinition(
    "fluxion_tier_digest_bytes",
    "gauge",
    "bytes",
    "Digests by which the GPU chooses blocks for running sequences, by the memory that it reads "
    "them in: device, or host where there is no room for them.",
    ("memory",),
    needs="tier",
)
NVML_PCIE_BYTES = MetricDefinition(
    "fluxion_nvml_pcie_bytes_total",
    "counter",
    "bytes",
    "Bytes on the PCIe link as the card measures them, all processes, packet headers included.",
    ("direction",),
    needs="nvml",
)
NVML_LINK = MetricDefinition(
    "fluxion_nvml_pcie_link_bytes_per_second",
    "gauge",
    "bytes/s",
    "What the card's PCIe link carries in one direction, packet headers included.",
    needs="nvml",
)
NVML_UTILIZATION = MetricDefinition(
    "fluxion_nvml_utilization_ratio",
    "gauge",
    "0 to 1",
    "Share of the driver's last sample period in which any kernel ran.",
    needs="nvml",
)
NVML_ACTIVITY = MetricDefinition(
    "fluxion_nvml_activity_ratio",
    "gauge",
    "0 to 1",
    "Activity since the last scrape, by unit: graphics, sm, dram. From Hopper on.",
    ("unit",),
    needs="nvml",
)
LOOK_SECONDS = 1.0
"""Between looks at the card."""

ENGINE_GPU_DEFINITIONS = (GPU_BUSY, GPU_IDLE, PCIE_BYTES)
TIER_DEFINITIONS = (
    *(TIER_CAPACITY, TIER_HELD, TIER_HITS, TIER_MISSES),
    *(TIER_FILLED, TIER_EVICTED),
    *(TIER_DIGEST_CAPACITY, TIER_DIGESTS),
)
NVML_DEFINITIONS = (NVML_PCIE_BYTES, NVML_LINK, NVML_UTILIZATION, NVML_ACTIVITY)


def device_families(device: DeviceUsage) -> Iterator[Metric]:
    """Families of what an engine has counted of its GPU."""
    yield GPU_BUSY.render_value(device.busy_seconds)
    yield GPU_IDLE.render({(cause,): seconds for cause, seconds in device.idle_seconds.items()})
    yield PCIE_BYTES.render({(way, what): n for (way, what), n in device.pcie_bytes.items()})
    if device.tier is not None:
        yield from _tier_families(device.tier)


def _tier_families(tier: TierUsage) -> Iterator[Metric]:
    yield TIER_CAPACITY.render_value(tier.capacity_bytes)
    yield TIER_HELD.render_value(tier.held_bytes)
    yield TIER_HITS.render({(kind,): count for kind, count in tier.hit_bytes.items()})
    yield TIER_MISSES.render({(kind,): count for kind, count in tier.missed_bytes.items()})
    yield TIER_FILLED.render_value(tier.filled_bytes)
    yield TIER_EVICTED.render_value(tier.evicted_bytes)
    yield TIER_DIGEST_CAPACITY.render_value(tier.digest_capacity_bytes)
    yield TIER_DIGESTS.render({(memory,): count for memory, count in tier.digest_bytes.items()})


def nvml_collectors(device: torch.device) -> list[NvmlCollector]:
    """Readers of this device's card: one, or none for a CPU or where NVML cannot read it."""
    if device.type != "cuda":
        return []
    reader = open_nvml(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    return [] if reader is None else [NvmlCollector(reader)]


class NvmlCollector(WatchingCollector):
    """Looks at a card every second, from a thread of its own, and once more at each scrape.

    Bytes over PCIe are rates times the time between looks: scrapes may be far apart, looks may not.

    Args:
        reader: of the card; used here alone from now on.
        look_seconds: between looks.
    """

    def __init__(self, reader: NvmlReader, *, look_seconds: float = LOOK_SECONDS) -> None:
        self._reader = reader
        self._lock = threading.Lock()
        self._failed = False
        self._look_seconds = look_seconds
        self._ending = threading.Event()
        self._thread = start_thread("nvml", self._watch)

    def collect(self) -> Iterator[Metric]:
        """The card's figures; nothing, and one line in the log, while the driver refuses."""
        readings = self._ask(self._reader.read)
        if readings is None:
            return
        if readings.pcie_bytes:
            yield NVML_PCIE_BYTES.render({(way,): n for way, n in readings.pcie_bytes.items()})
        yield NVML_LINK.render_value(readings.link_bytes_per_second)
        yield NVML_UTILIZATION.render_value(readings.utilization)
        if readings.activity:
            yield NVML_ACTIVITY.render({(unit,): n for unit, n in readings.activity.items()})

    def close(self) -> None:
        """Stop looking. Idempotent."""
        self._ending.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ending.wait(self._look_seconds):
            self._ask(self._reader.look)

    def _ask(self, question: Callable[[], AnswerT]) -> AnswerT | None:
        """What the driver answers; None while it refuses."""
        with self._lock:
            try:
                answer = question()
            except FluxionError as error:
                if not self._failed:
                    _log.warning(event("NVML metrics missing", error=str(error)))
                self._failed = True
                return None
            self._failed = False
            return answer
