"""Every ISA of this machine, and stores full of random KV."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from fluxion_core.geometry import KvGeometry
from fluxion_core.kernels import isa
from fluxion_core.kvstore.store import HostKvStore


@pytest.fixture(params=isa.available_isas())
def each_isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = isa.current_isa()
    isa.set_isa(request.param)
    yield request.param
    isa.set_isa(before)


@pytest.fixture
def filled_store() -> Callable[..., HostKvStore]:
    """A store whose slabs all hold random KV; without digests."""

    def make(geometry: KvGeometry, num_slabs: int, seed: int) -> HostKvStore:
        store = HostKvStore(geometry, num_slabs * (geometry.slab_bytes + 4096), model_key=b"toy")
        generator = torch.Generator().manual_seed(seed)
        for slab in range(num_slabs):
            kv = store.slab_kv(slab)
            kv.copy_(torch.randn(kv.shape, generator=generator))
        return store

    return make
