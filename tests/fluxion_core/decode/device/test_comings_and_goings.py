"""A long life of steps with sequences that come and go leaves nothing behind."""

from __future__ import annotations

import gc
import random
from typing import TYPE_CHECKING

import pytest
import torch

from fluxion_core.decode.step import StepRow
from fluxion_core.kvstore.store import HostKvStore
from fluxion_core.planning.policy import parse_policy
from fluxion_core.pool.cpu_pool import CpuPool
from tests.fluxion_core.decode.small_step import (
    WINDOW,
    random_decoder,
    random_sequence,
    store_for,
)

if TYPE_CHECKING:
    from fluxion_core.decode.device.digests import DeviceDigests
    from fluxion_core.decode.device.tier import DeviceTier

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

STEPS = 2000
ROWS = 4
LONGEST_LIFE = 40
POLICIES = ("exact", "fixed(16, 10 %)", "fixed(64, 25 %)")


def _held(store: HostKvStore, windows: int) -> tuple[int, ...]:
    """Bytes and slots in use, on both sides."""
    torch.cuda.synchronize()
    gc.collect()
    held = store.statistics()
    device = (torch.cuda.memory_allocated(), torch.cuda.memory_reserved())
    return (held.used_bytes, held.reserved_bytes, held.sequences, windows, *device)


def _check_tier(tier: DeviceTier, store: HostKvStore) -> int:
    """Hold every slot against the arena's block that it says it has; returns how many have one."""
    torch.cuda.synchronize()
    geometry = store.geometry
    table, owner, kv = tier.table.cpu(), tier.owner.cpu(), tier.kv.cpu()
    owned = torch.nonzero(owner >= 0)[:, 0]
    entered = torch.nonzero(table >= 0)[:, 0]
    assert torch.equal(table[owner[owned]].long(), owned)
    assert torch.equal(owner[table[entered]].long(), entered)
    slab_units = geometry.kv_bytes // geometry.block_bytes
    slots = kv.view(-1, geometry.block_bytes)
    for slot in owned[:: max(1, len(owned) // 500)].tolist():
        slab, unit = divmod(int(owner[slot]), slab_units)
        if tier.is_current(slab):
            arena = store.slab_kv(slab).view(torch.uint8).view(slab_units, -1)
            assert torch.equal(slots[slot], arena[unit])
    return len(owned)


def _check_digests(digests: DeviceDigests, store: HostKvStore, rows: list[StepRow]) -> int:
    """Hold digests of whole slabs in the rows' regions, as the device's map has them, against the
    store's; returns how many of these slabs it has."""
    torch.cuda.synchronize()
    places = digests.placed.places.tolist()
    copies = digests._copies.cpu()
    checked = 0
    for row in rows:
        region = WINDOW.retrieval_region(row.sequence.num_tokens)
        for slab in row.sequence.slabs[: region.stop // store.geometry.slab_tokens]:
            if places[slab] >= 0:
                assert torch.equal(copies[places[slab]], store.slab_digests(slab))
                checked += 1
    taken = [place for place in places if place >= 0]
    assert sorted(taken) == list(range(len(copies)))
    return checked


@pytest.mark.parametrize(
    ("tier_bytes", "digest_slabs"), [(0, None), (4 << 20, 5), (4 << 20, None), (64 << 20, None)]
)
def test_two_thousand_steps_leave_no_byte_and_no_slot_behind(
    tier_bytes: int, digest_slabs: int | None
) -> None:
    from fluxion_core.decode.device.step import DeviceStep

    rng, generator = random.Random(5), torch.Generator().manual_seed(5)
    store = store_for(16)
    step = DeviceStep(
        random_decoder("cuda"),
        store,
        WINDOW,
        CpuPool(2),
        max_rows=ROWS,
        max_context_tokens=8192,
        device_kv_bytes=tier_bytes,
        max_digest_slabs=digest_slabs,
    )
    try:
        at_start = _held(store, step.windows.num_free)
        joined = 0
        rows: list[StepRow] = []
        lives: list[int] = []
        resident, checked = 0, 0
        for number in range(STEPS):
            while len(rows) < ROWS and (not rows or rng.random() < 0.3):
                life, length = rng.randint(1, LONGEST_LIFE), rng.randint(40, 2000)
                joined += 1
                # Some share what others have stored.
                first = rng.choice((1, 2, joined + 2))
                sequence = random_sequence(store, length, life + 1, generator, first=first)
                policy = parse_policy(rng.choice(POLICIES))
                rows.append(StepRow(sequence, step.join(sequence), joined % 512, policy))
                lives.append(life)
            logits, reads = step.run(rows)
            assert torch.isfinite(logits).all()
            resident += sum(read.resident_bytes for read in reads)
            if step.selection is not None and number % 100 == 99:
                assert _check_tier(step.selection.tier, store) > 0
                assert step._digests is not None
                checked += _check_digests(step._digests, store, rows)
            lives = [life - 1 for life in lives]
            for row in [row for row, life in zip(rows, lives, strict=True) if not life]:
                step.leave(row.slot)
                row.sequence.release()
            rows = [row for row, life in zip(rows, lives, strict=True) if life]
            lives = [life for life in lives if life]
        if step.selection is not None:
            assert step.selection.tier.statistics().window_bytes > 0
        for row in rows:
            step.leave(row.slot)
            row.sequence.release()
        assert (resident > 0) == (checked > 0) == bool(tier_bytes)
        assert joined > STEPS // LONGEST_LIFE
        del rows, logits
        assert _held(store, step.windows.num_free) == at_start
    finally:
        step.close()
