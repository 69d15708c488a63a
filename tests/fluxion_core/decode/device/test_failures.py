"""Failures of the device are told apart: it has no memory left, or nothing may use it any more."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fluxion_core.decode.device import graph as graph_module
from fluxion_core.decode.device import step as step_module
from fluxion_core.decode.device.graph import StepGraph
from fluxion_core.decode.device.step import DeviceStep
from fluxion_core.errors import CapacityError, DeviceError
from fluxion_core.pool.cpu_pool import CpuPool
from tests.fluxion_core.decode.small_step import CONFIG, WINDOW, random_decoder, store_for

LOST = RuntimeError("CUDA error: an illegal memory access was encountered")


@pytest.fixture
def step() -> DeviceStep:
    """As far as it goes without a device."""
    step = object.__new__(DeviceStep)
    step._device, step._stream, step._store = torch.device("cpu"), None, store_for(16)
    step._graphs, step._selection = SimpleNamespace(launches=6), None
    return step


@pytest.fixture(autouse=True)
def _no_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "stream", lambda _: torch.inference_mode())


def refuse(error: BaseException):
    def body(*_args, **_options) -> None:
        raise error

    return body


def test_what_failed_between_steps_ends_the_device_when_the_next_begins(
    step: DeviceStep, monkeypatch: pytest.MonkeyPatch
):
    # The tier's copies run then; torch says what became of them when it is asked.
    monkeypatch.setattr(step, "_begin", refuse(LOST))
    with pytest.raises(DeviceError, match=r"decode step 7: .*illegal memory access"):
        step.run([])


def test_a_sequence_that_cannot_join_a_failed_device_says_so(step: DeviceStep):
    step.windows = SimpleNamespace(join=refuse(LOST))
    sequence = SimpleNamespace(slab_table=SimpleNamespace(is_pinned=lambda: True))
    with pytest.raises(DeviceError, match="illegal memory access"):
        step.join(sequence)


def test_a_chunk_on_a_failed_device_says_so(step: DeviceStep):
    step._prompts = SimpleNamespace(compute_chunk=refuse(LOST))
    with pytest.raises(DeviceError, match=r"chunk of a prompt: .*illegal memory access"):
        step.compute_chunk(None, [1, 2], None)


def test_a_chunk_without_memory_ends_its_prompt_alone(
    step: DeviceStep, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (123, 456))
    step._prompts = SimpleNamespace(compute_chunk=refuse(torch.OutOfMemoryError("out of memory")))
    with pytest.raises(CapacityError, match=r"chunk of a prompt.*123 B free.*device_kv_bytes"):
        step.compute_chunk(None, [1, 2], None)


def test_a_graph_that_cuda_refuses_is_the_devices_end(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        graph_module, "_driver", lambda: SimpleNamespace(cuGraphLaunch=lambda *_: 700)
    )
    graph = object.__new__(StepGraph)
    graph.handle, graph.stream = 1, SimpleNamespace(cuda_stream=1)
    with pytest.raises(DeviceError, match="CUDA error 700"):
        graph.launch()


@pytest.mark.parametrize("is_lost", [False, True])
def test_a_step_that_cannot_be_made_unpins_the_store(
    is_lost: bool, monkeypatch: pytest.MonkeyPatch
):
    closed = []
    registered = SimpleNamespace(close=lambda: closed.append(True))
    monkeypatch.setattr(step_module, "RegisteredStore", lambda *_: registered)
    error = CapacityError("device memory", needed=2, free=1, unit="B", remedy="none")
    monkeypatch.setattr(step_module, "DeviceWindows", refuse(error))
    monkeypatch.setattr(torch.cuda, "synchronize", refuse(LOST) if is_lost else lambda _: None)
    with pytest.raises(CapacityError, match="need 2 B"):
        DeviceStep(
            random_decoder("cpu"),
            store_for(16),
            WINDOW,
            CpuPool(1),
            max_rows=1,
            max_context_tokens=CONFIG.context_tokens,
        )
    # A device that is lost may still be at it.
    assert closed == ([] if is_lost else [True])
