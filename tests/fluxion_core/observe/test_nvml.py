"""The NVML reader on a card of our own making."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from fluxion_core.errors import FluxionError
from fluxion_core.observe import nvml as nvml_module
from fluxion_core.observe.nvml import NvmlReader

MIB = 1 << 20


class FakeNvml:
    """What the reader uses of pynvml: a Hopper card on PCIe 5 x16, whose link is never still."""

    NVML_SUCCESS = 0
    NVML_PCIE_UTIL_TX_BYTES = 0
    NVML_PCIE_UTIL_RX_BYTES = 1
    NVML_GPM_METRIC_GRAPHICS_UTIL = 1
    NVML_GPM_METRIC_SM_UTIL = 2
    NVML_GPM_METRIC_DRAM_BW_UTIL = 10
    NVML_GPM_METRIC_PCIE_TX_PER_SEC = 20
    NVML_GPM_METRIC_PCIE_RX_PER_SEC = 21
    NVML_GPM_METRICS_GET_VERSION = 1

    class NVMLError(Exception):
        pass

    def __init__(self, *, has_gpm: bool = True, generation: int = 5) -> None:
        self.has_gpm, self.generation = has_gpm, generation
        self.values = {1: 10.0, 2: 20.0, 10: 100.0, 20: 2.0, 21: 50_000.0}
        self.refuses = False
        self.has_throughput = True
        self.samples = 0

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid != "GPU-1":
            raise self.NVMLError("Not Found")
        return "card"

    def nvmlDeviceGetMaxPcieLinkGeneration(self, handle: str) -> int:
        return self.generation

    def nvmlDeviceGetCurrPcieLinkWidth(self, handle: str) -> int:
        return 16

    def nvmlGpmQueryDeviceSupport(self, handle: str) -> SimpleNamespace:
        return SimpleNamespace(isSupportedDevice=int(self.has_gpm))

    def nvmlDeviceGetPcieThroughput(self, handle: str, counter: int) -> int:
        if self.refuses or not self.has_throughput:
            raise self.NVMLError("Not Supported")
        return 4_000_000 if counter == self.NVML_PCIE_UTIL_RX_BYTES else 1000

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> SimpleNamespace:
        return SimpleNamespace(gpu=40)

    def nvmlGpmSampleAlloc(self) -> SimpleNamespace:
        return SimpleNamespace(number=0)

    def nvmlGpmSampleGet(self, handle: str, sample: SimpleNamespace) -> None:
        if self.refuses:
            raise self.NVMLError("Unknown Error")
        self.samples += 1
        sample.number = self.samples

    def c_nvmlGpmMetricsGet_t(self) -> SimpleNamespace:
        return SimpleNamespace(metrics=[SimpleNamespace() for _ in range(8)])

    def nvmlGpmMetricsGet(self, question: SimpleNamespace) -> None:
        assert question.sample1.number == question.sample2.number - 1
        for metric in question.metrics[: question.numMetrics]:
            known = metric.metricId in self.values
            metric.nvmlReturn = self.NVML_SUCCESS if known else 3
            metric.value = self.values.get(metric.metricId, 0.0)


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """The reader's clock, which stands until a test moves it."""
    now = SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(nvml_module, "time", SimpleNamespace(monotonic=lambda: now.seconds))
    return now


def test_bytes_are_mean_rates_times_the_time_between_looks(clock):
    fake = FakeNvml()
    reader = NvmlReader("GPU-1", fake)
    assert reader.read().pcie_bytes == {"host_to_device": 0, "device_to_host": 0}
    # 50,000 MiB/s for 1 s, as much as a 32-bit counter counts in 86 ms; then 1 MiB/s for 20 s.
    clock.seconds += 1
    reader.look()
    fake.values[FakeNvml.NVML_GPM_METRIC_PCIE_RX_PER_SEC] = 1.0
    clock.seconds += 20
    readings = reader.read()
    assert readings.pcie_bytes["host_to_device"] == pytest.approx(50_020 * MIB)
    assert readings.pcie_bytes["device_to_host"] == pytest.approx(2.0 * 21 * MIB)
    assert readings.utilization == 0.4
    assert reader.pcie_source == "gpm"


def test_a_link_of_generation_5_and_16_lanes_carries_63_gigabytes_per_second(clock):
    # By hand: 32 GT/s a lane, 128 of 130 bits are data, 16 lanes.
    readings = NvmlReader("GPU-1", FakeNvml()).read()
    assert readings.link_bytes_per_second == pytest.approx(63.015e9, rel=1e-4)


def test_activity_is_the_mean_since_the_last_reading(clock):
    fake = FakeNvml()
    reader = NvmlReader("GPU-1", fake)
    assert reader.read().activity == {}
    clock.seconds += 3
    reader.look()
    fake.values[FakeNvml.NVML_GPM_METRIC_SM_UTIL] = 60.0
    clock.seconds += 1
    # By hand: 20 % for 3 s and 60 % for 1 s.
    assert reader.read().activity == pytest.approx({"graphics": 0.1, "sm": 0.3, "dram": 1.0})
    clock.seconds += 1
    assert reader.read().activity["sm"] == pytest.approx(0.6)


def test_looks_too_close_together_take_no_sample(clock):
    fake = FakeNvml()
    reader = NvmlReader("GPU-1", fake)
    clock.seconds += 1
    before = reader.read()
    clock.seconds += nvml_module.MIN_LOOK_SECONDS / 2
    assert reader.read() == before
    assert fake.samples == 2


def test_a_look_that_the_driver_refuses_is_made_up_for_by_the_next(clock):
    fake = FakeNvml()
    reader = NvmlReader("GPU-1", fake)
    clock.seconds += 1
    fake.refuses = True
    with pytest.raises(FluxionError, match="NVML"):
        reader.look()
    fake.refuses = False
    clock.seconds += 1
    assert reader.read().pcie_bytes["device_to_host"] == pytest.approx(2.0 * 2 * MIB)


def test_a_card_before_hopper_has_estimated_bytes_and_no_activity(clock):
    reader = NvmlReader("GPU-1", FakeNvml(has_gpm=False))
    clock.seconds += 2
    readings = reader.read()
    assert reader.pcie_source == "throughput"
    # By hand: 4,000,000 and 1,000 KB/s for 2 s.
    assert readings.pcie_bytes == {"host_to_device": 8e9, "device_to_host": 2e6}
    assert readings.activity == {}


def test_a_monitor_without_pcie_rates_leaves_them_to_the_driver(clock):
    fake = FakeNvml()
    del fake.values[FakeNvml.NVML_GPM_METRIC_PCIE_RX_PER_SEC]
    reader = NvmlReader("GPU-1", fake)
    clock.seconds += 1
    readings = reader.read()
    assert reader.pcie_source == "throughput"
    assert readings.pcie_bytes == {"host_to_device": 4e9, "device_to_host": 1e6}
    assert readings.activity == pytest.approx({"graphics": 0.1, "sm": 0.2, "dram": 1.0})


def test_a_card_that_cannot_tell_of_pcie_has_no_bytes(clock):
    fake = FakeNvml(has_gpm=False)
    fake.has_throughput = False
    reader = NvmlReader("GPU-1", fake)
    clock.seconds += 1
    readings = reader.read()
    assert (reader.pcie_source, readings.pcie_bytes) == ("none", {})


def test_an_unknown_card_and_an_unknown_link_are_errors(clock):
    with pytest.raises(FluxionError, match="GPU-2"):
        NvmlReader("GPU-2", FakeNvml())
    with pytest.raises(FluxionError, match="generation 9"):
        NvmlReader("GPU-1", FakeNvml(generation=9))
