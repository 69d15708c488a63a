"""The body of a decode step that fits where a model is, as a decode node makes it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fluxion_core.decode.host.attention import HybridAttention
from fluxion_core.decode.host.decoder import HostDecoder
from fluxion_core.decode.host.step import HostStep
from fluxion_core.geometry import WindowSpec
from fluxion_core.kvstore.store import HostKvStore
from fluxion_core.models.decoder import Decoder
from fluxion_core.planning.planner import Planner
from fluxion_core.pool.cpu_pool import CpuPool

if TYPE_CHECKING:
    from fluxion_core.decode.device.step import DeviceStep


def step_for(
    decoder: Decoder,
    store: HostKvStore,
    window: WindowSpec,
    pool: CpuPool,
    *,
    planner: Planner | None = None,
    max_rows: int,
) -> HostStep | DeviceStep:
    """Steps of a model: on the GPU that it is on, with the CPUs, else on the CPUs alone.

    Args:
        decoder: the model. On a CPU its weights are taken, and it cannot be used any more.
        store: where sequences are held; on a GPU its memory is pinned, until the step is closed.
        window: the default window.
        pool: CPU threads; the step's alone.
        planner: for policies that need head profiles; without one they are refused.
        max_rows: sequences of a step.

    Raises:
        ShapeError: heads do not form groups.
        CapacityError: the store's memory cannot be pinned.
    """
    config = decoder.config
    if decoder.embedding.device.type == "cpu":
        attention = HybridAttention(
            store, window, num_heads=config.num_heads, pool=pool, planner=planner
        )
        return HostStep(HostDecoder(decoder, pool), attention)
    # Triton, which is not installed where there is no GPU.
    from fluxion_core.decode.device.step import DeviceStep

    return DeviceStep(
        decoder,
        store,
        window,
        pool,
        max_rows=max_rows,
        max_context_tokens=config.context_tokens,
        planner=planner,
    )
