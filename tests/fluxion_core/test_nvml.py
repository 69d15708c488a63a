"""The NVML reader on a card of our own making."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from fluxion_core import nvml as nvml_module
from fluxion_core.errors import FluxionError
from fluxion_core.nvml import NvmlReader


class FakeNvml:
    """What the reader uses of pynvml; a Hopper card on PCIe 5 x16."""

    NVML_SUCCESS = 0
    NVML_FI_DEV_PCIE_COUNT_TX_BYTES = 197
    NVML_FI_DEV_PCIE_COUNT_RX_BYTES = 198
    NVML_GPM_METRIC_GRAPHICS_UTIL = 1
    NVML_GPM_METRIC_SM_UTIL = 2
    NVML_GPM_METRIC_DRAM_BW_UTIL = 10
    NVML_GPM_METRICS_GET_VERSION = 1

    class NVMLError(Exception):
        pass

    def __init__(self, *, has_gpm: bool = True, generation: int = 5) -> None:
        self.has_gpm, self.generation = has_gpm, generation
        self.counts = {197: 20, 198: 1000}
        self.field_status = 0
        self.samples = 0
        self.busy_at: dict[int, float] = {}

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

    def nvmlDeviceGetFieldValues(self, handle: str, fields: list[int]) -> list[SimpleNamespace]:
        return [
            SimpleNamespace(
                nvmlReturn=self.field_status, value=SimpleNamespace(ullVal=self.counts[field])
            )
            for field in fields
        ]

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> SimpleNamespace:
        return SimpleNamespace(gpu=40)

    def nvmlGpmSampleAlloc(self) -> SimpleNamespace:
        return SimpleNamespace(number=0)

    def nvmlGpmSampleGet(self, handle: str, sample: SimpleNamespace) -> None:
        self.samples += 1
        sample.number = self.samples

    def c_nvmlGpmMetricsGet_t(self) -> SimpleNamespace:
        return SimpleNamespace(metrics=[SimpleNamespace() for _ in range(8)])

    def nvmlGpmMetricsGet(self, question: SimpleNamespace) -> None:
        assert question.sample1.number == question.sample2.number - 1
        for metric in question.metrics[: question.numMetrics]:
            metric.nvmlReturn = 0
            metric.value = 10.0 * metric.metricId


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """The reader's clock, a second further at each look."""
    now = SimpleNamespace(seconds=0.0, step=1.0)

    def monotonic() -> float:
        now.seconds += now.step
        return now.seconds

    monkeypatch.setattr(nvml_module, "time", SimpleNamespace(monotonic=monotonic))
    return now


def test_what_the_card_receives_is_host_to_device(clock):
    readings = NvmlReader("GPU-1", FakeNvml()).read()
    assert readings.pcie_bytes == {"host_to_device": 1000, "device_to_host": 20}
    assert readings.utilization == 0.4


def test_a_link_of_generation_5_and_16_lanes_carries_63_gigabytes_per_second(clock):
    # By hand: 32 GT/s a lane, 128 of 130 bits are data, 16 lanes.
    readings = NvmlReader("GPU-1", FakeNvml()).read()
    assert readings.link_bytes_per_second == pytest.approx(63.015e9, rel=1e-4)


def test_activity_is_of_the_time_between_two_looks(clock):
    reader = NvmlReader("GPU-1", FakeNvml())
    assert reader.read().activity == {}
    for _ in range(3):
        activity = reader.read().activity
        assert activity == {"graphics": 0.1, "sm": 0.2, "dram": 1.0}


def test_looks_too_close_together_take_no_sample(clock):
    fake = FakeNvml()
    reader = NvmlReader("GPU-1", fake)
    reader.read()
    reader.read()
    clock.step = nvml_module.MIN_ACTIVITY_SECONDS / 2
    assert reader.read().activity == {"graphics": 0.1, "sm": 0.2, "dram": 1.0}
    assert fake.samples == 2


def test_a_card_before_hopper_has_no_activity(clock):
    reader = NvmlReader("GPU-1", FakeNvml(has_gpm=False))
    reader.read()
    assert reader.read().activity == {}


def test_an_unknown_card_a_refused_field_and_an_unknown_link_are_errors(clock):
    with pytest.raises(FluxionError, match="GPU-2"):
        NvmlReader("GPU-2", FakeNvml())
    with pytest.raises(FluxionError, match="generation 9"):
        NvmlReader("GPU-1", FakeNvml(generation=9))
    fake = FakeNvml()
    reader = NvmlReader("GPU-1", fake)
    fake.field_status = 3
    with pytest.raises(FluxionError, match="NVML"):
        reader.read()
