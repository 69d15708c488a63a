"""Readings of a GPU from its driver, through NVML: PCIe bytes, utilisation, activity of its units.

These figures are the card's own; the engine's are in device_usage.py. Directions are the host's:
what the card receives is host_to_device, and reads of host memory through UVA are among it. Bytes
are those on the link, packet headers included, of all processes. Not here: metric names, and who
looks how often (services/gpu_metrics.py).

PCIe bytes are rates times the time they are of. From Hopper on the GPU's performance monitor (GPM)
gives the mean rate between two looks, so that nothing is missed; elsewhere the driver measures for
20 ms a look and direction, and the sum is an estimate. NVML's byte counters (fields 197 and 198)
are not used: they may wrap, and do so every 4 GiB on an H100, 86 ms at full rate.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

from fluxion_core.config.extras import MissingExtraError
from fluxion_core.errors import FluxionError
from fluxion_core.observe.device_usage import PCIE_DIRECTIONS, PcieDirection
from fluxion_core.observe.log import event

_log = logging.getLogger(__name__)

MIN_LOOK_SECONDS = 0.1
"""GPM's samples must be at least this far apart; a look sooner than that sees nothing new."""

_GPM_RATE_BYTES = 1 << 20
"""GPM's rates are in MiB/s."""

_THROUGHPUT_BYTES = 1000
"""nvmlDeviceGetPcieThroughput's are in KB/s."""

PcieSource = Literal["gpm", "throughput", "none"]
"""Where PCIe bytes come from: a mean over all the time, an estimate from parts of it, nowhere."""

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
    """Since the reader was made, up to the last look; only grows. Empty where the card cannot
    tell."""
    link_bytes_per_second: float
    """What the link carries in one direction at its highest generation, packet headers included."""
    utilization: float
    """Share of the driver's last sample period in which a kernel ran."""
    activity: Mapping[str, float]
    """Mean since the last reading, 0 to 1, of "graphics", "sm" and "dram"; empty where the card
    cannot tell (before Hopper), and at the first reading."""


class NvmlReader:
    """Looks at one card and adds up what it sees. Not thread-safe.

    Args:
        uuid: "GPU-…", as the driver names it.
        nvml: the pynvml module.

    Raises:
        FluxionError: NVML is not there, does not know the card, or refuses; a MissingExtraError
            if its Python package is not installed.
    """

    def __init__(self, uuid: str, nvml: ModuleType | None = None) -> None:
        if nvml is None:
            nvml = _pynvml()
        self._nvml: Any = nvml
        self._pcie_bytes: dict[PcieDirection, float] = {}
        self._active_seconds: dict[str, float] = {}
        self._seconds = 0.0
        self._activity: dict[str, float] = {}
        try:
            nvml.nvmlInit()
            self._handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
            self._link = self._link_bytes_per_second()
            has_gpm = bool(nvml.nvmlGpmQueryDeviceSupport(self._handle).isSupportedDevice)
            self._gpm = _GpmPair(nvml, self._handle) if has_gpm else None
            self.pcie_source: PcieSource = "gpm" if has_gpm else self._throughput_if_there()
            """Where PCIe bytes come from."""
        except nvml.NVMLError as error:
            raise FluxionError(f"NVML cannot read {uuid}: {error}") from None
        if self.pcie_source != "none":
            self._pcie_bytes = dict.fromkeys(PCIE_DIRECTIONS, 0.0)
        self._looked = time.monotonic()

    def look(self) -> None:
        """Add what happened since the last look. A few milliseconds; 40 where there is no GPM.

        Raises:
            FluxionError: the driver refuses.
        """
        seconds = time.monotonic() - self._looked
        if seconds < MIN_LOOK_SECONDS:
            return
        try:
            if self._gpm is not None:
                seconds = self._look_at_gpm(self._gpm)
            if self.pcie_source == "throughput":
                for direction, rate in self._throughput().items():
                    self._pcie_bytes[direction] += rate * seconds
        except self._nvml.NVMLError as error:
            raise FluxionError(f"NVML: {error}") from None
        self._looked += seconds

    def read(self) -> NvmlReadings:
        """Look, and tell all that was seen.

        Raises:
            FluxionError: the driver refuses.
        """
        self.look()
        try:
            utilization = self._nvml.nvmlDeviceGetUtilizationRates(self._handle).gpu / 100
        except self._nvml.NVMLError as error:
            raise FluxionError(f"NVML: {error}") from None
        if self._seconds > 0:
            self._activity = {
                unit: active / self._seconds for unit, active in self._active_seconds.items()
            }
            self._active_seconds, self._seconds = {}, 0.0
        return NvmlReadings(
            pcie_bytes={way: round(count) for way, count in self._pcie_bytes.items()},
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

    def _look_at_gpm(self, gpm: _GpmPair) -> float:
        """Add what lies between the last sample and a new one; returns how long that is, s."""
        nvml = self._nvml
        seconds = gpm.sample()
        received, sent, graphics, sm, dram = gpm.values(
            nvml.NVML_GPM_METRIC_PCIE_RX_PER_SEC,
            nvml.NVML_GPM_METRIC_PCIE_TX_PER_SEC,
            nvml.NVML_GPM_METRIC_GRAPHICS_UTIL,
            nvml.NVML_GPM_METRIC_SM_UTIL,
            nvml.NVML_GPM_METRIC_DRAM_BW_UTIL,
        )
        for unit, percent in (("graphics", graphics), ("sm", sm), ("dram", dram)):
            if percent is not None:
                so_far = self._active_seconds.get(unit, 0.0)
                self._active_seconds[unit] = so_far + percent / 100 * seconds
        self._seconds += seconds
        if self.pcie_source != "gpm":
            return seconds
        if received is None or sent is None:
            _log.warning(event("GPM has no PCIe rates on this card"))
            self.pcie_source = self._throughput_if_there()
            if self.pcie_source == "none":
                self._pcie_bytes = {}
        else:
            self._pcie_bytes["host_to_device"] += received * _GPM_RATE_BYTES * seconds
            self._pcie_bytes["device_to_host"] += sent * _GPM_RATE_BYTES * seconds
        return seconds

    def _throughput_if_there(self) -> PcieSource:
        try:
            self._throughput()
        except self._nvml.NVMLError:
            return "none"
        return "throughput"

    def _throughput(self) -> dict[PcieDirection, float]:
        """Bytes/s of the next 20 ms, one direction after the other."""
        nvml, unit = self._nvml, _THROUGHPUT_BYTES
        received = nvml.nvmlDeviceGetPcieThroughput(self._handle, nvml.NVML_PCIE_UTIL_RX_BYTES)
        sent = nvml.nvmlDeviceGetPcieThroughput(self._handle, nvml.NVML_PCIE_UTIL_TX_BYTES)
        return {"host_to_device": received * unit, "device_to_host": sent * unit}


class _GpmPair:
    """Two samples of the GPU's performance monitor; the older one's memory takes the next."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle
        self._older, self._newer = nvml.nvmlGpmSampleAlloc(), nvml.nvmlGpmSampleAlloc()
        self._sampled = 0.0
        self.sample()

    def sample(self) -> float:
        """Take a sample; returns the seconds since the one before."""
        begun = time.monotonic()
        self._nvml.nvmlGpmSampleGet(self._handle, self._older)
        # The driver does not say when in the call it looked.
        now = (begun + time.monotonic()) / 2
        self._older, self._newer = self._newer, self._older
        seconds, self._sampled = now - self._sampled, now
        return seconds

    def values(self, *metrics: int) -> list[float | None]:
        """Metrics between the two samples; None for one that the card does not have."""
        nvml = self._nvml
        question = nvml.c_nvmlGpmMetricsGet_t()
        question.version = nvml.NVML_GPM_METRICS_GET_VERSION
        question.numMetrics = len(metrics)
        question.sample1, question.sample2 = self._older, self._newer
        for place, metric in enumerate(metrics):
            question.metrics[place].metricId = metric
        nvml.nvmlGpmMetricsGet(question)
        return [
            float(answer.value) if answer.nvmlReturn == nvml.NVML_SUCCESS else None
            for answer in question.metrics[: len(metrics)]
        ]


def _pynvml() -> ModuleType:
    try:
        import pynvml
    except ImportError:
        raise MissingExtraError("what the card says of itself", "nvidia-ml-py", "cuda") from None
    found: ModuleType = pynvml
    return found


def open_nvml(uuid: str) -> NvmlReader | None:
    """A reader of this card; None, and a warning in the log, if NVML cannot read it."""
    try:
        return NvmlReader(uuid)
    except FluxionError as error:
        _log.warning(event("no NVML metrics", error=str(error)))
        return None
