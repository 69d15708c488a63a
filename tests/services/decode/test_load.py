"""Load of a node with a GPU, without one: memory there is told beside the host's."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from fluxion_core.kvstore.store import StoreStatistics
from fluxion_core.observe.device_usage import DeviceUsage, TierUsage
from fluxion_proto.v1 import generate_pb2
from services.decode.engine import EngineStatistics
from services.decode.service import GenerationService

STORE = StoreStatistics(100, 40, 30, 20, 10, shared_slabs=0, sequences=1)
TIER = TierUsage(capacity_bytes=80, held_bytes=64)


def answering(statistics: object) -> SimpleNamespace:
    """Stands for whoever answers `statistics` with these."""
    return SimpleNamespace(statistics=lambda: statistics)


@pytest.mark.parametrize(
    ("device", "told"),
    [(None, (0, 0)), (DeviceUsage(), (0, 0)), (DeviceUsage(tier=TIER), (80, 64))],
)
async def test_a_tier_is_told_where_there_is_one(
    device: DeviceUsage | None, told: tuple[int, int]
) -> None:
    service = GenerationService(
        None,
        None,
        answering(STORE),
        answering(SimpleNamespace(admitted=1, waiting=2)),
        answering(EngineStatistics(tokens=7, device=device)),
        planning=None,
        callers=None,
    )
    load = await service.GetLoad(generate_pb2.GetLoadRequest(), None)
    assert (load.device_kv_capacity_bytes, load.device_kv_held_bytes) == told
    assert (load.host_kv_capacity_bytes, load.generated_tokens_total) == (100, 7)
