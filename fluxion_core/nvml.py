"""What the driver says of a GPU, through NVML: PCIe bytes, utilisation, activity of its units.

These figures are the card's own; the engine's are in device_usage.py. Directions are the host's:
what the card receives is host_to_device, and reads of host memory through UVA are among it. Not
here: metric names (services/decode/gpu_metrics.py).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from fluxion_core.device_usage import PcieDirection
from fluxion_core.errors import FluxionError
from fluxion_core.telemetry import event

_log = logging.getLogger(__name__)

MIN_ACTIVITY_SECONDS = 0.1
"""NVML's activity figures need two samples at least this far apart."""

_LANE_BYTES_PER_SECOND = {
    1: 2.5e9 * 8 / 10 / 8,
    2: 5e9 * 8 / 10 / 8,
    3: 8e9 * 128 / 130 / 8,
    4: 16e9 * 128 / 130 / 8,
    5: 32e9 * 128 / 130 / 8,
    6: 64e9 * 242 / 256 / 8,
}
"""What a lane of each PCIe generation carries in one direction, its line coding subtracted."""


@dataclass(frozen=True)
class NvmlReadings:
    """One look at a card."""

    pcie_bytes: Mapping[PcieDirection, int]
    """Since the driver was loaded; only grows."""
    link_bytes_per_second: float
    """What the link carries in one direction at its highest generation, before packet headers."""
    utilization: float
    """Share of the driver's last sample period in which a kernel ran."""
    activity: Mapping[str, float]
    """Since the last look, 0 to 1, of "graphics", "sm" and "dram"; empty where the card cannot
    tell (before Hopper), and at the first look."""


class NvmlReader:
    """Reads one card. Not thread-safe.

    Args:
        uuid: "GPU-…", as the driver names it.
        nvml: the pynvml module.

    Raises:
        FluxionError: NVML is not there, does not know the card, or refuses.
    """

    def __init__(self, uuid: str, nvml: ModuleType | None = None) -> None:
        if nvml is None:
            import pynvml

            nvml = pynvml
        self._nvml: Any = nvml
        try:
            nvml.nvmlInit()
            self._handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
            self._link = self._link_bytes_per_second()
            self._has_activity = bool(
                nvml.nvmlGpmQueryDeviceSupport(self._handle).isSupportedDevice
            )
        except nvml.NVMLError as error:
            raise FluxionError(f"NVML cannot read {uuid}: {error}") from None
        self._samples: list[Any] = []
        self._sampled = 0.0
        self._activity: dict[str, float] = {}

    def read(self) -> NvmlReadings:
        """Look once. Some milliseconds.

        Raises:
            FluxionError: the driver refuses.
        """
        nvml = self._nvml
        try:
            received, sent = nvml.nvmlDeviceGetFieldValues(
                self._handle,
                [nvml.NVML_FI_DEV_PCIE_COUNT_RX_BYTES, nvml.NVML_FI_DEV_PCIE_COUNT_TX_BYTES],
            )
            for field in (received, sent):
                if field.nvmlReturn != nvml.NVML_SUCCESS:
                    raise nvml.NVMLError(field.nvmlReturn)
            utilization = nvml.nvmlDeviceGetUtilizationRates(self._handle).gpu / 100
            if self._has_activity:
                self._look_at_activity()
        except nvml.NVMLError as error:
            raise FluxionError(f"NVML: {error}") from None
        return NvmlReadings(
            pcie_bytes={
                "host_to_device": int(received.value.ullVal),
                "device_to_host": int(sent.value.ullVal),
            },
            link_bytes_per_second=self._link,
            utilization=utilization,
            activity=dict(self._activity),
        )

    def _link_bytes_per_second(self) -> float:
        """The link's generation falls while the card rests; its width and highest one do not."""
        generation = self._nvml.nvmlDeviceGetMaxPcieLinkGeneration(self._handle)
        width = self._nvml.nvmlDeviceGetCurrPcieLinkWidth(self._handle)
        if generation not in _LANE_BYTES_PER_SECOND:
            raise FluxionError(f"NVML tells of PCIe generation {generation}; 1 to 6 are known")
        return float(_LANE_BYTES_PER_SECOND[generation] * width)

    def _look_at_activity(self) -> None:
        nvml, now = self._nvml, time.monotonic()
        if self._samples and now - self._sampled < MIN_ACTIVITY_SECONDS:
            return
        # Two samples take turns: the older one's memory takes the next.
        sample = nvml.nvmlGpmSampleAlloc() if len(self._samples) < 2 else self._samples.pop(0)
        nvml.nvmlGpmSampleGet(self._handle, sample)
        self._samples.append(sample)
        self._sampled = now
        if len(self._samples) < 2:
            return
        wanted = {
            "graphics": nvml.NVML_GPM_METRIC_GRAPHICS_UTIL,
            "sm": nvml.NVML_GPM_METRIC_SM_UTIL,
            "dram": nvml.NVML_GPM_METRIC_DRAM_BW_UTIL,
        }
        question = nvml.c_nvmlGpmMetricsGet_t()
        question.version = nvml.NVML_GPM_METRICS_GET_VERSION
        question.numMetrics = len(wanted)
        question.sample1, question.sample2 = self._samples
        for place, metric in enumerate(wanted.values()):
            question.metrics[place].metricId = metric
        nvml.nvmlGpmMetricsGet(question)
        self._activity = {
            name: float(question.metrics[place].value) / 100
            for place, name in enumerate(wanted)
            if question.metrics[place].nvmlReturn == nvml.NVML_SUCCESS
        }


def open_nvml(uuid: str) -> NvmlReader | None:
    """A reader of this card; None, and a warning in the log, if NVML cannot read it."""
    try:
        return NvmlReader(uuid)
    except FluxionError as error:
        _log.warning(event("no NVML metrics", error=str(error)))
        return None
