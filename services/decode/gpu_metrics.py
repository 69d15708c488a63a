"""Metrics that a GPU's driver gives, through NVML, beside the engine's own."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator

import torch
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from fluxion_core.errors import FluxionError
from fluxion_core.metrics import MetricDefinition
from fluxion_core.nvml import NvmlReader, open_nvml
from fluxion_core.telemetry import event

_log = logging.getLogger(__name__)

NVML_PCIE_BYTES = MetricDefinition(
    "fluxion_nvml_pcie_bytes_total",
    "counter",
    "bytes",
    "Bytes over PCIe as the card counts them, all processes, packet headers included.",
    ("direction",),
    needs="nvml",
)
NVML_LINK = MetricDefinition(
    "fluxion_nvml_pcie_link_bytes_per_second",
    "gauge",
    "bytes/s",
    "What the card's PCIe link carries in one direction, before packet headers.",
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
GPU_DEFINITIONS = (NVML_PCIE_BYTES, NVML_LINK, NVML_UTILIZATION, NVML_ACTIVITY)


def nvml_collectors(device: torch.device) -> list[NvmlCollector]:
    """What reads this device's card: one, or none for a CPU or where NVML cannot read the card."""
    if device.type != "cuda":
        return []
    reader = open_nvml(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    return [] if reader is None else [NvmlCollector(reader)]


class NvmlCollector(Collector):
    """Reads a card at each scrape."""

    def __init__(self, reader: NvmlReader) -> None:
        self._reader = reader
        self._lock = threading.Lock()
        self._failed = False

    def collect(self) -> Iterator[Metric]:
        """The card's figures; nothing, and one line in the log, while the driver refuses."""
        with self._lock:
            try:
                readings = self._reader.read()
            except FluxionError as error:
                if not self._failed:
                    _log.warning(event("NVML metrics missing", error=str(error)))
                self._failed = True
                return
            self._failed = False
        yield NVML_PCIE_BYTES.render({(way,): n for way, n in readings.pcie_bytes.items()})
        yield NVML_LINK.render_value(readings.link_bytes_per_second)
        yield NVML_UTILIZATION.render_value(readings.utilization)
        if readings.activity:
            yield NVML_ACTIVITY.render({(unit,): n for unit, n in readings.activity.items()})
