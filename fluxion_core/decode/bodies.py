"""The body of a decode step that fits where a model is."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Literal

from fluxion_core.decode.head_errors import HeadErrorSampling
from fluxion_core.decode.host.attention import HostAttention
from fluxion_core.decode.host.decoder import HostDecoder
from fluxion_core.decode.host.step import HostStep
from fluxion_core.decode.step import DecodeStep
from fluxion_core.errors import ConfigError
from fluxion_core.geometry import WindowSpec
from fluxion_core.kvstore.store import HostKvStore
from fluxion_core.models.decoder import Decoder
from fluxion_core.observe.log import event
from fluxion_core.planning.planner import Planner
from fluxion_core.pool.cpu_pool import CpuPool

_log = logging.getLogger(__name__)


def step_for(
    decoder: Decoder,
    store: HostKvStore,
    window: WindowSpec,
    pool: CpuPool,
    *,
    planner: Planner | None = None,
    lanes: Literal["auto", "cpu", "gpu", "both"] = "auto",
    max_rows: int,
    device_kv_bytes: int | None = 0,
    head_error_one_in: int = 0,
    goes_on: Callable[[], bool] = lambda: True,
) -> DecodeStep:
    """The step that runs a model: on the GPU that it is on, else on the CPU alone.

    Args:
        decoder: the model. On a CPU its weights are taken, and it cannot be used any more.
        store: where sequences are held; on a GPU its memory is pinned, until the step is closed.
        window: which tokens every head always attends to.
        pool: CPU threads; the step's alone.
        planner: for policies that need head profiles; without one they are refused.
        lanes: who attends to retrieval regions; auto takes all there are.
        max_rows: sequences of a step.
        device_kv_bytes: device memory for KV that is read most; None takes what is free, 0 none.
        head_error_one_in: of so many bytes that attention reads, one is read to measure what plans
            lose; 0 for never. Steps on a GPU do not measure it yet: the log says so.
        goes_on: asked before each piece of the store that is pinned.

    Raises:
        RequestCancelledError: `goes_on` said no before all was pinned; nothing is pinned then.
        ConfigError: lanes, or memory, that the device does not have.
        ShapeError: the window is too short for the digests, or heads do not form groups.
        CapacityError: the store's memory cannot be pinned, or the device has not so much free.
    """
    if decoder.embedding.device.type == "cpu":
        _check_host(lanes, device_kv_bytes)
        return _host_step(decoder, store, window, pool, planner, head_error_one_in)
    if head_error_one_in:
        _log.info(event("head errors are not measured", reason="steps on a GPU do not do it yet"))
    # Triton, which is not installed where there is no GPU.
    from fluxion_core.decode.device.step import DeviceStep

    return DeviceStep(
        decoder,
        store,
        window,
        pool,
        max_rows=max_rows,
        max_context_tokens=decoder.config.context_tokens,
        lanes="both" if lanes == "auto" else lanes,
        planner=planner,
        device_kv_bytes=device_kv_bytes,
        goes_on=goes_on,
    )


def _check_host(lanes: str, device_kv_bytes: int | None) -> None:
    if lanes not in ("auto", "cpu"):
        raise ConfigError(
            f"engine.lanes is {lanes}, and the model is on the CPU; use auto or cpu, or set "
            f"model.device to cuda"
        )
    if device_kv_bytes:
        raise ConfigError(
            f"store.device_kv_bytes is {device_kv_bytes}, and the model is on the CPU; use "
            f"auto or 0, or set model.device to cuda"
        )


def _host_step(
    decoder: Decoder,
    store: HostKvStore,
    window: WindowSpec,
    pool: CpuPool,
    planner: Planner | None,
    head_error_one_in: int,
) -> HostStep:
    num_heads, sampling = decoder.config.num_heads, None
    if head_error_one_in:
        sampling = HeadErrorSampling(store.geometry, num_heads, pool, one_in=head_error_one_in)
    attention = HostAttention(
        store, window, num_heads=num_heads, pool=pool, planner=planner, sampling=sampling
    )
    return HostStep(HostDecoder(decoder, pool), attention)
